"""The flow reproduce: a recipe from the URL list to the scores."""

import logging

from prefect import flow

from flows.download_shards import download_shards
from flows.encode_latents import encode_latents
from flows.evaluate import evaluate
from flows.models import open_tracker
from flows.produce import PARENT_RUN, Receipt
from flows.request import Request
from flows.train_first_stage import train_first_stage
from flows.train_ldm import train_ldm

logger = logging.getLogger(__name__)
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
    run = open_tracker(request.store).start(
        STAGE, name=recipe, params={"recipe": recipe, "set": " ".join(set or [])}, tags={"recipe": recipe}
    )
    with run:
        PARENT_RUN.set(run.id)
        receipts = [stage(recipe, set, store) for stage in CHAIN]
        for receipt in receipts:
            state = "reused" if receipt.reused else "made"
            run.tag(f"stage.{receipt.stage}", f"{state}: {receipt.key} by run {receipt.mlflow_run}")
            run.input(receipt.stage, digest=receipt.digest, uri=receipt.uri, context=state)
    return receipts
