"""How near reconstructions come to their originals: PSNR and SSIM of 8-bit pictures.

Shapes: B batch, C channels, H height, W width. All sums are taken in float64, on the device of the pictures.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

PEAK = 255.0  # of 8-bit pictures
WINDOW_PX = 11
WINDOW_DEVIATION_PX = 1.5
STABILITY = (0.01, 0.03)  # K1 and K2 of the paper


def check_pair(images: Tensor, originals: Tensor) -> None:
    """Refuse pictures that cannot be compared, with a ValueError."""
    if images.dtype != torch.uint8 or originals.dtype != torch.uint8:
        raise ValueError(
            f"pictures must be uint8 in 0..255, received {images.dtype} and {originals.dtype}; "
            f"round and clip them first"
        )
    if images.ndim != 4 or images.shape != originals.shape:
        raise ValueError(
            f"both batches must have one shape (B, C, H, W), received {tuple(images.shape)} and "
            f"{tuple(originals.shape)}; pair each picture with its original"
        )


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB: 10 log10(255^2 / mean squared error); (B,) float64.

    The error is the mean over channels and places of one picture; equal pictures have infinity.

    Args:
        images: reconstructions (B, C, H, W), uint8.
        originals: the pictures that they stand for, same shape, uint8.

    Raises:
        ValueError: the batches are not uint8 or differ in shape.
    """
    check_pair(images, originals)
    error = (images.double() - originals.double()).square().mean(dim=(1, 2, 3))  # (B,)
    return 10.0 * torch.log10(PEAK**2 / error)


def gaussian_window(size_px: int, deviation_px: float) -> Tensor:
    """Weights of a Gaussian window along one side, (size_px,) float64 with sum 1."""
    offsets = torch.arange(size_px, dtype=torch.float64) - (size_px - 1) / 2
    weights = torch.exp(-offsets.square() / (2 * deviation_px**2))
    return weights / weights.sum()


def local_mean(images: Tensor, window: Tensor) -> Tensor:
    """Weighted mean of each window that lies wholly inside: (B, C, H, W) to (B, C, H - s + 1, W - s + 1)."""
    channels = images.shape[1]
    kernel = window.to(images).expand(channels, 1, 1, -1)
    rows = F.conv2d(images, kernel, groups=channels)  # (B, C, H, W - s + 1)
    return F.conv2d(rows, kernel.transpose(2, 3), groups=channels)  # (B, C, H - s + 1, W - s + 1)


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity of each picture, at most 1, which only equal pictures reach; (B,) float64.

    Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity", equation 13,
    with the paper's 11x11 Gaussian window of deviation 1.5 px, K1 = 0.01 and K2 = 0.03, over the windows that
    lie wholly inside the picture. Differs: the paper scores luminance; here the channels are scored one by
    one and averaged, as most later work does for colour.

    Args:
        images: reconstructions (B, C, H, W), uint8, at least 11 px on a side.
        originals: the pictures that they stand for, same shape, uint8.

    Raises:
        ValueError: the batches are not uint8, differ in shape, or are smaller than the window.
    """
    check_pair(images, originals)
    if min(images.shape[2:]) < WINDOW_PX:
        raise ValueError(
            f"pictures must be at least {WINDOW_PX} px on a side (the window of SSIM), received "
            f"{images.shape[2]}x{images.shape[3]}; compare larger pictures"
        )
    window = gaussian_window(WINDOW_PX, WINDOW_DEVIATION_PX)
    x, y = images.double(), originals.double()
    mean_x, mean_y = local_mean(x, window), local_mean(y, window)
    variance_x = local_mean(x * x, window) - mean_x.square()
    variance_y = local_mean(y * y, window) - mean_y.square()
    covariance = local_mean(x * y, window) - mean_x * mean_y
    c1, c2 = ((k * PEAK) ** 2 for k in STABILITY)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def scores(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Mean over all pictures of `psnr_db` and `ssim`; how the pictures were cut into batches does not matter.

    Args:
        pairs: batches of reconstructions and originals, each (B, C, H, W), uint8.

    Raises:
        ValueError: there is no picture, or a batch cannot be compared.
    """
    found = [(psnr(images, originals), ssim(images, originals)) for images, originals in pairs]
    if not sum(len(ratio) for ratio, _ in found):
        raise ValueError("at least one pair of pictures is needed, received none; give non-empty batches")
    ratios, similarities = (torch.cat(values) for values in zip(*found, strict=True))
    return {"psnr_db": ratios.mean().item(), "ssim": similarities.mean().item()}
