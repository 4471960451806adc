"""Makes conditions and edits of what `ldm sample` is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from datasets.curate import Outcome, curate, read_rgb
from datasets.samples import decode_png
from flows.asked import Asked, Given
from ldm.conditions import Condition, fields_of
from ldm.edits import Edit, mask_of
from ldm.errors import ContractError
from ldm.latent_diffusion import LatentDiffusion
from ldm.range import from_uint8
from ldm.stages.train_ldm import MAX_GRID_CLASSES

STRENGTH = 0.6
"""Share of the time steps that a picture is sent back by where nobody says."""
SOURCES = {
    "class_label": "--classes",
    "caption": "--prompt",
    "image": "--image",
    "mask": "--mask",
    "low_res": "--image",
}
"""Field of a condition -> the option that gives it; a file (--condition) can give each."""


@dataclass(frozen=True)
class Inputs:
    """What a model draws from, a row for each name."""

    condition: Condition | None
    names: tuple[str, ...]
    """Of the rows; none of an unconditional model."""
    edit: Edit | None


def inputs_of(model: LatentDiffusion, asked: Asked, given: Given) -> Inputs:
    """Conditions, one for each row, and the edit.

    Raises:
        ContractError: what is asked for does not fit the model, or options do not fit each other.
    """
    wanted = fields_of(model.config.conditioning)
    from_file = {} if asked.condition is None else read_fields(asked.condition)
    missing = [field for field in wanted if field not in from_file]
    refuse_unfit(missing, asked, given, kind=kind_of(model))
    edit = edit_of(
        model, Given(guide=given.guide, guide_scale=given.guide_scale) if takes_image(missing) else given
    )
    if not wanted:
        return Inputs(None, (), edit)
    fields, names = dict[str, Any](from_file), tuple[str, ...]()
    if "class_label" in missing:
        labels = class_labels(asked.classes, model.classes)
        fields["class_label"], names = torch.tensor(labels), tuple(model.classes[label] for label in labels)
    if "caption" in missing and asked.prompt:
        fields["caption"], names = list(asked.prompt), tuple(asked.prompt)
    count = len(names) or max((len(value) for value in from_file.values()), default=1)
    fields |= {
        name: picture.repeat(count, 1, 1, 1) for name, picture in pictures(model, missing, given).items()
    }
    condition = model.condition(**fields)
    return Inputs(condition, names or tuple(map(str, range(count))), edit)


def kind_of(model: LatentDiffusion) -> str:
    """What a model is conditioned on, for messages."""
    return "unconditional" if model.config.conditioning is None else model.config.conditioning.kind


def takes_image(missing: Sequence[str]) -> bool:
    """Whether --image is the condition."""
    return "image" in missing or "low_res" in missing


def refuse_unfit(missing: Sequence[str], asked: Asked, given: Given, *, kind: str) -> None:
    """Refuse options that a model of this kind has no use for, and a condition that nobody gives.

    Raises:
        ContractError: naming the option.
    """
    options = {
        "--classes": asked.classes,
        "--prompt": asked.prompt,
        "--image": given.image,
        "--mask": given.mask,
    }
    for option, value in list(options.items())[:2]:
        if value is not None and option not in [SOURCES.get(field) for field in missing]:
            raise ContractError(
                f"{option} is not what this model ({kind}) is asked by; leave it out, see "
                "`ldm sample --help` for others"
            )
    for field in missing:
        option = SOURCES.get(field)
        if option is None or (options[option] is None and option != "--classes"):
            way = f"{option}, or " if option else ""
            raise ContractError(
                f"this model ({kind}) must be given {field}; name it with {way}--condition FILE "
                "(see ldm/conditions.py)"
            )
    if takes_image(missing) and given.strength is not None:
        raise ContractError(
            f"--strength is for a picture to change, and this model ({kind}) takes --image as its condition; "
            "leave --strength out"
        )


def class_labels(asked: Sequence[str] | None, known: Sequence[str]) -> list[int]:
    """Indices of classes given by name or number; all of them by default.

    Raises:
        ContractError: a class the model does not know, or too many to draw them all.
    """
    if asked is None:
        if len(known) > MAX_GRID_CLASSES:
            raise ContractError(
                f"a grid of all {len(known)} classes would be too large; name some with --classes"
            )
        return list(range(len(known)))
    labels = []
    for name in asked:
        if name in known:
            labels.append(list(known).index(name))
        elif name.isdigit() and int(name) < len(known):
            labels.append(int(name))
        else:
            raise ContractError(f"unknown class {name!r}; this model knows {', '.join(known)}")
    return labels


def pictures(model: LatentDiffusion, missing: Sequence[str], given: Given) -> dict[str, Tensor]:
    """Those fields of a condition that are pictures, (1, ...) each."""
    size, small = picture_size(model), model.config.latent_size
    found = {}
    if "image" in missing and given.image is not None:
        found["image"] = from_uint8(read_square(given.image, size)[None])
    if "mask" in missing and given.mask is not None:
        found["mask"] = mask_of(read_square(given.mask, size)[None])
    if "low_res" in missing and given.image is not None:
        found["low_res"] = from_uint8(read_square(given.image, small)[None])
    return found


def edit_of(model: LatentDiffusion, given: Given) -> Edit | None:
    """The edit that pictures ask for; None without any.

    Raises:
        ContractError: options that do not go together, or a picture that cannot be used.
    """
    for option, value, needed, needs in (
        ("--strength", given.strength, "--image", given.image),
        ("--mask", given.mask, "--image", given.image),
        ("--guide-scale", given.guide_scale, "--guide", given.guide),
    ):
        if value is not None and needs is None:
            raise ContractError(f"{option} needs {needed}, got {option} alone; give both or neither")
    if given.image is None and given.guide is None:
        return None
    size = picture_size(model)
    strength = STRENGTH if given.image and not given.mask and given.strength is None else given.strength
    return Edit(
        image=None if given.image is None else from_uint8(read_square(given.image, size)[None]),
        strength=strength,
        mask=None if given.mask is None else mask_of(read_square(given.mask, size)[None]),
        target=None
        if given.guide is None
        else from_uint8(read_square(given.guide, size, smaller=True)[None]),
        target_scale=1.0 if given.guide_scale is None else given.guide_scale,
    )


def picture_size(model: LatentDiffusion) -> int:
    """Side of the pictures that a model was trained on, in px."""
    return model.config.latent_size * model.autoencoder.config.factor


def read_square(file: Path, size_px: int, *, smaller: bool = False) -> np.ndarray:
    """The middle square of a picture, shrunk to a side, (size_px, size_px, 3) uint8.

    Args:
        file: the picture.
        size_px: the side.
        smaller: a picture that is smaller keeps its size.

    Raises:
        ContractError: the file cannot be read, or is no picture that can be used.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ContractError(f"{file} must be a readable picture ({error}); name another") from error
    whole = read_rgb(data)
    if smaller and not isinstance(whole, Outcome):
        size_px = min(size_px, *whole.shape[:2])
    made = curate(data, size_px=size_px, crop="centre")
    if isinstance(made, Outcome):
        raise ContractError(
            f"{file} must be a PNG, JPEG or WebP of at least {size_px} px a side, found: {made}; name another"
        )
    return decode_png(made)


def read_fields(file: Path) -> Mapping[str, Tensor]:
    """The fields of conditions in a safetensors file.

    Raises:
        ContractError: it is none.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ContractError(
            f"{file} must be a readable safetensors file of conditions ({error}); write one with "
            "safetensors.torch.save_file, its fields are listed in ldm/conditions.py"
        ) from error
