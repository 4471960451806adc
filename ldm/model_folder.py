"""A model as a folder of its own, outside any store: what `ldm import` writes and `ldm.load` opens.

    model.json                    format, kind, config, where it came from, the sha256 of each file beside it
    weights.safetensors           the parameters, in the precision they came in; of a latent diffusion model
                                  those of the UNet (`unet.*`) and the conditioning encoder (`conditioner.*`)
    first_stage.safetensors       of a latent diffusion model: its first stage
    ema.safetensors               of a latent diffusion model: the UNet's moving average, if there is one
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
from typing import Annotated, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from datasets.blobs import TEMPORARY, make_folder, sync_folder
from datasets.keys import sha256_file
from ldm.config import Config
from ldm.errors import CheckpointError
from ldm.first_stage_config import FirstStageModel
from ldm.latent_diffusion import LatentDiffusion
from ldm.layout import first_stage_layout, networks_layout, networks_of, require_layout
from ldm.model import WEIGHTS, Autoencoder, restore_first_stage
from ldm.model_config import LatentDiffusionModel, Weights

CARD = "model.json"
FIRST_STAGE = "first_stage.safetensors"
EMA = "ema.safetensors"
TRAINING_STATE = "training_state.safetensors"
LOG_VARIANCE = "logvar"
"""Name in the training state of the learned log-variance per time step."""


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


FileName = Literal[
    "weights.safetensors", "first_stage.safetensors", "ema.safetensors", "training_state.safetensors"
]


class FirstStageCard(Config):
    """The content of `model.json` for a first stage."""

    format: Literal[1] = 1
    """Version of this layout."""
    kind: Literal["first_stage"] = "first_stage"
    config: FirstStageModel
    origin: Origin
    files: dict[FileName, str]
    """sha256 of each file in the folder."""


class LatentDiffusionCard(Config):
    """The content of `model.json` for a latent diffusion model."""

    format: Literal[1] = 1
    """Version of this layout."""
    kind: Literal["latent_diffusion"] = "latent_diffusion"
    config: LatentDiffusionModel
    origin: Origin
    files: dict[FileName, str]
    """sha256 of each file in the folder."""


Card = FirstStageCard | LatentDiffusionCard
CARDS: TypeAdapter[Card] = TypeAdapter(Annotated[Card, Field(discriminator="kind")])


@dataclass(frozen=True)
class StoredModel:
    """A first stage outside a store: everything a model folder holds."""

    config: FirstStageModel
    weights: Mapping[str, Tensor]
    """Exactly the tensors of `ldm.layout.first_stage_layout(config)`."""
    origin: Origin
    training_state: Mapping[str, Tensor] = field(default_factory=dict)
    """Leftovers of training (`loss.*`), kept so that the checkpoint can be written back key for key."""

    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors by file."""
        return {WEIGHTS: self.weights, TRAINING_STATE: self.training_state}

    def require_whole(self, what: str) -> None:
        """Refuse weights that are not those of the config.

        Raises:
            CheckpointError: a tensor is missing, unexpected or misshapen.
        """
        require_layout(self.weights, first_stage_layout(self.config), what=what)


