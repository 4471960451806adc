"""The flow evaluate-first-stage: a first stage -> rFID, PSNR, SSIM, LPIPS beside those of bicubic scaling."""

from prefect import flow

from flows import train_first_stage
from flows.produce import Receipt, produce
from flows.request import Request

STAGE = "evaluate-first-stage"


@flow(name=STAGE, flow_run_name="evaluate-first-stage {recipe}")
def evaluate_first_stage(
    recipe: str = "demo", set: list[str] | None = None, store: str = "./artifacts", build: bool = True
) -> Receipt:
    """Score the recipe's first stage on held-out pictures.

    Args:
        recipe: name of a recipe or path of a YAML.
        set: overrides, `key=value` each.
        store: URI of the artifact store.
        build: whether missing inputs are built.
    """
    request = Request.resolve(recipe, set or [], store, build=build)
    request.need(train_first_stage.STAGE, lambda: train_first_stage.train_first_stage(recipe, set, store))
    return produce(request, STAGE)
