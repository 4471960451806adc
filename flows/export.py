"""Finds what `ldm export` is asked to export."""

from pathlib import Path

from datasets.store import Store
from flows.models import TRAIN_FIRST_STAGE, TRAIN_LDM, find_registered, recipe_of
from ldm.model_folder import AnyStored, read_model_folder
from ldm.stored_models import IMPORT_MODEL, imported_model, stored_diffusion, stored_first_stage


def find_exportable(store: str, spec: str) -> AnyStored:
    """The model of a folder, or of a store by its registered name, alias or key; a trained one averaged.

    Raises:
        CheckpointError: the folder is damaged, or a first stage has no weights.
        ModelNotFoundError: there is no such model.
    """
    if Path(spec).is_dir():
        return read_model_folder(Path(spec))
    opened = Store(store)
    manifest = find_registered(opened, spec, TRAIN_FIRST_STAGE, TRAIN_LDM, IMPORT_MODEL)
    if manifest.stage == TRAIN_FIRST_STAGE:
        return stored_first_stage(opened, manifest)
    if manifest.stage == TRAIN_LDM:
        return stored_diffusion(opened, manifest, recipe_of(manifest))
    return imported_model(opened, manifest)
