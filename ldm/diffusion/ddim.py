"""DDIM sampling (Song et al. 2021, eq. 12): from noise to x_0 in a few of the T time steps.

B batch; x is (B, ...).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.objective import Denoiser
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.times import Correction, NoiseSource, OnStep, batch_of, walk


def ddim_sigma(alpha_bar: Tensor, before: Tensor, *, eta: float) -> Tensor:
    """Deviation of the noise drawn on the way from alpha_bar to the less noisy `before` (eq. 16 there)."""
    return eta * ((1 - before) / (1 - alpha_bar) * (1 - alpha_bar / before)).sqrt()


def ddim_step(
    x: Tensor, eps: Tensor, *, schedule: Schedule, t: int, after: int, eta: float = 0.0
) -> tuple[Tensor, float]:
    """X at the time step `after` without its fresh noise, and the deviation of that noise (eq. 12 there)."""
    alpha_bar, target = schedule.alpha_bar[t], schedule.alpha_bar[after]
    sigma = ddim_sigma(alpha_bar, target, eta=eta)
    x_0 = (x - float((1 - alpha_bar).sqrt()) * eps) / float(alpha_bar.sqrt())
    x = float(target.sqrt()) * x_0 + float((1 - target - sigma**2).clamp(min=0).sqrt()) * eps
    return x, float(sigma)


@torch.no_grad()
def sample_ddim(
    denoise: Denoiser,
    x_T: Tensor,
    *,
    schedule: Schedule,
    times: Sequence[int],
    eta: float = 0.0,
    noise: NoiseSource | None = None,
    correct: Correction | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw x_0, one evaluation of the denoiser per time step.

    Args:
        denoise: (x_t, t) -> eps.
        x_T: (B, ...) at the noise level of the first time step.
        schedule: the forward process.
        times: falling time steps (`ddim_timesteps`).
        eta: 0 is deterministic, 1 as noisy as ancestral sampling.
        noise: what eta > 0 draws from.
        correct: changes x before each step.
        on_step: told after each step.

    Returns:
        x_0, shaped like x_T.

    Raises:
        ValueError: eta > 0 without a source of noise, or time steps that do not fall.
    """
    if eta > 0 and noise is None:
        raise ValueError(f"eta ({eta}) > 0 draws noise at every step; give a noise source or eta=0")

    def step(x: Tensor, i: int, t: int, after: int) -> Tensor:
        # Differs: the last step lands on alpha_bar_0, as published, not on 1.
        eps = denoise(x, batch_of(t, x))
        x, sigma = ddim_step(x, eps, schedule=schedule, t=t, after=after, eta=eta)
        return x + sigma * noise(i) if noise is not None and eta > 0 else x

    return walk(step, x_T, times, schedule=schedule, correct=correct, on_step=on_step)
