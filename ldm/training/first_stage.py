"""Training of a first stage: reconstruction, LPIPS, patch-adversarial and latent terms (paper App. G).

B batch, H W height and width of the pictures in [-1, 1], h w those of the latent.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from datasets.stream import SampleReader
from ldm.config import FirstStageLoss, FirstStageRecipe, Training
from ldm.models.autoencoder import to_channels_last
from ldm.models.discriminator import PatchDiscriminator, hinge_loss
from ldm.models.first_stage import KLModel, VQModel, build_first_stage
from ldm.models.gaussian import kl_to_standard_normal
from ldm.models.lpips import LPIPS, build_lpips
from ldm.models.quantizer import Quantized
from ldm.pictures import png, side_by_side
from ldm.range import from_uint8, to_uint8
from ldm.training.checkpoint import load_module, load_optimizer, module_tensors, optimizer_tensors
from ldm.training.ema import Ema
from ldm.training.loop import learning_rate
from ldm.training.randomness import generator, seed_of

MAX_ADAPTIVE_WEIGHT = 1e4


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


def forward(model: VQModel | KLModel, x: Tensor, loss: FirstStageLoss, noise: torch.Generator) -> Encoded:
    """Reconstruct a batch and weigh what regularises its latent."""
    if isinstance(model, VQModel):
        reconstruction, latents, quantized = model(x)
        return Encoded(reconstruction, loss.codebook_weight * quantized.loss, quantized, latents)
    reconstruction, moments = model(x, noise)
    return Encoded(reconstruction, loss.kl_weight * kl_to_standard_normal(moments).mean(), None, moments)


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
    perceptual = error.new_zeros(len(x)) if lpips is None else lpips(reconstruction, x)
    error = error + weight * perceptual[:, None, None, None]
    return (error.sum() / len(x) if summed else error.mean()), perceptual.mean()


def adaptive_weight(reconstruction: Tensor, last_layer: Tensor, grad_rec: Tensor, grad_adv: Tensor) -> Tensor:
    """|grad_w L_rec| / (|grad_w L_adv| + 1e-4), clamped to [0, 1e4], at the decoder's last weight w.

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
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, MAX_ADAPTIVE_WEIGHT)


