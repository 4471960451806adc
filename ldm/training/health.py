"""What is watched while a first stage trains: gradients of its terms, its adversary, its latents.

All of it is measured on logged steps only and costs no pass through a network.

B batch, C channels of the latent, H W height and width of the pictures, h w those of the latent.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.first_stage_config import FirstStageLoss
from ldm.models.first_stage import KLModel, VQModel
from ldm.models.gaussian import split_moments
from ldm.training.first_stage_loss import MAX_ADAPTIVE_WEIGHT, Encoded
from ldm.training.loop import GRADIENT


def norms(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Euclidean norms of the gradients of loss terms, as metrics `gradient/<term>`."""
    return {f"{GRADIENT}{term}": gradient.detach().norm() for term, gradient in gradients.items()}


def regulariser_gradients(
    model: VQModel | KLModel, encoded: Encoded, loss: FirstStageLoss
) -> dict[str, Tensor]:
    """Weighted gradients of the terms on the latent that are switched on; the graph stays whole.

    `commitment` and `kl` are taken in the latent (KL: the moments), `codebook` in the codes (N, C).
    """
    if isinstance(model, KLModel):
        names, inputs = ["kl"] if loss.kl_weight else [], [encoded.latents]
    else:
        on = [name for name in ("commitment", "codebook") if loss.codebook_weight]
        names = on if model.quantize.beta else on[:1]
        inputs = [encoded.latents, model.quantize.embedding.weight]
    if not names:
        return {}
    found = torch.autograd.grad(encoded.regulariser, inputs[: len(names)], retain_graph=True)
    return dict(zip(names, found, strict=True))


def watch_weight(weight: Tensor) -> dict[str, Tensor]:
    """`watch/adaptive_weight_at_clamp`: 1 where the adaptive weight reached its limit, else 0."""
    return {"watch/adaptive_weight_at_clamp": (weight >= MAX_ADAPTIVE_WEIGHT).double()}


def watch_discriminator(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """How well the discriminator tells patches apart, from its logits (B, 1, h', w') of both kinds.

    `watch/discriminator_margin` is the mean logit of real patches minus that of reconstructed ones;
    `watch/accuracy_real` and `watch/accuracy_fake` are the shares of patches on the right side of 0.
    """
    real, fake = real.detach(), fake.detach()
    return {
        "watch/discriminator_margin": real.mean() - fake.mean(),
        "watch/accuracy_real": (real > 0).double().mean(),
        "watch/accuracy_fake": (fake < 0).double().mean(),
    }


@dataclass(frozen=True)
class ChannelMoments:
    """Mean and deviation of each channel of the latent, both (C,) float64."""

    mean: Tensor
    std: Tensor


def channel_moments(latents: Tensor, *, kind: str) -> ChannelMoments:
    """Moments of what the second stage sees of latents (B, C, h, w), or of moments (B, 2C, h, w).

    For KL the squares are those expected over draws of the posterior: mean^2 + variance.
    """
    latents = latents.detach()
    z = (split_moments(latents)[0] if kind == "kl" else latents).double()
    squares = z.square()
    if kind == "kl":
        squares = squares + split_moments(latents)[1].double().exp()
    mean = z.mean((0, 2, 3))
    return ChannelMoments(mean, (squares.mean((0, 2, 3)) - mean.square()).clamp(min=0.0).sqrt())


def watch_latents(moments: ChannelMoments) -> dict[str, Tensor]:
    """The extremes over channels: largest |mean|, smallest and largest deviation."""
    return {
        "latent/largest_mean": moments.mean.abs().max(),
        "latent/smallest_std": moments.std.min(),
        "latent/largest_std": moments.std.max(),
    }
