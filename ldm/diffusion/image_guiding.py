"""What image guiding asks for: log p(y | x_0) of a picture y, up to a constant (paper App. C, D.6).

B batch, H W height and width of the picture; latents are (B, C, h, w), pictures (B, 3, H, W) in [-1, 1].
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Decode = Callable[[Tensor], Tensor]
"""Scaled latents -> pictures, differentiable: a VQ first stage must pass the gradient by its codebook."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""(pictures, targets) -> (B,), differentiable in the first."""


def squared_distance(pictures: Tensor, target: Tensor) -> Tensor:
    """Sum of squared differences, (B,): the target as it is."""
    return (pictures - target).square().flatten(1).sum(1)


def low_resolution_distance(pictures: Tensor, target: Tensor) -> Tensor:
    """`squared_distance` of the pictures brought to the target's size: (B, 3, H, W), (B, 3, H', W') -> (B,).

    The paper halves with bicubic interpolation, so that a sample of 256 px steers one of 512.
    """
    small = F.interpolate(
        pictures, size=target.shape[-2:], mode="bicubic", align_corners=False, antialias=True
    )
    return squared_distance(small, target)


def near_target(decode: Decode, target: Tensor, *, distance: Distance) -> Callable[[Tensor], Tensor]:
    """The function latents -> -1/2 distance(decode(latents), target), (B,), for `guide_by_target`.

    Args:
        decode: scaled latents -> pictures.
        target: what the distance compares with, one for all or one per sample.
        distance: `squared_distance`, `low_resolution_distance`, or a learned one such as LPIPS.
    """
    return lambda x_0: -0.5 * distance(decode(x_0), target)
