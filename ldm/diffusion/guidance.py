"""Guidance as wrappers of a denoiser: classifier-free (paper Sec. 4.3.1), by a classifier, by a target.

B batch, L tokens of the condition, D their width; x is (B, ...).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.objective import Denoiser
from ldm.diffusion.schedule import Schedule, at

ConditionalDenoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t, t, context) -> eps."""


def guide(
    denoise: ConditionalDenoiser,
    context: Tensor,
    null_context: Tensor,
    *,
    scale: float,
    interval: tuple[int, int] | None = None,
    rescale: float = 0.0,
) -> Denoiser:
    """The denoiser eps_null + scale (eps_cond - eps_null) (Ho & Salimans 2022, eq. 6).

    Scale 1 needs, and costs, one evaluation only; so do time steps outside the interval (Kynkaanniemi et al.
    2024), where the conditional denoiser is taken as it is.

    Args:
        denoise: (x_t, t, context) -> eps.
        context: (B, L, D) tokens of what is asked for.
        null_context: (B, L, D) tokens that ask for nothing.
        scale: guidance scale; 1 samples the conditional model as it is, more follows the condition harder.
        interval: first and last time step at which guidance acts; a batch is at one time step, as samplers
            have it.
        rescale: see `rescale_deviation`.
    """
    if scale == 1.0:
        return lambda x_t, t: denoise(x_t, t, context)
    both = torch.cat([null_context, context])

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        if interval is not None and not interval[0] <= int(t[0]) <= interval[1]:
            return denoise(x_t, t, context)
        eps_null, eps_cond = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        eps = eps_null + scale * (eps_cond - eps_null)
        return rescale_deviation(eps, eps_cond, share=rescale) if rescale > 0 else eps

    return guided


def rescale_deviation(eps: Tensor, eps_cond: Tensor, *, share: float) -> Tensor:
    """Guided noise, by a share brought to the conditional one's deviation (Lin et al. 2023, eq. 15, 16).

    Differs: of the noise, whatever the network predicts; deviations are over all of a sample but the batch.
    """
    axes = tuple(range(1, eps.dim()))
    ratio = eps_cond.std(axes, keepdim=True) / eps.std(axes, keepdim=True)
    return (share * ratio + 1.0 - share) * eps


def guide_by_classifier(
    denoise: Denoiser,
    log_probability: Callable[[Tensor, Tensor], Tensor],
    *,
    schedule: Schedule,
    scale: float,
) -> Denoiser:
    """The denoiser eps - scale sqrt(1 - alpha_bar) grad log p(y | x_t) (Dhariwal & Nichol 2021, alg. 2).

    Args:
        denoise: (x_t, t) -> eps.
        log_probability: (x_t, t) -> (B,), of a classifier that knows noisy latents.
        schedule: the forward process.
        scale: 1 samples p(x | y); more follows the classifier harder.
    """

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_probability(x, t).sum(), x)
        return raise_probability(denoise(x_t, t), t, gradient, schedule=schedule, scale=scale)

    return guided


def guide_by_target(
    denoise: Denoiser,
    log_probability: Callable[[Tensor], Tensor],
    *,
    schedule: Schedule,
    scale: float = 1.0,
) -> Denoiser:
    """The denoiser eps - scale sqrt(1 - alpha_bar) grad log p(y | x_0(x_t)): image guiding (paper App. C).

    x_0(x_t) is the denoiser's estimate, and the gradient goes through it, so an evaluation costs a backward
    pass of the network. Differs: the paper prints a plus, with which samples flee the target.

    Args:
        denoise: (x_t, t) -> eps, differentiable.
        log_probability: estimate of x_0 (B, ...) -> (B,), differentiable; see `image_guiding`.
        schedule: the forward process.
        scale: 1 is the formula's; more follows the target harder.
    """

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            eps = denoise(x, t)
            likely = log_probability(schedule.x_0_of_eps(x, t, eps))
            (gradient,) = torch.autograd.grad(likely.sum(), x)
        return raise_probability(eps.detach(), t, gradient, schedule=schedule, scale=scale)

    return guided


def raise_probability(
    eps: Tensor, t: Tensor, gradient: Tensor, *, schedule: Schedule, scale: float
) -> Tensor:
    """The eps whose score is larger by `scale` times a gradient of a log-probability; all (B, ...)."""
    return eps - scale * at((1.0 - schedule.alpha_bar).sqrt(), t, eps) * gradient
