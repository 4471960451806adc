"""GroupNorm whose statistics stay exact on large maps, whole or put together from parts of a map.

B batch, C channels, h w height and width of a map, G groups, P parts.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

MAX_POSITIONS = 2**16
"""Positions of a map, 256x256, up to which PyTorch's own GroupNorm is used."""


class Affine(NamedTuple):
    """A GroupNorm with its statistics known: x * scale + shift, each (B, C, 1, 1)."""

    scale: Tensor
    shift: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The map normalised."""
        return (x * self.scale).add_(self.shift)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel: (B, C, h, w) -> two of (B, C) float64."""
    variance, mean = torch.var_mean(x, dim=(2, 3), correction=0)
    return mean.double(), variance.double()


def affine_of(norm: nn.GroupNorm, mean: Tensor, variance: Tensor, share: Tensor) -> Affine:
    """A GroupNorm with the statistics of the map that has these parts.

    The variance of a group is the mean of the variances in it, plus the mean of their means' squared
    distances from its mean.

    Args:
        norm: the layer.
        mean: (P, B, C) float64 means of the parts.
        variance: the same of the variances.
        share: (P,) share of the map's positions that a part has; sum 1.
    """
    share = share.to(mean)[:, None, None]
    size = norm.num_channels // norm.num_groups

    def over_group(of_parts: Tensor) -> Tensor:
        each = of_parts.sum(0).unflatten(1, (norm.num_groups, size)).mean(2)  # (B, G)
        return each.repeat_interleave(size, 1)  # (B, C)

    centre = over_group(share * mean)
    spread = over_group(share * (variance + (mean - centre).square()))
    scale = norm.weight.double() / (spread + norm.eps).sqrt()
    shift = norm.bias.double() - centre * scale
    return Affine(*(a.to(norm.weight.dtype)[:, :, None, None] for a in (scale, shift)))


class GroupNorm(nn.GroupNorm):
    """GroupNorm that stays exact on large maps: (B, C, h, w) -> (B, C, h, w).

    Differs: PyTorch's channels-last kernel for the CPU sums in float32, which at 1024x1024 leaves errors of
    5e-4 of a deviation in each layer. Maps of more than 256x256 take their statistics in float64 instead.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The map normalised per sample and group."""
        if input.shape[2] * input.shape[3] <= MAX_POSITIONS:
            return super().forward(input)
        input = input.float()
        mean, variance = moments(input)
        return affine_of(self, mean[None], variance[None], torch.ones(1))(input)
