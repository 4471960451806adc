"""The flow download-shards: URL list (or folder) -> curated image shards."""

from prefect import flow

from flows.produce import Receipt, produce
from flows.request import Request

STAGE = "download-shards"


@flow(name=STAGE, flow_run_name="download-shards {recipe}")
def download_shards(
    recipe: str = "demo", set: list[str] | None = None, store: str = "./artifacts", build: bool = True
) -> Receipt:
    """Fetch, curate and shard the pictures of a recipe's data set.

    Args:
        recipe: name of a recipe or path of a YAML.
        set: overrides, `key=value` each.
        store: URI of the artifact store.
        build: has no inputs to build; taken so that all stages are called alike.
    """
    return produce(Request.resolve(recipe, set or [], store, build=build), STAGE)
