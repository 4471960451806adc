"""The terms of the first stage's objective, as the published models have them (paper App. G).

    pixel         L1 distance to the original
    perceptual    LPIPS, one number per picture, added to each of its pixels
    adversarial   - mean logit of the discriminator, times `adversarial_weight` and the adaptive weight
    commitment    VQ: mean (z - sg[e])^2, times `codebook_weight`
    codebook      VQ: mean (sg[z] - e)^2, times beta and `codebook_weight`
    kl            KL: KL(q || N(0, I)) of a picture's posterior, times `kl_weight`

KL first stages sum pixel and perceptual terms over a picture (C, H, W) and the KL over its latent, and divide
by the batch: kl_weight 1e-6 stands against a sum of some 200,000 values at 256 px. VQ first stages take plain
means. The discriminator minimises the hinge loss, and nothing else moves it.

Differs: the published objective has a learned output variance; its parameter is in no optimiser and stays at
variance 1, so it is left out. The published code evaluates LPIPS and the discriminator before they start and
multiplies them by zero; here they are not evaluated.

B batch, C channels of the latent, H W height and width of the pictures in [-1, 1], h w those of the latent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.first_stage_config import FirstStageLoss
from ldm.models.first_stage import KLModel, VQModel
from ldm.models.gaussian import kl_to_standard_normal
from ldm.models.lpips import LPIPS
from ldm.models.quantizer import Quantized

MAX_ADAPTIVE_WEIGHT = 1e4
ADAPTIVE_EPSILON = 1e-4


@dataclass(frozen=True)
class Encoded:
    """One forward pass of either kind of first stage."""

    reconstruction: Tensor
    """(B, 3, H, W)."""
    regulariser: Tensor
    """Weighted scalar: codebook and commitment terms, or the KL term per picture."""
    quantized: Quantized | None
    latents: Tensor
    """(B, C, h, w) before quantisation, or (B, 2C, h, w) moments."""

    def detached(self) -> "Encoded":
        """The same numbers without their graph."""
        return Encoded(
            self.reconstruction.detach(), self.regulariser.detach(), self.quantized, self.latents.detach()
        )


def forward(model: VQModel | KLModel, x: Tensor, loss: FirstStageLoss, noise: torch.Generator) -> Encoded:
    """Reconstruct a batch and weigh what regularises its latent."""
    if isinstance(model, VQModel):
        reconstruction, latents, quantized = model(x)
        weighted = loss.codebook_weight * quantized.loss
        return Encoded(reconstruction.float(), weighted, quantized, latents.float())
    reconstruction, moments = model(x, noise)
    moments = moments.float()
    weighted = loss.kl_weight * kl_to_standard_normal(moments).mean()
    return Encoded(reconstruction.float(), weighted, None, moments)


def reconstruction_loss(
    reconstruction: Tensor, x: Tensor, lpips: LPIPS | None, *, weight: float, summed: bool
) -> tuple[Tensor, Tensor]:
    """L1 per pixel plus LPIPS, one number per picture added to each of its pixels, and LPIPS alone.

    Args:
        reconstruction: (B, 3, H, W).
        x: (B, 3, H, W) the originals.
        lpips: the perceptual metric, None before it joins in.
        weight: weight of LPIPS.
        summed: KL: sum over the pixels of a picture; VQ: mean over them. So published.

    Returns:
        Two scalars: the loss, and the mean LPIPS (0 without it).
    """
    error = (reconstruction - x).abs()
    perceptual = error.new_zeros(len(x)) if lpips is None else lpips(reconstruction, x).float()
    error = error + weight * perceptual[:, None, None, None]
    return (error.sum() / len(x) if summed else error.mean()), perceptual.mean()


def pixel_gradient(reconstruction: Tensor, x: Tensor, *, summed: bool) -> Tensor:
    """Gradient of the L1 term alone in the picture, (B, 3, H, W): the error's sign over the divisor.

    What `reconstruction_loss` has beyond it is the gradient of LPIPS, exactly zero where there is none.
    """
    return (reconstruction - x).sign() / (len(x) if summed else x.numel())


def adaptive_weight(reconstruction: Tensor, last_layer: Tensor, grad_rec: Tensor, grad_adv: Tensor) -> Tensor:
    """|grad_w L_rec| / (|grad_w L_adv| + 1e-4), clamped to [0, 1e4], at the decoder's last weight w.

    L_rec is the pixel and perceptual terms, L_adv the adversarial one before any weight (Esser et al. 2021,
    "Taming Transformers for High-Resolution Image Synthesis", equation 7, where the small number is 1e-6;
    1e-4 and the clamp are the published code's).

    Args:
        reconstruction: (B, 3, H, W) with its graph.
        last_layer: w.
        grad_rec: (B, 3, H, W) gradient of the reconstruction loss in the picture.
        grad_adv: (B, 3, H, W) gradient of the adversarial loss in the picture.
    """
    norms = [
        torch.autograd.grad(reconstruction, last_layer, grad_outputs=g, retain_graph=True)[0].norm()
        for g in (grad_rec, grad_adv)
    ]
    return (norms[0] / (norms[1] + ADAPTIVE_EPSILON)).clamp(0.0, MAX_ADAPTIVE_WEIGHT)
