"""The diagonal Gaussian posterior of a KL-regularised first stage (paper Sec. 3.1).

B batch, C channels of the latent, h w its height and width. Moments are (B, 2C, h, w): the mean, then the
log-variance.
"""

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and clamped log-variance, each (B, C, h, w), of moments (B, 2C, h, w)."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Z = mean + std * noise, (B, C, h, w), for standard-normal `noise` of that shape."""
    mean, logvar = split_moments(moments)
    return mean + torch.exp(0.5 * logvar) * noise


def kl_to_standard_normal(moments: Tensor) -> Tensor:
    """KL(q || N(0, I)) per picture in nats, (B,): a sum over all latent dimensions."""
    mean, logvar = split_moments(moments)
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))
