"""Puts an imported model into the store, under a name that other commands find it by."""

from pathlib import Path

from datasets.store import Store
from flows.tracking import open_tracker
from ldm.errors import CheckpointError
from ldm.stored_models import IMPORT_MODEL, store_folder
from ldm.tracking.tracked_run import NOT_IN_A_NAME

TRAINED = ("ldm-", "first-stage-")
"""How the names of models begin that are trained in a store."""


def check_name(name: str) -> None:
    """Refuse a name that trained models have, or that the registry does not take.

    Raises:
        CheckpointError: naming the rule.
    """
    if not name or name.startswith(TRAINED) or NOT_IN_A_NAME.search(name) or set(name) & set("/@ "):
        raise CheckpointError(
            f"a model is registered by a name of letters, digits and any of _.-, which does not begin with "
            f"{' or '.join(TRAINED)} as those of trained models do, got {name!r}; choose another --register"
        )


def register_folder(store: str, folder: Path, name: str) -> str:
    """Copy a model folder into the store and register it; returns what was done, in a line.

    Raises:
        CheckpointError: the folder is damaged.
        SpaceError: the store is full.
    """
    opened = Store(store)
    manifest = store_folder(opened, folder, name=name)
    uri, origin = opened.uri_of(manifest), manifest.content.what["origin"]
    run = open_tracker(opened).start(
        IMPORT_MODEL,
        name=f"{name}-{manifest.key[:8]}",
        params={f"origin.{field}": value for field, value in origin.items() if field != "facts"},
        tags={"key": manifest.key, "store": opened.uri},
        system_metrics=False,
    )
    with run:
        run.output(IMPORT_MODEL, digest=manifest.digest, uri=uri)
        version = run.register(
            name, uri=uri, digest=manifest.digest, tags={"key": manifest.key}, alias="candidate"
        )
    called = (
        f"as {name}, version {version['version']}" if version else "by its key alone until MLflow answers"
    )
    return f"registered {called}: key {manifest.short} in {opened.uri}"
