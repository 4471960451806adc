"""The flow encode-latents: image shards and first stage -> latent shards."""

from prefect import flow

from flows import download_shards, train_first_stage
from flows.produce import Receipt, produce
from flows.request import Request

STAGE = "encode-latents"


@flow(name=STAGE, flow_run_name="encode-latents {recipe}")
def encode_latents(
    recipe: str = "demo", set: list[str] | None = None, store: str = "./artifacts", build: bool = True
) -> Receipt:
    """Encode the corpus with the recipe's first stage.

    Args:
        recipe: name of a recipe or path of a YAML.
        set: overrides, `key=value` each.
        store: URI of the artifact store.
        build: whether missing inputs are built.
    """
    request = Request.resolve(recipe, set or [], store, build=build)
    request.need(download_shards.STAGE, lambda: download_shards.download_shards(recipe, set, store))
    request.need(train_first_stage.STAGE, lambda: train_first_stage.train_first_stage(recipe, set, store))
    return produce(request, STAGE)
