"""The training objective: what the network predicts of a noisy latent (paper eq. 2, 3; Salimans & Ho 2022).

B batch, C channels, h w height and width of the latent, T time steps.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule

Objective = Literal["eps", "v", "x0", "flow"]
"""`eps`: the noise, as in the paper. `v`: noise and signal mixed, well posed where noise is all. `x0`: the
latent. `flow`: eps - x_0, the velocity of rectified flow (Liu et al. 2023, eq. 1)."""

Distance = Literal["l2", "l1"]
"""Squared or absolute error; the published configs use both."""

Weighting = Literal["simple", "min_snr"]
"""`simple`: every time step counts the same. `min_snr`: Hang et al. 2023."""

MIN_SNR_GAMMA = 5.0

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t) -> eps: what samplers know of a network; conditions are bound before."""


def prediction_loss(
    predict: Denoiser,
    x_0: Tensor,
    t: Tensor,
    eps: Tensor,
    *,
    schedule: Schedule,
    objective: Objective,
    distance: Distance = "l2",
) -> Tensor:
    """Mean error of the prediction, per sample.

    Args:
        predict: (x_t, t) -> what the objective says.
        x_0: (B, C, h, w) scaled latents.
        t: (B,) int64 time steps in [0, T).
        eps: (B, C, h, w) standard normal noise.
        schedule: the forward process.
        objective: what is predicted.
        distance: squared or absolute error.

    Returns:
        (B,) losses.
    """
    target = target_of(x_0, t, eps, schedule=schedule, objective=objective)
    error = predict(schedule.add_noise(x_0, t, eps), t) - target
    return (error.square() if distance == "l2" else error.abs()).flatten(1).mean(1)


def target_of(x_0: Tensor, t: Tensor, eps: Tensor, *, schedule: Schedule, objective: Objective) -> Tensor:
    """What a perfect network would say, (B, C, h, w)."""
    match objective:
        case "eps":
            return eps
        case "v":
            return schedule.velocity(x_0, t, eps)
        case "x0":
            return x_0
        case "flow":
            return eps - x_0


def eps_of_prediction(
    prediction: Tensor, x_t: Tensor, t: Tensor, *, schedule: Schedule, objective: Objective
) -> Tensor:
    """The eps that a network's output means, which is what samplers take; all (B, C, h, w)."""
    match objective:
        case "eps":
            return prediction
        case "v":
            return schedule.eps_of_velocity(x_t, t, prediction)
        case "x0":
            return schedule.eps_of_x_0(x_t, t, prediction)
        case "flow":
            return schedule.eps_of_flow(x_t, t, prediction)


def loss_weights(schedule: Schedule, *, objective: Objective, weighting: Weighting) -> Tensor:
    """Weights (T,) float32 of the time steps' errors.

    `min_snr` weighs the error of x_0 by min(SNR, 5) (Hang et al. 2023, eq. 8), whatever the network predicts.
    """
    if weighting == "simple":
        return torch.ones(schedule.num_timesteps)
    return (schedule.snr.clamp(max=MIN_SNR_GAMMA) / error_ratio(schedule, objective)).float()


def error_ratio(schedule: Schedule, objective: Objective) -> Tensor:
    """(T,) float64: the squared error of the objective over that of the x_0 it implies."""
    match objective:
        case "eps":
            return schedule.snr
        case "v":
            return schedule.snr + 1.0
        case "x0":
            return torch.ones_like(schedule.snr)
        case "flow":
            return (schedule.snr.sqrt() + 1.0).square()


def vlb_weights(schedule: Schedule) -> Tensor:
    """Weights (T,) float64 that make the squared error of eps a term of the variational bound.

    In nats per dimension: beta^2 / (2 posterior variance (1 - beta) (1 - alpha_bar)) (Ho et al. 2020,
    eq. 12). As published, the first, which has no posterior variance, takes the second's.
    """
    betas, alpha_bar = schedule.betas[1:], schedule.alpha_bar[1:]
    weights = betas.square() / (2 * schedule.posterior_variance[1:] * (1 - betas) * (1 - alpha_bar))
    return torch.cat([weights[:1], weights])


def with_log_variance(losses: Tensor, log_variance: Tensor, t: Tensor) -> Tensor:
    """Losses / exp(log_variance_t) + log_variance_t: the published learned weight of each time step.

    Args:
        losses: (B,) of each sample.
        log_variance: (T,) learned; best where its exponential is the mean loss at the time step.
        t: (B,) int64 time steps.

    Returns:
        (B,) losses.
    """
    chosen = log_variance[t]
    return losses / chosen.exp() + chosen


def draw_timesteps(batch: int, num_timesteps: int, generator: torch.Generator) -> Tensor:
    """Uniform time steps, (batch,) int64 in [0, num_timesteps)."""
    return torch.randint(num_timesteps, (batch,), generator=generator)