@dataclass(frozen=True)
class StoredDiffusion:
    """A latent diffusion model outside a store: everything a model folder holds."""

    config: LatentDiffusionModel
    weights: Mapping[str, Tensor]
    """Exactly the tensors of `ldm.layout.networks_layout(config)`, of the last training step."""
    first_stage: Mapping[str, Tensor]
    """Exactly the tensors of `ldm.layout.first_stage_layout(config.first_stage)`."""
    ema: Mapping[str, Tensor]
    """The moving average of `unet.*`; empty when there is none."""
    origin: Origin
    training_state: Mapping[str, Tensor] = field(default_factory=dict)
    """What else the checkpoint held, under its own names: noise levels, counters, leftovers of losses."""

    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors by file."""
        first = {WEIGHTS: self.weights, FIRST_STAGE: self.first_stage}
        return first | {EMA: self.ema, TRAINING_STATE: self.training_state}

    def require_whole(self, what: str) -> None:
        """Refuse weights that are not those of the config.

        Raises:
            CheckpointError: a tensor is missing, unexpected or misshapen.
        """
        layout = networks_layout(self.config)
        require_layout(self.weights, layout, what=what)
        require_layout(self.first_stage, first_stage_layout(self.config.first_stage), what=what)
        averaged = {name: shape for name, shape in layout.items() if name.startswith("unet.")}
        require_layout(self.ema, averaged if self.config.has_ema else {}, what=what)


AnyStored = StoredModel | StoredDiffusion


def autoencoder_of(model: AnyStored) -> Autoencoder:
    """A stored first stage, or that of a stored latent diffusion model, ready for use, in float32."""
    if isinstance(model, StoredDiffusion):
        return Autoencoder(
            restore_first_stage(model.config.first_stage, model.first_stage), model.config.first_stage
        )
    return Autoencoder(restore_first_stage(model.config, model.weights), model.config)


def latent_diffusion_of(model: StoredDiffusion, *, weights: Weights | None = None) -> LatentDiffusion:
    """A stored latent diffusion model ready for use, in float32; by default averaged, where it can be.

    Raises:
        CheckpointError: the averaged weights are asked for, and there are none.
    """
    config = model.config
    if weights == "ema" and not config.has_ema:
        raise CheckpointError('this model has no averaged weights; load it with weights="raw"')
    chosen = {**model.weights} | ({} if weights == "raw" else {**model.ema})
    with torch.device("meta"):
        networks = networks_of(config)
    networks.to_empty(device="cpu").load_state_dict(chosen)
    networks.eval().requires_grad_(False)
    learned = model.training_state.get(LOG_VARIANCE)
    return LatentDiffusion(
        Autoencoder(restore_first_stage(config.first_stage, model.first_stage), config.first_stage),
        networks,
        config,
        log_variance=None if learned is None else learned.float(),
    )


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
        for file in filter(Path.is_file, temporary.rglob("*")):
            file.chmod(
                temporary.stat().st_mode & 0o666
            )  # safetensors makes files that only their owner reads
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        for inner in filter(Path.is_dir, temporary.rglob("*")):
            sync_folder(inner)
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


def write_model_folder(folder: Path, model: AnyStored) -> None:
    """Write a model as a new folder.

    Raises:
        CheckpointError: the folder exists, cannot be written, or the weights are not those of the config.
    """
    model.require_whole("a model")
    kind = "first_stage" if isinstance(model, StoredModel) else "latent_diffusion"
    with appearing_whole(folder) as temporary:
        for name, tensors in model.parts().items():
            if tensors:
                save_file(dense(tensors), temporary / name)
        card = CARDS.validate_python(
            {
                "kind": kind,
                "config": model.config,
                "origin": model.origin,
                "files": {file.name: sha256_file(file) for file in sorted(temporary.iterdir())},
            }
        )
        (temporary / CARD).write_text(json.dumps(card.model_dump(mode="json"), indent=1) + "\n", "utf-8")


def dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that own their memory, as files need them: no views, no two names for the same bytes."""
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}


def read_model_folder(folder: Path) -> AnyStored:
    """What a model folder holds, after its digests and its layout were found right.

    Raises:
        CheckpointError: there is no such folder, a file is missing or changed, or the weights are not those
            of the config.
    """
    card = read_card(folder)
    parts = {name: read_verified(folder / name, digest) for name, digest in card.files.items()}
    return model_of_card(card, parts, what=str(folder / WEIGHTS))


def model_of_card(card: Card, parts: Mapping[str, Mapping[str, Tensor]], *, what: str) -> AnyStored:
    """The model of a `model.json` and the tensors of the files beside it; `what` is their name in messages.

    Raises:
        CheckpointError: the weights are not those of the config.
    """
    weights, state = parts.get(WEIGHTS, {}), parts.get(TRAINING_STATE, {})
    if isinstance(card, FirstStageCard):
        model = StoredModel(card.config, weights, card.origin, state)
    else:
        first_stage, ema = parts.get(FIRST_STAGE, {}), parts.get(EMA, {})
        model = StoredDiffusion(card.config, weights, first_stage, ema, card.origin, state)
    model.require_whole(what)
    return model


def read_card(folder: Path) -> Card:
    """The `model.json` of a folder.

    Raises:
        CheckpointError: there is none, or it is not one.
    """
    path = folder / CARD
    try:
        return parse_card(path.read_bytes(), source=str(path))
    except OSError as error:
        raise CheckpointError(
            f"a model folder must hold a readable {CARD}; {error}; `ldm import` writes such a folder"
        ) from error


def parse_card(data: bytes, *, source: str) -> Card:
    """The content of a `model.json`.

    Raises:
        CheckpointError: it is none of this version.
    """
    try:
        return CARDS.validate_json(data)
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CheckpointError(
            f"{source} must be what this version of `ldm import` writes; {said}; import the checkpoint again"
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


def load_model_folder(folder: Path, *, weights: Weights | None = None) -> Autoencoder | LatentDiffusion:
    """The model of a folder, ready for use.

    Raises:
        CheckpointError: see `read_model_folder`; or weights are asked for that it does not have.
    """
    model = read_model_folder(folder)
    if isinstance(model, StoredDiffusion):
        return latent_diffusion_of(model, weights=weights)
    if weights is not None:
        raise CheckpointError(f"a first stage has one set of weights, and weights={weights!r} was asked for")
    return autoencoder_of(model)
