"""Classifier-free guidance (Ho & Salimans 2022; paper Sec. 4.3.1) as a wrapper of a conditional denoiser."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.objective import Denoiser

ConditionalDenoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t, t, context) -> eps."""


def guide(denoise: ConditionalDenoiser, context: Tensor, null_context: Tensor, *, scale: float) -> Denoiser:
    """The denoiser eps_null + scale (eps_cond - eps_null); scale 1 needs, and costs, one evaluation only.

    Args:
        denoise: (x_t, t, context) -> eps.
        context: (B, L, D) tokens of what is asked for.
        null_context: (B, L, D) tokens that ask for nothing.
        scale: guidance scale; 1 samples the conditional model as it is, more follows the condition harder.
    """
    if scale == 1.0:
        return lambda x_t, t: denoise(x_t, t, context)
    both = torch.cat([null_context, context])

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        eps_null, eps_cond = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return eps_null + scale * (eps_cond - eps_null)

    return guided
