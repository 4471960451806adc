"""The flow train-first-stage: image shards -> a trained first stage."""

from prefect import flow

from flows import download_shards
from flows.produce import Receipt, produce
from flows.request import Request

STAGE = "train-first-stage"


@flow(name=STAGE, flow_run_name="train-first-stage {recipe}")
def train_first_stage(
    recipe: str = "demo", set: list[str] | None = None, store: str = "./artifacts", build: bool = True
) -> Receipt:
    """Train the recipe's first stage on the training pictures.

    Args:
        recipe: name of a recipe or path of a YAML.
        set: overrides, `key=value` each.
        store: URI of the artifact store.
        build: whether missing inputs are built.
    """
    request = Request.resolve(recipe, set or [], store, build=build)
    request.need(download_shards.STAGE, lambda: download_shards.download_shards(recipe, set, store))
    return produce(request, STAGE)
