"""The flow evaluate: a trained model -> scores beside their floor."""

from prefect import flow

from flows import train_ldm
from flows.produce import Receipt, produce
from flows.request import Request

STAGE = "evaluate"


@flow(name=STAGE, flow_run_name="evaluate {recipe}")
def evaluate(
    recipe: str = "demo",
    set: list[str] | None = None,
    store: str = "./artifacts",
    build: bool = True,
    model: str | None = None,
) -> Receipt:
    """Score the recipe's model, or a registered one.

    Args:
        recipe: name of a recipe or path of a YAML.
        set: overrides, `key=value` each.
        store: URI of the artifact store.
        build: whether missing inputs are built.
        model: a registered model (`name@alias`, or an alias of this recipe's model); the recipe it was
            trained by is used, and it is never built.
    """
    request = Request.resolve(recipe, set or [], store, build=build and model is None, model=model)
    request.need(train_ldm.STAGE, lambda: train_ldm.train_ldm(recipe, set, store))
    return produce(request, STAGE)
