"""The flow compare-first-stages: first stages on the same pictures, scored side by side (paper Tab. 8)."""

from collections.abc import Sequence

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from datasets.keys import artifact_key
from flows.evaluate_first_stage import evaluate_first_stage
from flows.first_stage_scores import figures, markdown, rows_of, scored
from flows.invocation import Invocation
from flows.produce import PARENT_RUN, Receipt, tracked
from flows.request import Request
from ldm.recipe import named_first_stage

STAGE = "compare-first-stages"


@flow(name=STAGE, flow_run_name="compare-first-stages {recipe}")
def compare_first_stages(
    recipe: str = "demo",
    set: list[str] | None = None,
    store: str = "./artifacts",
    first_stages: list[str] | None = None,
) -> list[Receipt]:
    """Train and score first stages on the pictures of one recipe; a table and curves over f show the outcome.

    Args:
        recipe: name of a recipe or path of a YAML; of it the data set, `encoding` and `evaluation` are used.
        set: overrides for all of them, `key=value` each.
        store: URI of the artifact store.
        first_stages: names of first stages or paths of their YAMLs; the recipe's own by default.
    """
    request = Request.resolve(recipe, set or [], store)
    names = first_stages or [request.recipe.first_stage.name]
    settings = {name: overrides_for(name, set) for name in names}
    recipes = {name: Request.resolve(recipe, one, store).recipe for name, one in settings.items()}
    what = {name: one.model_dump(mode="json") for name, one in recipes.items()}
    key = artifact_key(STAGE, 1, what=what, parents={})
    params = {"recipe": recipe, "first_stages": " ".join(names)}
    asked = [Invocation.of(recipe, one) for one in settings.values()]
    with tracked(request, STAGE, key, params, asked=asked) as run:
        parent = PARENT_RUN.set(run.id)
        try:
            receipts = [evaluate_first_stage(recipe, one, store) for one in settings.values()]
        finally:
            PARENT_RUN.reset(parent)
        rows = rows_of(scored(request.store, receipts))
        run.text("comparison.md", markdown(rows))
        for name, picture in figures(rows).items():
            run.picture(name, 0, picture)
    create_markdown_artifact(key=STAGE, markdown=markdown(rows), description="first stages side by side")
    request.store.work(STAGE, key).clear()
    return receipts


def overrides_for(name: str, overrides: Sequence[str] | None) -> list[str]:
    """Overrides that put a first stage into a recipe, whose UNet, not trained here, takes its latents."""
    channels = named_first_stage(name)["model"].get("embed_dim", 3)
    fitting = [f"unet.in_channels={channels}", f"unet.out_channels={channels}"]
    return [f"first_stage={name}", *fitting, *(overrides or [])]
