"""Ancestral sampling (Ho et al. 2020, alg. 2): every time step of a contiguous tail, the last one included.

B batch; x is (B, ...).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.objective import Denoiser
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.times import Correction, NoiseSource, OnStep, batch_of, walk


def posterior_mean(x_0: Tensor, x_t: Tensor, *, schedule: Schedule, t: int) -> Tensor:
    """Mean (B, ...) of q(x_{t-1} | x_t, x_0) (eq. 7 there)."""
    of_x_0, of_x_t = schedule.posterior_coefficients
    return float(of_x_0[t]) * x_0 + float(of_x_t[t]) * x_t


@torch.no_grad()
def sample_ddpm(
    denoise: Denoiser,
    x_T: Tensor,
    *,
    schedule: Schedule,
    times: Sequence[int],
    noise: NoiseSource,
    correct: Correction | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw x_0, one evaluation of the denoiser per time step.

    The variance is the posterior's, as in the published models. The last step adds no noise.

    Args:
        denoise: (x_t, t) -> eps.
        x_T: (B, ...) at the noise level of the first time step.
        schedule: the forward process.
        times: t, t - 1, ..., 0 (`ancestral_timesteps`).
        noise: standard normal noise by step index.
        correct: changes x before each step.
        on_step: told after each step.

    Returns:
        x_0, shaped like x_T.

    Raises:
        ValueError: a time step is left out.
    """
    if any(t - after != 1 for t, after in pairwise([*times, -1])):
        raise ValueError(
            f"ancestral sampling takes every time step down to 0, got {list(times)}; use all of them, or "
            "DDIM with eta=1, which may leave some out"
        )
    deviation = schedule.posterior_variance.sqrt()

    def step(x: Tensor, i: int, t: int, after: int) -> Tensor:
        eps = denoise(x, batch_of(t, x))
        x_0 = (x - schedule.noise(t) * eps) / schedule.signal(t)
        mean = posterior_mean(x_0, x, schedule=schedule, t=t)
        return mean if after < 0 else mean + float(deviation[t]) * noise(i)

    return walk(step, x_T, times, schedule=schedule, correct=correct, on_step=on_step, end=-1)
