"""Single pictures through a first stage and back: how near they come, and a sheet that shows it.

Pictures are (H, W, 3) uint8, H height and W width, each of its own size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ldm.config import require_divisible
from ldm.device import home
from ldm.errors import ContractError
from ldm.evaluation.reconstruction import psnr, ssim
from ldm.evaluation.sets import nchw
from ldm.model import Autoencoder
from ldm.models.lpips import LPIPS
from ldm.pictures import grid, side_by_side
from ldm.range import from_uint8, to_uint8

MIN_SIDE_PX = 16
"""The smallest side that LPIPS takes."""
SMALL_PX = 128
MAX_SMALL, MAX_LARGE = 48, 6
"""Pictures on a sheet of small ones (up to 128 px, all of one size) and of others."""
GAIN = 4


@dataclass(frozen=True)
class RoundTrip:
    """One picture and what came back."""

    original: np.ndarray
    decoded: np.ndarray
    scores: dict[str, float]
    """`psnr_db`, `ssim` and `lpips`."""


def fitting(picture: np.ndarray, factor: int, *, name: str, crop: bool) -> np.ndarray:
    """A picture that a first stage of this factor takes: as it is, or with `crop` its middle.

    Raises:
        ContractError: f does not divide a side, or what is left is too small to be scored.
    """
    if crop:
        height, width = (side // factor * factor for side in picture.shape[:2])
        top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
        picture = picture[top : top + height, left : left + width]
    for side, size in zip(("height", "width"), picture.shape[:2], strict=True):
        why = "f of this first stage; --crop takes the middle"
        require_divisible(f"the {side} of {name}", size, factor, why, error=ContractError)
    if min(picture.shape[:2]) < MIN_SIDE_PX:
        height, width = picture.shape[:2]
        raise ContractError(
            f"a picture must be at least {MIN_SIDE_PX} px on a side for LPIPS, {name} has {width}x{height}; "
            "leave it out"
        )
    return picture


@torch.no_grad()
def round_trip(
    model: Autoencoder, picture: np.ndarray, lpips: LPIPS, *, memory_gib: float | None = None
) -> RoundTrip:
    """A picture through the first stage and back, with its scores.

    Args:
        model: the first stage.
        picture: see `fitting`.
        lpips: the perceptual distance, on the device of the first stage.
        memory_gib: memory of encoding and decoding, see `Autoencoder`.

    Raises:
        ContractError: the picture does not fit the first stage, or the budget is too small.
    """
    device = home(lpips)
    x = from_uint8(picture[None], device=device)
    decoded = to_uint8(model.decode(model.encode(x, memory_gib=memory_gib), memory_gib=memory_gib))
    pair = nchw(decoded), nchw(picture[None])
    scores = {
        "psnr_db": psnr(*pair).item(),
        "ssim": ssim(*pair).item(),
        "lpips": lpips(from_uint8(decoded, device=device), x).item(),
    }
    return RoundTrip(picture, decoded[0], scores)


def sheet(trips: Sequence[RoundTrip]) -> Image.Image:
    """Originals beside what came back: small ones of one size in pairs, others with the difference."""
    first = trips[0].original
    if max(first.shape) <= SMALL_PX and all(trip.original.shape == first.shape for trip in trips):
        originals, decoded = zip(*((trip.original, trip.decoded) for trip in trips[:MAX_SMALL]), strict=True)
        scale = max(1, SMALL_PX // max(first.shape))
        return side_by_side(
            np.stack(originals), np.stack(decoded), columns=min(12, len(originals)), scale=scale
        )
    shown = trips[:MAX_LARGE]
    height, width = (max(trip.original.shape[side] for trip in shown) for side in (0, 1))
    cells = [
        on_white(picture, height, width)
        for trip in shown
        for picture in (trip.original, trip.decoded, difference(trip))
    ]
    return grid(np.stack(cells), columns=3, title=f"original, decoded, difference x{GAIN}")


def difference(trip: RoundTrip) -> np.ndarray:
    """Absolute difference of original and decoded picture, made visible."""
    levels = np.abs(trip.original.astype(np.int16) - trip.decoded.astype(np.int16))
    return (GAIN * levels).clip(0, 255).astype(np.uint8)


def on_white(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture at the upper left of a white one of this size."""
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    canvas[: picture.shape[0], : picture.shape[1]] = picture
    return canvas
