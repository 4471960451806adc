"""The variational bound as rate and distortion (Ho et al. 2020, Sec. 4.3; paper Fig. 2).

T time steps, B batch; x is (B, ...).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.objective import Denoiser
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.times import NoiseSource, batch_of


@dataclass(frozen=True)
class RateDistortion:
    """What is known of x_0 once x_t has been sent, for each time step gone through."""

    times: list[int]
    """Falling time steps t."""
    rate: Tensor
    """(len(times),) float64, rising: bits per dimension sent up to and with x_t."""
    distortion: Tensor
    """(len(times),) float64: root of the mean squared error of the x_0 that the denoiser makes of x_t."""


@torch.no_grad()
def rate_distortion(
    denoise: Denoiser,
    x_0: Tensor,
    *,
    schedule: Schedule,
    noise: NoiseSource,
    times: Sequence[int] | None = None,
) -> RateDistortion:
    """Rate and distortion, means over the batch; one evaluation of the denoiser per time step.

    Sending x_s to who knows x_t costs (SNR_s - SNR_t) / 2 |x_0 - estimate|^2 nats: the divergence between the
    posteriors given x_0 and given the denoiser's estimate of it (Kingma et al. 2021, eq. 13). The last rate
    is the bound without its reconstruction term, which latents, being continuous, do not have.

    Args:
        denoise: (x_t, t) -> eps.
        x_0: (B, ...) scaled latents.
        schedule: the forward process.
        noise: standard normal noise by time step.
        times: falling time steps; all T by default. Fewer bound a coarser model.

    Returns:
        One point per time step.
    """
    chosen = list(range(schedule.num_timesteps))[::-1] if times is None else list(times)
    squared = []
    for t in chosen:
        at_t = batch_of(t, x_0)
        x_t = schedule.add_noise(x_0, at_t, noise(t))
        estimate = schedule.x_0_of_eps(x_t, at_t, denoise(x_t, at_t))
        squared.append(float((estimate - x_0).double().square().mean()))
    sent = [prior_nats(x_0, schedule=schedule, t=chosen[0])]
    for (t, after), error in zip(pairwise(chosen), squared, strict=False):
        sent.append(0.5 * float(schedule.snr[after] - schedule.snr[t]) * error)
    rate = torch.tensor(sent, dtype=torch.float64).cumsum(0) / math.log(2)
    return RateDistortion(chosen, rate, torch.tensor(squared, dtype=torch.float64).sqrt())


def prior_nats(x_0: Tensor, *, schedule: Schedule, t: int) -> float:
    """KL(q(x_t | x_0) | N(0, I)) per dimension, mean over the batch: what sending x_t from nothing costs."""
    alpha_bar = float(schedule.alpha_bar[t])
    mean_square = float(x_0.double().square().mean())
    return 0.5 * (alpha_bar * mean_square - alpha_bar - math.log(1.0 - alpha_bar))
