"""Finds what `ldm export` is asked to export."""

from pathlib import Path

from datasets.store import Store
from flows.models import find_first_stage
from ldm.bridge.transfer import of_artifact
from ldm.model_folder import StoredModel, read_model_folder


def find_exportable(store: str, spec: str) -> StoredModel:
    """The first stage of a model folder, or of a registered `first-stage-NAME`, its alias, or a key's digits.

    Raises:
        CheckpointError: the folder is damaged, or the first stage has no weights.
        ModelNotFoundError: there is no such model.
    """
    if Path(spec).is_dir():
        return read_model_folder(Path(spec))
    opened = Store(store)
    return of_artifact(opened, find_first_stage(opened, spec))
