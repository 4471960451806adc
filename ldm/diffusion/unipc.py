"""UniPC of order 2 in data prediction (Zhao et al. 2023, alg. 5 to 8): each step is corrected in hindsight.

B batch; x is (B, ...); lambda is half the logarithm of the signal to noise ratio, h its increase in a step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.dpm_solver import Extrapolation, exponential_step, predict_x_0
from ldm.diffusion.objective import Denoiser
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.times import Correction, OnStep, walk


@dataclass(frozen=True)
class Departure:
    """Where a step started: time step, x there, and the estimate of x_0 there."""

    t: int
    x: Tensor
    x_0: Tensor


def correct_in_hindsight(
    start: Departure, before: Departure | None, x_0: Tensor, *, schedule: Schedule, t: int
) -> Tensor:
    """X at t again, now that x_0 is known there, at the start of the step, and at the step before (eq. 5).

    Args:
        start: where the step to t started.
        before: where the step before it started; None corrects with first order.
        x_0: the estimate at t, (B, ...).
        schedule: the forward process.
        t: the time step arrived at.
    """
    half_log_snr = schedule.half_log_snr
    h = half_log_snr(t) - half_log_snr(start.t)
    phi_1 = math.expm1(-h)
    x = exponential_step(start.x, start.x_0, schedule=schedule, t=start.t, after=t)
    if before is None:
        return x - schedule.signal(t) * phi_1 / 2 * (x_0 - start.x_0)
    phi_2 = -phi_1 / h - 1
    phi_3 = -phi_2 / h - 1 / 2
    ratio = (half_log_snr(before.t) - half_log_snr(start.t)) / h
    of_before = (phi_2 - 2 * phi_3) / (1 - ratio)
    change = of_before / ratio * (before.x_0 - start.x_0) + (phi_2 - of_before) * (x_0 - start.x_0)
    return x - schedule.signal(t) * change


@torch.no_grad()
def sample_unipc(
    denoise: Denoiser,
    x_T: Tensor,
    *,
    schedule: Schedule,
    times: Sequence[int],
    correct: Correction | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw x_0; one evaluation of the denoiser per time step serves corrector and predictor.

    The predictor is DPM-Solver++(2M)'s step. As in the paper the last step is not corrected, which would
    cost one evaluation more.

    Args:
        denoise: (x_t, t) -> eps.
        x_T: (B, ...) at the noise level of the first time step.
        schedule: the forward process.
        times: falling time steps.
        correct: changes x before each step.
        on_step: told after each step.

    Returns:
        x_0, shaped like x_T.
    """
    extrapolate = Extrapolation(schedule)
    newest_first: list[Departure] = []

    def step(x: Tensor, i: int, t: int, after: int) -> Tensor:
        del i
        x_0 = predict_x_0(denoise, x, schedule=schedule, t=t)
        if newest_first:
            before = newest_first[1] if len(newest_first) > 1 else None
            x = correct_in_hindsight(newest_first[0], before, x_0, schedule=schedule, t=t)
        newest_first.insert(0, Departure(t, x, x_0))
        del newest_first[2:]
        return exponential_step(x, extrapolate(x_0, t, after), schedule=schedule, t=t, after=after)

    return walk(step, x_T, times, schedule=schedule, correct=correct, on_step=on_step)
