"""What a sample is made of: pixels or a latent, and a JSON object about it; to a shard's members and back.

Legend: H W height and width in pixels; C h w channels, height and width of a latent.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from datasets.errors import CorruptionError
from datasets.keys import canonical_json
from datasets.shards import KEY, Sample

IMAGE_MEMBER = "png"
LATENT_MEMBER = "npy"
ABOUT_MEMBER = "json"

PNG_LEVEL = 6
BFLOAT16_BITS = np.dtype("<u2")
"""npy has no bfloat16: its bits are stored, the upper half of a float32's."""
LATENT_TYPES = (np.dtype("<f4"), np.dtype("<f2"), BFLOAT16_BITS)

_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(<f[24]|<u2)', 'fortran_order': False, "
    rb"'shape': \((\d{1,9}), (\d{1,9}), (\d{1,9})\), \} *\n",
    re.DOTALL,
)


def encode_png(image: np.ndarray) -> bytes:
    """Return an RGB picture as PNG, losslessly and without metadata.

    Args:
        image: uint8 (H, W, 3).

    Raises:
        ValueError: When the array has another type or shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"a picture must be uint8 (H, W, 3), got {image.dtype} {image.shape}; convert it first"
        )
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """Return the picture in a PNG as uint8 (H, W, 3).

    Raises:
        CorruptionError: When the bytes are no PNG that ``encode_png`` could have written.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            if picture.mode == "RGB":
                return np.array(picture)
            found = f"mode {picture.mode}"
    except (OSError, ValueError, SyntaxError) as error:
        found = str(error)
    raise CorruptionError(f"a picture must be stored as RGB PNG, got {found}; build its shard again")


def encode_image(key: str, image: np.ndarray, *, about: Mapping[str, Any]) -> Sample:
    """Return the sample of a picture.

    Args:
        key: The sample's key, a plain word.
        image: uint8 (H, W, 3).
        about: What is known of it, JSON values; ``class_label`` is the one that training reads.
    """
    return {KEY: key, IMAGE_MEMBER: encode_png(image), ABOUT_MEMBER: canonical_json(about)}


def decode_image(sample: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """Return picture, uint8 (H, W, 3), and what is known of it.

    Raises:
        CorruptionError: When a member is missing or cannot be decoded.
    """
    return decode_png(_member(sample, IMAGE_MEMBER)), _about(sample)


def to_bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Return the bits, uint16, of finite float32 values rounded to bfloat16: to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16_bits(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bfloat16 bits (uint16), exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode_latent(
    key: str, latent: np.ndarray, *, about: Mapping[str, Any], picture: bytes | None = None
) -> Sample:
    """Return the sample of a latent.

    Args:
        key: The sample's key, a plain word.
        latent: float32 or float16, or the bits of bfloat16 as uint16, (C, h, w), finite.
        about: What is known of it, JSON values; ``class_label`` is the one that training reads.
        picture: The picture it is the latent of, as ``encode_png`` gives it, to be kept beside it.

    Raises:
        ValueError: When the array has another type or shape, or holds NaN or infinity.
    """
    dtype = latent.dtype.newbyteorder("<")
    values = from_bfloat16_bits(latent) if dtype == BFLOAT16_BITS else latent
    if dtype not in LATENT_TYPES or latent.ndim != 3 or not np.isfinite(values).all():
        raise ValueError(
            "a latent must be finite float32 or float16, or bits of bfloat16, (C, h, w), "
            f"got {latent.dtype} {latent.shape}; look at what the encoder returned"
        )
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(latent, dtype), allow_pickle=False)
    sample = {KEY: key, LATENT_MEMBER: buffer.getvalue(), ABOUT_MEMBER: canonical_json(about)}
    return sample if picture is None else sample | {IMAGE_MEMBER: picture}


def decode_latent(sample: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """Return latent (C, h, w) of the type stored, and what is known of it; the latent is read-only.

    uint16 are the bits of bfloat16, see ``from_bfloat16_bits``.

    Raises:
        CorruptionError: When a member is missing or cannot be decoded.
    """
    data = _member(sample, LATENT_MEMBER)
    try:
        start = 10 + int.from_bytes(data[8:10], "little")
        dtype, shape = _npy_layout(data[:start])
        latent = np.frombuffer(data, dtype, offset=start).reshape(shape)
    except ValueError as error:
        raise CorruptionError(
            f"latent {sample[KEY]} must be a plain npy, a float (C, h, w) array ({error}); "
            "encode its shard again"
        ) from error
    return latent, _about(sample)


@lru_cache(maxsize=64)
def _npy_layout(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """Return type and shape of a latent from the head of its npy, as numpy writes it for such arrays."""
    found = _NPY_HEADER.fullmatch(header)
    if found is None:
        raise ValueError(f"its head is {header[:128]!r}")
    descr, *shape = found.groups()
    return np.dtype(descr.decode()), tuple(int(size) for size in shape)


def _about(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON object of a sample."""
    try:
        about = json.loads(_member(sample, ABOUT_MEMBER))
    except ValueError as error:
        raise CorruptionError(f"{sample[KEY]}.json must be JSON ({error}); build its shard again") from error
    if not isinstance(about, dict):
        raise CorruptionError(
            f"{sample[KEY]}.json must be an object, got {type(about).__name__}; build its shard again"
        )
    return about


def _member(sample: Mapping[str, Any], extension: str) -> bytes:
    if extension not in sample:
        have = sorted(member for member in sample if member != KEY)
        raise CorruptionError(
            f"sample {sample[KEY]} must have a member {extension!r}, has {have}; build its shard again"
        )
    return sample[extension]
