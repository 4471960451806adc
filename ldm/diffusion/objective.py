"""The training objective: what the network predicts of a noisy latent (paper eq. 2, 3; Salimans & Ho 2022).

B batch, C channels, h w height and width of the latent.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule

Objective = Literal["eps", "v"]
"""`eps`: the noise, as in the paper. `v`: noise and signal mixed, well posed where noise is all."""

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t) -> eps: what samplers know of a network; conditions are bound before."""


def prediction_loss(
    predict: Denoiser, x_0: Tensor, t: Tensor, eps: Tensor, *, schedule: Schedule, objective: Objective
) -> Tensor:
    """Mean squared error of the prediction, per sample.

    Args:
        predict: (x_t, t) -> eps or v, as the objective says.
        x_0: (B, C, h, w) scaled latents.
        t: (B,) int64 time steps in [0, T).
        eps: (B, C, h, w) standard normal noise.
        schedule: the forward process.
        objective: what is predicted.

    Returns:
        (B,) losses.
    """
    target = eps if objective == "eps" else schedule.velocity(x_0, t, eps)
    return (predict(schedule.add_noise(x_0, t, eps), t) - target).square().flatten(1).mean(1)


def eps_of_prediction(
    prediction: Tensor, x_t: Tensor, t: Tensor, *, schedule: Schedule, objective: Objective
) -> Tensor:
    """The eps that a network's output means, which is what samplers take; all (B, C, h, w)."""
    return prediction if objective == "eps" else schedule.eps_of_velocity(x_t, t, prediction)


def draw_timesteps(batch: int, num_timesteps: int, generator: torch.Generator) -> Tensor:
    """Uniform time steps, (batch,) int64 in [0, num_timesteps)."""
    return torch.randint(num_timesteps, (batch,), generator=generator)
