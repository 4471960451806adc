"""The training objective L = E || eps - eps_theta(x_t, t, y) ||^2 (paper eq. 2, 3).

B batch, C channels, h w height and width of the latent.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t) -> eps: what samplers and objectives know of a network; conditions are bound before."""


def eps_loss(denoise: Denoiser, x_0: Tensor, t: Tensor, eps: Tensor, *, schedule: Schedule) -> Tensor:
    """Mean squared error of the predicted noise, per sample.

    Args:
        denoise: (x_t, t) -> eps.
        x_0: (B, C, h, w) scaled latents.
        t: (B,) int64 time steps in [0, T).
        eps: (B, C, h, w) standard normal noise.
        schedule: the forward process.

    Returns:
        (B,) losses.
    """
    x_t = schedule.add_noise(x_0, t, eps)
    return (denoise(x_t, t) - eps).square().flatten(1).mean(1)


def draw_timesteps(batch: int, num_timesteps: int, generator: torch.Generator) -> Tensor:
    """Uniform time steps, (batch,) int64 in [0, num_timesteps)."""
    return torch.randint(num_timesteps, (batch,), generator=generator)
