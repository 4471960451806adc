"""The flow train-ldm: latent shards -> a trained diffusion model."""

from prefect import flow

from flows import encode_latents
from flows.produce import Receipt, produce
from flows.request import Request

STAGE = "train-ldm"


@flow(name=STAGE, flow_run_name="train-ldm {recipe}")
def train_ldm(
    recipe: str = "demo", set: list[str] | None = None, store: str = "./artifacts", build: bool = True
) -> Receipt:
    """Train the recipe's UNet, building what it needs on a fresh store.

    Args:
        recipe: name of a recipe or path of a YAML.
        set: overrides, `key=value` each.
        store: URI of the artifact store.
        build: whether missing inputs are built.
    """
    request = Request.resolve(recipe, set or [], store, build=build)
    request.need(encode_latents.STAGE, lambda: encode_latents.encode_latents(recipe, set, store))
    return produce(request, STAGE)
