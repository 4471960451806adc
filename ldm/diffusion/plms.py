"""PLMS, pseudo linear multi-step sampling (Liu et al. 2022, "Pseudo Numerical Methods", eq. 12, 13; alg. 2).

B batch; x is (B, ...).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.ddim import ddim_step
from ldm.diffusion.objective import Denoiser
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.times import Correction, OnStep, batch_of, walk

ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Weights of the newest noise, the one before it, and so on, by how many there are."""


@torch.no_grad()
def sample_plms(
    denoise: Denoiser,
    x_T: Tensor,
    *,
    schedule: Schedule,
    times: Sequence[int],
    correct: Correction | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw x_0; one evaluation of the denoiser per time step and one more in the first step.

    Each step is DDIM's with a noise extrapolated from the last four. Differs from the paper, as published:
    the first step is the pseudo improved Euler method, not three of pseudo Runge-Kutta.

    Args:
        denoise: (x_t, t) -> eps.
        x_T: (B, ...) at the noise level of the first time step.
        schedule: the forward process.
        times: falling time steps, evenly spaced, as the extrapolation assumes (`ddim_timesteps`).
        correct: changes x before each step.
        on_step: told after each step.

    Returns:
        x_0, shaped like x_T.
    """
    newest_first: list[Tensor] = []

    def step(x: Tensor, i: int, t: int, after: int) -> Tensor:
        newest_first.insert(0, denoise(x, batch_of(t, x)))
        del newest_first[4:]
        if i == 0:
            ahead, _ = ddim_step(x, newest_first[0], schedule=schedule, t=t, after=after)
            eps = (newest_first[0] + denoise(ahead, batch_of(after, x))) / 2
        else:
            weights = ADAMS_BASHFORTH[len(newest_first)]
            eps = sum(
                (weight * old for weight, old in zip(weights, newest_first, strict=True)),
                start=torch.zeros_like(x),
            )
        return ddim_step(x, eps, schedule=schedule, t=t, after=after)[0]

    return walk(step, x_T, times, schedule=schedule, correct=correct, on_step=on_step)
