"""Euler and Heun along rectified flow (Liu et al. 2023, eq. 1; Heun as in Karras et al. 2022, alg. 1).

B batch; x is (B, ...). Any schedule is rectified flow in other coordinates: with signal a and noise s_,
y = x / (a + s_) is (1 - s) x_0 + s eps at s = s_ / (a + s_), and moves with the velocity dy/ds = eps - x_0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.objective import Denoiser
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.times import Correction, OnStep, batch_of, walk


def flow_time(schedule: Schedule, t: int) -> float:
    """S in (0, 1): the share of noise at the time step t."""
    return schedule.noise(t) / scale_of(schedule, t)


def scale_of(schedule: Schedule, t: int) -> float:
    """X / y at the time step t."""
    return schedule.signal(t) + schedule.noise(t)


def flow_velocity(denoise: Denoiser, x: Tensor, *, schedule: Schedule, t: int) -> Tensor:
    """Eps - x_0, (B, ...), of x at the time step t."""
    eps = denoise(x, batch_of(t, x))
    return eps - (x - schedule.noise(t) * eps) / schedule.signal(t)


def move(x: Tensor, velocity: Tensor, *, schedule: Schedule, t: int, after: int) -> Tensor:
    """X at `after` if the velocity stays as it is on the way."""
    y = x / scale_of(schedule, t) + (flow_time(schedule, after) - flow_time(schedule, t)) * velocity
    return y * scale_of(schedule, after)


@torch.no_grad()
def sample_euler(
    denoise: Denoiser,
    x_T: Tensor,
    *,
    schedule: Schedule,
    times: Sequence[int],
    correct: Correction | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw x_0 with first order, one evaluation of the denoiser per time step.

    In exact arithmetic this is DDIM with eta 0.

    Args:
        denoise: (x_t, t) -> eps.
        x_T: (B, ...) at the noise level of the first time step.
        schedule: the forward process.
        times: falling time steps (`even_timesteps`).
        correct: changes x before each step.
        on_step: told after each step.

    Returns:
        x_0, shaped like x_T.
    """

    def step(x: Tensor, i: int, t: int, after: int) -> Tensor:
        del i
        velocity = flow_velocity(denoise, x, schedule=schedule, t=t)
        return move(x, velocity, schedule=schedule, t=t, after=after)

    return walk(step, x_T, times, schedule=schedule, correct=correct, on_step=on_step)


@torch.no_grad()
def sample_heun(
    denoise: Denoiser,
    x_T: Tensor,
    *,
    schedule: Schedule,
    times: Sequence[int],
    correct: Correction | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw x_0 with second order: the mean velocity of both ends, two evaluations per time step.

    Args:
        denoise: (x_t, t) -> eps.
        x_T: (B, ...) at the noise level of the first time step.
        schedule: the forward process.
        times: falling time steps (`even_timesteps`).
        correct: changes x before each step.
        on_step: told after each step.

    Returns:
        x_0, shaped like x_T.
    """

    def step(x: Tensor, i: int, t: int, after: int) -> Tensor:
        del i
        here = flow_velocity(denoise, x, schedule=schedule, t=t)
        there = flow_velocity(
            denoise, move(x, here, schedule=schedule, t=t, after=after), schedule=schedule, t=after
        )
        return move(x, (here + there) / 2, schedule=schedule, t=t, after=after)

    return walk(step, x_T, times, schedule=schedule, correct=correct, on_step=on_step)
