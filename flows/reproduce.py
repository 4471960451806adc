"""The flow reproduce: a recipe from the URL list to the scores."""

from prefect import flow

from datasets.keys import artifact_key
from flows.download_shards import download_shards
from flows.encode_latents import encode_latents
from flows.evaluate import evaluate
from flows.produce import PARENT_RUN, Receipt, tracked
from flows.request import Request
from flows.train_first_stage import train_first_stage
from flows.train_ldm import train_ldm

STAGE = "reproduce"
CHAIN = (download_shards, train_first_stage, encode_latents, train_ldm, evaluate)


@flow(name=STAGE, flow_run_name="reproduce {recipe}")
def reproduce(
    recipe: str = "demo", set: list[str] | None = None, store: str = "./artifacts"
) -> list[Receipt]:
    """Download, train the first stage, encode, train the diffusion model and evaluate it.

    Args:
        recipe: name of a recipe or path of a YAML.
        set: overrides, `key=value` each.
        store: URI of the artifact store.
    """
    request = Request.resolve(recipe, set or [], store)
    key = artifact_key(STAGE, 1, what=request.recipe.model_dump(mode="json"), parents={})
    with tracked(request, STAGE, key, {"recipe": recipe, "set": " ".join(set or [])}) as run:
        parent = PARENT_RUN.set(run.id)
        try:
            receipts = [stage(recipe, set, store) for stage in CHAIN]
        finally:
            PARENT_RUN.reset(parent)
        for receipt in receipts:
            state = "reused" if receipt.reused else "made"
            run.tag(f"stage.{receipt.stage}", f"{state}: {receipt.key} by run {receipt.mlflow_run}")
            run.input(receipt.stage, digest=receipt.digest, uri=receipt.uri, context=state)
    request.store.work(STAGE, key).clear()
    return receipts