class FirstStageTrainee:
    """A first stage in training with its discriminator, optimisers, averaged weights and code usage.

    Args:
        recipe: the first stage's recipe.
        reader: training pictures.
        held_out: pictures to look at, never trained on.
    """

    def __init__(self, recipe: FirstStageRecipe, reader: SampleReader, held_out: SampleReader) -> None:
        if recipe.training is None or recipe.model.kind == "identity":
            raise ValueError(f"first stage {recipe.name!r} must have weights to train, got the identity")
        self.training: Training = recipe.training
        self.config, self.loss = recipe.model, recipe.loss
        self.reader, self.held_out = reader, held_out
        torch.manual_seed(seed_of(self.training.seed, "first stage"))
        model = build_first_stage(recipe.model, checkpointing=recipe.gradient_checkpointing)
        assert isinstance(model, VQModel | KLModel)
        self.model: VQModel | KLModel = model
        self.discriminator = PatchDiscriminator(
            self.loss.discriminator_channels, self.loss.discriminator_layers
        )
        to_channels_last(self.discriminator)
        self.lpips = build_lpips() if self.loss.perceptual_weight > 0 else None
        self.optimizer = adam(self.model, self.training, lr=self.training.lr)
        self.discriminator_lr = self.loss.discriminator_lr or self.training.lr
        self.discriminator_optimizer = adam(self.discriminator, self.training, lr=self.discriminator_lr)
        self.ema = Ema(dict(self.model.named_parameters()), decay=self.training.ema_decay)
        codes = recipe.model.num_codes or 0
        self.used_at = torch.zeros(codes, dtype=torch.int64)

    @property
    def num_parameters(self) -> int:
        """Parameters of the autoencoder."""
        return sum(p.numel() for p in self.model.parameters())

    def batch(self, step: int) -> Tensor:
        """Pictures of the step-th batch, (B, 3, H, W) in [-1, 1], channels-last."""
        training = self.training
        position = step * training.batch_size
        samples = self.reader.in_order(training.seed, position=position, count=training.batch_size)
        x = from_uint8(samples["image"])
        if training.mirror:
            mirrored = torch.rand(len(x), generator=generator(training.seed, step, "mirror")) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        return x.contiguous(memory_format=torch.channels_last)

    def step(self, step: int) -> Mapping[str, Tensor]:
        """One step of the autoencoder, then one of the discriminator once that has started."""
        x = self.batch(step)
        images = step * self.training.batch_size
        factor = learning_rate(self.training, step) / self.training.lr
        set_lr(self.optimizer, self.training.lr * factor)
        adversarial = self.loss.adversarial_weight > 0 and images >= self.loss.adversarial_start_images
        encoded = forward(self.model, x, self.loss, generator(self.training.seed, step, "posterior"))
        logged = self.backward(encoded, x, images, adversarial=adversarial)
        if self.training.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if encoded.quantized is not None:
            logged |= self.track_codes(encoded.quantized, encoded.latents, step)
        self.ema.update(step)
        if adversarial:
            set_lr(self.discriminator_optimizer, self.discriminator_lr * factor)
            logged |= self.step_discriminator(x, encoded.reconstruction.detach())
        return logged

    def backward(self, encoded: Encoded, x: Tensor, images: int, *, adversarial: bool) -> dict[str, Tensor]:
        """Gradients of all terms.

        LPIPS and discriminator are differentiated once, down to the picture; from there one pass through the
        decoder serves all terms and the last layer's norms.
        """
        perceptual_on = self.loss.perceptual_weight > 0 and images >= self.loss.perceptual_start_images
        picture = encoded.reconstruction.detach().requires_grad_()
        rec, perceptual = reconstruction_loss(
            picture,
            x,
            self.lpips if perceptual_on else None,
            weight=self.loss.perceptual_weight,
            summed=isinstance(self.model, KLModel),
        )
        (gradient,) = torch.autograd.grad(rec, picture)
        logged = {"loss": rec.detach() + encoded.regulariser.detach(), "reconstruction": rec.detach()}
        logged |= {"regulariser": encoded.regulariser.detach(), "l1": (picture - x).abs().mean().detach()}
        if perceptual_on:
            logged["lpips"] = perceptual.detach()
        if adversarial:
            self.discriminator.requires_grad_(False)
            fooling = -self.discriminator(picture).mean()
            (grad_adv,) = torch.autograd.grad(fooling, picture)
            self.discriminator.requires_grad_(True)
            weight = adaptive_weight(
                encoded.reconstruction, self.model.decoder.last_layer, gradient, grad_adv
            )
            gradient = gradient + self.loss.adversarial_weight * weight * grad_adv
            logged |= {"generator": fooling.detach(), "adaptive_weight": weight}
        torch.autograd.backward([encoded.reconstruction, encoded.regulariser], [gradient, None])
        return logged

    def step_discriminator(self, x: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """One step of the discriminator on real and reconstructed pictures."""
        real, fake = self.discriminator(x), self.discriminator(reconstruction)
        loss = hinge_loss(real, fake)
        loss.backward()
        self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad()
        return {
            "discriminator": loss.detach(),
            "logits_real": real.mean().detach(),
            "logits_fake": fake.mean().detach(),
        }

    def track_codes(self, quantized: Quantized, latents: Tensor, step: int) -> dict[str, Tensor]:
        """Remember when each code was last used, and move dead ones onto latents of the batch."""
        images = (step + 1) * self.training.batch_size
        used = torch.bincount(quantized.indices.flatten(), minlength=len(self.used_at))
        self.used_at[used > 0] = images
        share = used.double() / used.sum()
        perplexity = torch.exp(-(share * share.clamp(min=1e-12).log()).sum())
        if self.loss.revive_after_images and isinstance(self.model, VQModel):
            dead = images - self.used_at > self.loss.revive_after_images
            if bool(dead.any()):
                self.model.quantize.revive(
                    dead, latents.detach(), generator(self.training.seed, step, "revive")
                )
                self.used_at[dead] = images
        recent = images - self.used_at < max(self.loss.revive_after_images, 20 * self.training.batch_size)
        return {"code_usage": recent.double().mean(), "code_perplexity": perplexity}

    def tensors(self) -> dict[str, Tensor]:
        """Everything the next step depends on."""
        return {
            **module_tensors(self.model, "model"),
            **module_tensors(self.discriminator, "discriminator"),
            **optimizer_tensors(self.optimizer, "optimizer"),
            **optimizer_tensors(self.discriminator_optimizer, "discriminator_optimizer"),
            **{f"ema.{name}": value for name, value in self.ema.averages.items()},
            "used_at": self.used_at,
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        load_module(self.model, tensors, "model")
        load_module(self.discriminator, tensors, "discriminator")
        load_optimizer(self.optimizer, tensors, "optimizer")
        load_optimizer(self.discriminator_optimizer, tensors, "discriminator_optimizer")
        for name, average in self.ema.averages.items():
            average.copy_(tensors[f"ema.{name}"])
        self.used_at.copy_(tensors["used_at"])

    def averaged(self) -> VQModel | KLModel:
        """The model with its averaged weights, in evaluation mode, for use while the raw one trains on."""
        model = type(self.model)(self.config)
        to_channels_last(model)
        model.load_state_dict(self.ema.averages)
        return model.eval()

    @torch.no_grad()
    def look(self) -> Mapping[str, bytes]:
        """Held-out pictures above their reconstructions by the averaged weights."""
        count = min(24, len(self.held_out))
        x = from_uint8(self.held_out.fetch(range(count))["image"])
        model = self.averaged()
        rec = model.decode(model.latent(model.encode(x), None))
        scale = max(1, 128 // x.shape[-1])
        return {
            "reconstructions": png(
                np.asarray(side_by_side(to_uint8(x), to_uint8(rec), columns=12, scale=scale))
            )
        }


def adam(module: nn.Module, training: Training, *, lr: float) -> torch.optim.Optimizer:
    """Adam with the recipe's betas (paper: 0.5, 0.9), in one fused kernel."""
    return torch.optim.Adam(module.parameters(), lr=lr, betas=training.betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr
