"""Editing by sampling: known latents kept (inpainting), and a start from a given picture (SDEdit).

B batch; latents are (B, C, h, w), masks (B or 1, 1, h, w) with 1 where latents are known.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.diffusion.times import Correction, NoiseSource, batch_of


def keep_known(known: Tensor, mask: Tensor, *, schedule: Schedule, noise: NoiseSource) -> Correction:
    """The correction mask q(x_t | known) + (1 - mask) x_t before each step, as in the published samplers.

    What comes out at the end is known up to the denoiser's error; `paste` makes it exact.

    Args:
        known: (B, C, h, w) scaled latents; only those under the mask matter.
        mask: (B or 1, 1, h, w), 1 where latents are known.
        schedule: the forward process.
        noise: standard normal noise by time step, apart from the sampler's.
    """

    def correct(x: Tensor, t: int) -> Tensor:
        return paste(x, schedule.add_noise(known, batch_of(t, x), noise(t)), mask)

    return correct


def paste(x: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """Mask known + (1 - mask) x: (B, C, h, w); exact where the mask is 0 or 1."""
    return torch.lerp(x, known, mask.expand_as(x))


def start_from(
    x_0: Tensor, eps: Tensor, times: Sequence[int], *, schedule: Schedule, strength: float
) -> tuple[Tensor, list[int]]:
    """Where a sampler starts to change a picture, not to invent one (SDEdit: Meng et al. 2022, alg. 1).

    Args:
        x_0: (B, C, h, w) scaled latents of the picture.
        eps: standard normal noise of its shape.
        times: the falling time steps of the whole way.
        schedule: the forward process.
        strength: share of the time steps to go, in (0, 1]; little keeps the picture, 1 keeps hardly anything.

    Returns:
        x_t (B, C, h, w), and the time steps that are left, the first of them t.

    Raises:
        ValueError: a strength outside (0, 1].
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength ({strength}) must be above 0 and at most 1; 0.5 goes half of the way")
    left = list(times)[-max(1, round(strength * len(times))) :]
    return schedule.add_noise(x_0, batch_of(left[0], x_0), eps), left
