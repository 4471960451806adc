"""DPM-Solver++(2M) in data prediction, and its stochastic form (Lu et al. 2022b, alg. 2 and App. B).

B batch; x is (B, ...); lambda is half the logarithm of the signal to noise ratio, h its increase in a step.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.objective import Denoiser
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.times import Correction, NoiseSource, OnStep, batch_of, walk


class Extrapolation:
    """The estimate of x_0 halfway through a step, from those of this time step and the one before."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.before: tuple[int, Tensor] | None = None

    def __call__(self, x_0: Tensor, t: int, after: int) -> Tensor:
        """x_0 + h / (2 h_before) (x_0 - x_0 before); x_0 itself in the first step."""
        half_log_snr, previous = self.schedule.half_log_snr, self.before
        self.before = (t, x_0)
        if previous is None:
            return x_0
        h, h_before = half_log_snr(after) - half_log_snr(t), half_log_snr(t) - half_log_snr(previous[0])
        return x_0 + h / (2 * h_before) * (x_0 - previous[1])


def predict_x_0(denoise: Denoiser, x: Tensor, *, schedule: Schedule, t: int) -> Tensor:
    """The denoiser's estimate of x_0, (B, ...)."""
    return (x - schedule.noise(t) * denoise(x, batch_of(t, x))) / schedule.signal(t)


def exponential_step(x: Tensor, x_0: Tensor, *, schedule: Schedule, t: int, after: int) -> Tensor:
    """X at `after` if x_0 stays as it is on the way: exact in the linear part (eq. 9 there)."""
    h = schedule.half_log_snr(after) - schedule.half_log_snr(t)
    return schedule.noise(after) / schedule.noise(t) * x - schedule.signal(after) * math.expm1(-h) * x_0


@torch.no_grad()
def sample_dpmpp_2m(
    denoise: Denoiser,
    x_T: Tensor,
    *,
    schedule: Schedule,
    times: Sequence[int],
    correct: Correction | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw x_0 with second order, one evaluation of the denoiser per time step.

    Differs: the last step is of second order too, because it ends at alpha_bar_0, not at infinite lambda.

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

    def step(x: Tensor, i: int, t: int, after: int) -> Tensor:
        del i
        x_0 = predict_x_0(denoise, x, schedule=schedule, t=t)
        return exponential_step(x, extrapolate(x_0, t, after), schedule=schedule, t=t, after=after)

    return walk(step, x_T, times, schedule=schedule, correct=correct, on_step=on_step)


@torch.no_grad()
def sample_dpmpp_2m_sde(
    denoise: Denoiser,
    x_T: Tensor,
    *,
    schedule: Schedule,
    times: Sequence[int],
    noise: NoiseSource,
    correct: Correction | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw x_0 along the reverse diffusion, not its flow: fresh noise and one evaluation per time step.

    x' = s'/s exp(-h) x + a' (1 - exp(-2h)) x_0 + s' sqrt(1 - exp(-2h)) z, with a signal, s noise, x_0
    extrapolated as in `sample_dpmpp_2m`.

    Args:
        denoise: (x_t, t) -> eps.
        x_T: (B, ...) at the noise level of the first time step.
        schedule: the forward process.
        times: falling time steps.
        noise: standard normal noise by step index.
        correct: changes x before each step.
        on_step: told after each step.

    Returns:
        x_0, shaped like x_T.
    """
    extrapolate = Extrapolation(schedule)

    def step(x: Tensor, i: int, t: int, after: int) -> Tensor:
        h = schedule.half_log_snr(after) - schedule.half_log_snr(t)
        x_0 = extrapolate(predict_x_0(denoise, x, schedule=schedule, t=t), t, after)
        fresh = -math.expm1(-2 * h)  # share of the noise variance that is drawn anew
        kept = schedule.noise(after) / schedule.noise(t) * math.exp(-h) * x
        return (
            kept + schedule.signal(after) * fresh * x_0 + schedule.noise(after) * math.sqrt(fresh) * noise(i)
        )

    return walk(step, x_T, times, schedule=schedule, correct=correct, on_step=on_step)
