"""A model as a folder of its own, outside any store: what `ldm import` writes and `ldm.load` opens.

    model.json                    format, kind, config, where it came from, the sha256 of each file beside it
    weights.safetensors           the parameters, in the precision they came in
    training_state.safetensors    what an imported checkpoint held beyond the model, if anything

A folder appears whole or not at all, and nothing replaces one. Digests are verified before a file is parsed.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from datasets.blobs import TEMPORARY, make_folder, sync_folder
from datasets.keys import sha256_file
from ldm.config import Config, FirstStageModel
from ldm.errors import CheckpointError
from ldm.layout import first_stage_layout, require_layout
from ldm.model import WEIGHTS, Autoencoder, restore_first_stage

CARD = "model.json"
TRAINING_STATE = "training_state.safetensors"


class Origin(Config):
    """Where a model came from."""

    format: Literal["compvis", "diffusers", "artifact"]
    """Layout of the file it was read from; `artifact` is our own store."""
    file: str
    """Name of that file, or the artifact's key."""
    sha256: str
    """Digest of that file."""
    facts: Mapping[str, int | float | str] = Field(default_factory=dict)
    """Plain values it held beside the tensors, such as `global_step`."""


class Card(Config):
    """The content of `model.json`."""

    format: Literal[1] = 1
    """Version of this layout."""
    kind: Literal["first_stage"] = "first_stage"
    config: FirstStageModel
    origin: Origin
    files: dict[Literal["weights.safetensors", "training_state.safetensors"], str]
    """sha256 of each file in the folder."""


@dataclass(frozen=True)
class StoredModel:
    """A first stage outside a store: everything a model folder holds."""

    config: FirstStageModel
    weights: Mapping[str, Tensor]
    """Exactly the tensors of `ldm.layout.first_stage_layout(config)`."""
    origin: Origin
    training_state: Mapping[str, Tensor] = field(default_factory=dict)
    """Leftovers of training (`loss.*`), kept so that the checkpoint can be written back key for key."""


def autoencoder_of(model: StoredModel) -> Autoencoder:
    """A stored first stage ready for use, in float32."""
    return Autoencoder(restore_first_stage(model.config, model.weights), model.config)


@contextmanager
def appearing_whole(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends well, and else is removed.

    Raises:
        CheckpointError: `target` exists, or the folder cannot be written.
    """
    taken = CheckpointError(f"nothing is overwritten, and {target} exists; name another folder with --output")
    if target.exists():
        raise taken
    temporary = target.absolute().parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        make_folder(temporary)
        yield temporary
        for file in temporary.iterdir():
            file.chmod(
                temporary.stat().st_mode & 0o666
            )  # safetensors makes files that only their owner reads
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(temporary)
        if target.exists():
            raise taken
        temporary.rename(target)
        sync_folder(temporary.parent)
    except OSError as error:
        raise CheckpointError(
            f"{target} must be a place that can be written ({error}); free space, or name another "
            "with --output"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_model_folder(folder: Path, model: StoredModel) -> None:
    """Write a model as a new folder.

    Raises:
        CheckpointError: the folder exists, cannot be written, or the weights are not those of the config.
    """
    require_layout(model.weights, first_stage_layout(model.config), what="a model")
    parts = {WEIGHTS: model.weights, TRAINING_STATE: model.training_state}
    with appearing_whole(folder) as temporary:
        for name, tensors in parts.items():
            if tensors:
                save_file(dense(tensors), temporary / name)
        card = Card.model_validate(
            {
                "config": model.config,
                "origin": model.origin,
                "files": {file.name: sha256_file(file) for file in sorted(temporary.iterdir())},
            }
        )
        (temporary / CARD).write_text(json.dumps(card.model_dump(mode="json"), indent=1) + "\n", "utf-8")


def dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that own their memory, as files need them: no views, no two names for the same bytes."""
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}


def read_model_folder(folder: Path) -> StoredModel:
    """What a model folder holds, after its digests and its layout were found right.

    Raises:
        CheckpointError: there is no such folder, a file is missing or changed, or the weights are not those
            of the config.
    """
    card = read_card(folder)
    parts = {name: read_verified(folder / name, digest) for name, digest in card.files.items()}
    weights = parts.get(WEIGHTS, {})
    require_layout(weights, first_stage_layout(card.config), what=str(folder / WEIGHTS))
    return StoredModel(card.config, weights, card.origin, parts.get(TRAINING_STATE, {}))


def read_card(folder: Path) -> Card:
    """The `model.json` of a folder.

    Raises:
        CheckpointError: there is none, or it is not one.
    """
    path = folder / CARD
    try:
        return Card.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"a model folder must hold a readable {CARD}; {error}; `ldm import` writes such a folder"
        ) from error
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CheckpointError(
            f"{path} must be what this version of `ldm import` writes; {said}; import the checkpoint again"
        ) from None


def read_verified(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a file with that digest.

    Raises:
        CheckpointError: the file is missing, or its digest is another one.
    """
    try:
        found = sha256_file(path)
    except OSError as error:
        raise CheckpointError(
            f"{CARD} names {path}, which must be readable ({error}); import again"
        ) from error
    if found != sha256:
        raise CheckpointError(
            f"{path} must have the sha256 of {CARD}, {sha256}; it has {found}; copy the folder "
            "or import again"
        )
    return load_file(path)


def load_model_folder(folder: Path) -> Autoencoder:
    """The first stage of a model folder, ready for use.

    Raises:
        CheckpointError: see `read_model_folder`.
    """
    return autoencoder_of(read_model_folder(folder))
