"""Layouts as tokens: 30 objects of three tokens each, and two tokens for the crop (paper Sec. 4.3.2, D.3).

An object is its class, its top left and its bottom right corner. A corner is one token: its place on a grid
of G x G points over the picture, G = floor(sqrt(vocabulary)). The last token of the vocabulary marks what is
empty.

The tokens are those of taming-transformers' builder, with which the published layout model was trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from datasets.errors import ConfigError

VOCABULARY = 8192
MAX_OBJECTS = 30
TOKENS_PER_OBJECT, CROP_TOKENS = 3, 2
NUM_TOKENS = MAX_OBJECTS * TOKENS_PER_OBJECT + CROP_TOKENS


class Box(NamedTuple):
    """A rectangle in shares of the whole picture's width and height, from the top left corner."""

    x: float
    y: float
    width: float
    height: float


WHOLE = Box(0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class LayoutObject:
    """A thing in a picture.

    Attributes:
        label: Its class, 0 to num_classes - 1.
        box: Where it is.
        is_group: Whether the box holds several.
        is_occluded: Whether something hides a part of it.
        is_depiction: Whether it is a picture of the thing.
        is_inside: Whether it is seen from inside.
    """

    label: int
    box: Box
    is_group: bool = False
    is_occluded: bool = False
    is_depiction: bool = False
    is_inside: bool = False


def layout_tokens(
    objects: Sequence[LayoutObject],
    *,
    crop: Box = WHOLE,
    mirror: bool = False,
    flags_of: int | None = None,
    vocabulary: int = VOCABULARY,
    max_objects: int = MAX_OBJECTS,
    shuffle: np.random.Generator | None = None,
) -> np.ndarray:
    """Return the tokens of a layout, int64 (3 * max_objects + 2,): objects, empty slots, the crop's corners.

    Objects that lie wholly outside the crop are left out, and those past ``max_objects``. Boxes stay where
    they are in the whole picture: the crop's corners say which part of it is shown.

    Args:
        objects: Things in the picture.
        crop: The part of the picture that is shown.
        mirror: Whether the picture is shown mirrored left to right; then boxes and crop are, too.
        flags_of: The number of classes, to add the flags of an object to its class token (group 1,
            occluded 2, depiction 4, inside 8, times the number of classes); ``None`` leaves flags out.
        vocabulary: Number of tokens.
        max_objects: Slots for objects.
        shuffle: Draws the order of the objects, as in training; ``None`` keeps the order given.

    Raises:
        ConfigError: A class token outside the vocabulary, or a box outside the picture.
    """
    kept = [one for one in objects if _overlap(one.box, crop)]
    if shuffle is not None:
        kept = [kept[i] for i in shuffle.permutation(len(kept))]
    tokens = []
    for one in kept[:max_objects]:
        box = _mirrored(one.box) if mirror else one.box
        tokens += [_class_token(one, flags_of, vocabulary), *_corners(box, vocabulary)]
    tokens += [vocabulary - 1] * (TOKENS_PER_OBJECT * max_objects - len(tokens))
    return np.array([*tokens, *_corners(_mirrored(crop) if mirror else crop, vocabulary)], np.int64)


def empty_layout(num_tokens: int = NUM_TOKENS, *, vocabulary: int = VOCABULARY) -> np.ndarray:
    """Return the tokens that ask for nothing, int64 (num_tokens,): every slot empty, and no crop either.

    Differs: published layout models have no null condition. A picture without objects is another thing: its
    crop is known.
    """
    return np.full(num_tokens, vocabulary - 1, np.int64)


def _class_token(one: LayoutObject, flags_of: int | None, vocabulary: int) -> int:
    """Return the token of an object's class, with its flags when asked."""
    flags = one.is_group + 2 * one.is_occluded + 4 * one.is_depiction + 8 * one.is_inside
    token = one.label + (flags_of or 0) * flags
    limit = vocabulary - 1 if flags_of is None else flags_of
    if not 0 <= one.label < limit or token >= vocabulary - 1:
        raise ConfigError(
            f"a class must lie in 0..{limit - 1} and its token below {vocabulary - 1}, got class {one.label} "
            f"and token {token}; use fewer classes (with flags at most {(vocabulary - 1) // 16}) "
            "or a larger vocabulary"
        )
    return token


def _corners(box: Box, vocabulary: int) -> tuple[int, int]:
    """Return the tokens of a box's top left and bottom right corner."""
    side = math.isqrt(vocabulary)
    tokens = []
    for x, y in ((box.x, box.y), (box.x + box.width, box.y + box.height)):
        column, row = round(x * (side - 1)), round(y * (side - 1))
        if not (0 <= column < side and 0 <= row < side):
            raise ConfigError(
                f"a box must lie inside the picture, in shares of its sides from 0 to 1, got {tuple(box)}; "
                "clip it first"
            )
        tokens.append(row * side + column)
    return tokens[0], tokens[1]


def _mirrored(box: Box) -> Box:
    """Return a box where it is after the picture was mirrored left to right."""
    return box._replace(x=1.0 - (box.x + box.width))


def _overlap(a: Box, b: Box) -> bool:
    """Return whether two boxes share an area."""
    return min(a.x + a.width, b.x + b.width) > max(a.x, b.x) and min(a.y + a.height, b.y + b.height) > max(
        a.y, b.y
    )
