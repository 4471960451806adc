"""Draws samples of a model into files."""

import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from datasets.keys import sha256_file
from datasets.store import Store
from flows.asked import Asked, Given, Settings
from flows.models import TRAIN_LDM, find_registered, recipe_of
from flows.sample_inputs import Inputs, inputs_of
from ldm.config import Device, Sampling
from ldm.device import full_float32, resolve
from ldm.errors import CheckpointError, ContractError
from ldm.latent_diffusion import LatentDiffusion
from ldm.model_config import Weights
from ldm.model_folder import StoredModel, latent_diffusion_of, read_model_folder
from ldm.pictures import png
from ldm.range import to_uint8
from ldm.sampling import MICRO_BATCH, sampling_of
from ldm.stages.train_ldm import labelled_grid
from ldm.stored_models import IMPORT_MODEL, imported_model, load_model

SHORT_KEY = 12
LABEL_CHARS = 28


@dataclass(frozen=True)
class Source:
    """An opened model, how it is sampled, and what a file of its samples says of it."""

    model: LatentDiffusion
    sampling: Sampling
    text: Mapping[str, str]


def open_model(store: str, spec: str, changes: Mapping[str, Any], weights: Weights | None) -> Source:
    """The model of a folder, or of a store by its registered name, alias or key.

    Args:
        store: URI of the store.
        spec: what the model is called.
        changes: fields of `ldm.config.Sampling`, laid over the recipe's.
        weights: averaged or raw.

    Raises:
        ModelNotFoundError: there is no such model.
        CheckpointError: the folder is damaged, holds a first stage, or has not the weights asked for.
        RecipeError: a setting out of its range.
    """
    if Path(spec).is_dir():
        stored = read_model_folder(Path(spec))
    else:
        opened = Store(store)
        manifest = find_registered(opened, spec, TRAIN_LDM, IMPORT_MODEL)
        if manifest.stage == TRAIN_LDM:
            recipe = recipe_of(manifest, [f"sampling.{name}={json.dumps(v)}" for name, v in changes.items()])
            model = load_model(opened, manifest, recipe, weights=weights)
            text = {"recipe": recipe.name, "model": manifest.key, "weights": weights or "ema"}
            return Source(model, recipe.sampling, text)
        stored = imported_model(opened, manifest)
    if isinstance(stored, StoredModel):
        raise CheckpointError(
            f"{spec} holds a first stage, which has no samples of its own; name a latent diffusion model"
        )
    num_timesteps = stored.config.diffusion.num_timesteps
    sampling = sampling_of({"micro_batch": MICRO_BATCH, **changes}, num_timesteps=num_timesteps)
    used = weights or ("ema" if stored.config.has_ema else "raw")
    text = {"file": stored.origin.file, "model": stored.origin.sha256, "weights": used}
    return Source(latent_diffusion_of(stored, weights=weights), sampling, text)


def sample_to_files(
    store: str,
    spec: str,
    output: Path,
    *,
    asked: Asked,
    given: Given,
    settings: Settings,
    weights: Weights | None,
    device: Device = "auto",
) -> None:
    """Write a grid with a row per condition, or a folder with a file per picture.

    Raises:
        ModelNotFoundError: there is no such model.
        CheckpointError: see `open_model`.
        ContractError: what is asked for does not fit the model, or an output that cannot be written.
        RecipeError: a setting out of its range, or a device that is not there.
    """
    check_output(output)
    where = resolve(device)
    source = open_model(store, spec, settings.changes(), weights)
    source.model.to(where)
    inputs = inputs_of(source.model, asked, given)
    pictures = drawn(source, inputs, asked.num)
    text = dict(source.text) | {
        "seed": str(source.sampling.seed),
        "sampling": source.sampling.model_dump_json(),
        **edited(given),
    }
    if output.suffix == ".png":
        output.write_bytes(sheet(pictures, inputs.names, asked.num, text))
    else:
        write_each(output, pictures, inputs.names, asked.num, text)
    Console().print(
        f"{output}: {len(pictures)} pictures of model {text['model'][:SHORT_KEY]}, seed {text['seed']}"
    )


def check_output(output: Path) -> None:
    """Refuse an output that cannot be written, before anything is drawn.

    Raises:
        ContractError: a folder that does not exist, a picture of another format, or what is there already.
    """
    if not output.absolute().parent.is_dir():
        raise ContractError(f"the folder of {output} must exist; make it, or name another with --output")
    if output.suffix == ".png" and output.is_dir():
        raise ContractError(
            f"{output} must be a file, and a folder has this name; name another with --output"
        )
    if output.suffix not in ("", ".png"):
        raise ContractError(
            f"--output must be a .png for a grid or a folder for a file per picture, got {output}; "
            "name one of these"
        )
    if output.suffix != ".png" and output.exists():
        raise ContractError(f"nothing is overwritten, and {output} exists; name another folder with --output")


@full_float32()
def drawn(source: Source, inputs: Inputs, num: int) -> np.ndarray:
    """`num` pictures for each row of the inputs, (N, H, W, 3) uint8."""
    count = num * max(1, len(inputs.names))
    rows = torch.arange(len(inputs.names)).repeat_interleave(num)
    with Progress() as bar:
        task = bar.add_task(f"sampling {count} pictures")
        pictures = source.model.sample(
            None if inputs.condition is None else inputs.condition.rows(rows),
            num=count,
            edit=inputs.edit,
            on_step=lambda done, total: bar.update(task, completed=done, total=total),
            **dict(source.sampling),
        )
    return to_uint8(pictures)


def edited(given: Given) -> dict[str, str]:
    """What a file of samples says of the pictures that they were made with."""
    said = {
        name: f"{file.name}, sha256 {sha256_file(file)}"
        for name, file in (("image", given.image), ("mask", given.mask), ("guide", given.guide))
        if file is not None
    }
    numbers = {"strength": given.strength, "guide_scale": given.guide_scale}
    return said | {name: f"{value:g}" for name, value in numbers.items() if value is not None}


def sheet(pictures: np.ndarray, names: tuple[str, ...], num: int, text: Mapping[str, str]) -> bytes:
    """PNG of all pictures, a row for each name."""
    labels = [textwrap.shorten(name, LABEL_CHARS, placeholder="...") for name in names]
    asked = {"asked": json.dumps(names)} if names else {}
    columns = num if names else math.ceil(math.sqrt(num))
    return labelled_grid(pictures, labels, per_class=columns, text={**text, **asked})


def write_each(
    folder: Path, pictures: np.ndarray, names: tuple[str, ...], num: int, text: Mapping[str, str]
) -> None:
    """Write each picture to a file of its own, named by its index; with seed and index it is drawn again."""
    folder.mkdir()
    for index, picture in enumerate(pictures):
        asked = {"asked": names[index // num]} if names else {}
        inside = {**text, **asked, "index": str(index)}
        (folder / f"{index:05}.png").write_bytes(png(picture, text=inside))
