"""One downloaded picture in, one square RGB picture or one typed refusal out.

Legend: a picture is PNG bytes of 8-bit RGB, ``size_px`` square, sRGB, without metadata.

Nothing is decoded before its header has passed: format, pixel count and number of frames.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from enum import StrEnum
from typing import Literal, TypeVar

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from datasets.samples import encode_png

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64_000_000
MAX_BYTES = 64 * 2**20
HEAD_BYTES = 16  # enough to tell a file's format

_T = TypeVar("_T")
_OTHER_FORMATS = (
    b"GIF8",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\0\0\1\0",
    b"\0\0\0\x0cJXL ",
    b"\xff\x0a",
    b"8BPS",
    b"\0\0\0\x0cjP  ",
)
_OUR_FORMATS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


class Outcome(StrEnum):
    """How a row of a list ended; every row ends in exactly one."""

    SUCCESS = "success"
    # refused before it was asked for
    REFUSED_SCHEME = "refused_scheme"
    REFUSED_ADDRESS = "refused_address"
    UNRESOLVED_HOST = "unresolved_host"
    # asked for, and not got
    NOT_FOUND = "not_found"
    HTTP_ERROR = "http_error"
    TIMEOUT = "timeout"
    CONNECTION_ERROR = "connection_error"
    OPTED_OUT = "opted_out"
    UNREADABLE = "unreadable"
    # got, and refused
    HASH_MISMATCH = "hash_mismatch"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_FORMAT = "unsupported_format"
    TRUNCATED = "truncated"
    DAMAGED = "damaged"
    ANIMATED = "animated"
    TOO_LARGE = "too_large"
    TOO_SMALL = "too_small"
    NOT_SQUARE = "not_square"


def curate(data: bytes, *, size_px: int, crop: Literal["none", "centre"]) -> bytes | Outcome:
    """Return the picture in a file's bytes, or why there is none.

    Rotation recorded by the camera is applied, colours become sRGB, transparency is laid on white and 16-bit
    values are scaled. Equal bytes give equal pictures.

    Args:
        data: The file: PNG, JPEG or WebP.
        size_px: Side of the result. Smaller pictures are refused, never enlarged.
        crop: ``centre`` keeps the largest square in the middle; ``none`` refuses what is not square.
    """
    return _guarded(data, lambda image: _curated(image, size_px=size_px, crop=crop))


def read_rgb(data: bytes) -> np.ndarray | Outcome:
    """Return the picture in a file's bytes at its own size, uint8 (H, W, 3), or why there is none.

    The rules are those of ``curate``, but for the square and its size.
    """

    def read(image: Image.Image) -> np.ndarray | Outcome:
        refusal = _header_refusal(image, size_px=1, crop="centre")
        return refusal if refusal is not None else np.array(_upright(image))

    return _guarded(data, read)


def _guarded(data: bytes, read: Callable[[Image.Image], _T | Outcome]) -> _T | Outcome:
    """Return what reading a file's image gives, or the refusal that what Pillow raises stands for."""
    if len(data) > MAX_BYTES:
        return Outcome.TOO_LARGE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # damaged metadata warns, and so do many pixels, which are counted below
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return read(image)
    except Image.DecompressionBombError:
        return Outcome.TOO_LARGE
    except UnidentifiedImageError:
        return _unidentified(data)
    except (OSError, EOFError) as error:
        is_cut = "runcated" in str(error) or isinstance(error, EOFError) or _is_cut_webp(data)
        return Outcome.TRUNCATED if is_cut else Outcome.DAMAGED
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError, ZeroDivisionError):
        return Outcome.DAMAGED  # what Pillow's readers raise on bytes that contradict each other


def _curated(image: Image.Image, *, size_px: int, crop: Literal["none", "centre"]) -> bytes | Outcome:
    """Return the picture or a refusal; raise what Pillow raises."""
    refusal = _header_refusal(image, size_px=size_px, crop=crop)
    if refusal is not None:
        return refusal
    square = _square(_upright(image), size_px)
    return encode_png(np.asarray(square))  # of the pixels alone: profiles and other metadata stay behind


def _upright(image: Image.Image) -> Image.Image:
    """Return a picture as people see it, 8-bit sRGB; raise what Pillow raises."""
    image.load()
    return _rgb(ImageOps.exif_transpose(image))


def _header_refusal(image: Image.Image, *, size_px: int, crop: Literal["none", "centre"]) -> Outcome | None:
    """Return why a picture is refused by its header alone, or None."""
    if image.width * image.height > MAX_PIXELS:
        return Outcome.TOO_LARGE
    if min(image.size) < size_px:
        return Outcome.TOO_SMALL
    if crop == "none" and image.width != image.height:
        return Outcome.NOT_SQUARE
    if image.format in {"PNG", "WEBP"} and getattr(image, "n_frames", 1) > 1:
        return Outcome.ANIMATED  # a JPEG with more frames is a photograph with its previews
    return None


def _rgb(image: Image.Image) -> Image.Image:
    """Return a picture as 8-bit sRGB, transparency laid on white."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        return _from_16_bit(image).convert("RGB")
    if image.mode == "RGB" and not profile and "transparency" not in image.info:
        return image
    if image.mode in {"1", "P", "LA", "La", "RGBa"} or "transparency" in image.info:
        image = image.convert("RGBA")
    alpha = image.getchannel("A") if "A" in image.getbands() else None
    colours = image.convert("RGB") if alpha is not None else image
    colours = _to_srgb(colours, profile) if profile else colours.convert("RGB")
    if alpha is None:
        return colours
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(colours, mask=alpha)
    return canvas


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Return a 16-bit grey picture as 8-bit grey: 65535 becomes 255."""
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Return a picture with its colour profile applied; a profile that cannot be used is left out."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        converted = None
    return converted if converted is not None else image.convert("RGB")


def _square(image: Image.Image, size_px: int) -> Image.Image:
    """Return the centre square of a picture at the asked size, by antialiased bicubic filtering."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    square = (
        image if image.size == (side, side) else image.crop(box)
    )  # first: resize would look beyond its box
    if side == size_px:
        return square
    return square.resize((size_px, size_px), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _is_cut_webp(data: bytes) -> bool:
    """Return whether bytes are a WebP that is shorter than it says."""
    return data[8:12] == b"WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little")


def _unidentified(data: bytes) -> Outcome:
    """Return why bytes that Pillow cannot open as one of our formats are refused."""
    head = data[:HEAD_BYTES]
    if head.startswith(_OUR_FORMATS) or (head.startswith(b"RIFF") and head[8:12] == b"WEBP"):
        return Outcome.TRUNCATED
    is_other = head.startswith(_OTHER_FORMATS) or head[4:8] == b"ftyp"
    return Outcome.UNSUPPORTED_FORMAT if is_other else Outcome.NOT_AN_IMAGE
