"""A first stage in training: one step of the autoencoder and one of its discriminator (paper App. G).

B batch, C channels of the latent, H W height and width of the pictures in [-1, 1], h w those of the latent.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from datasets.stream import SampleReader
from ldm.errors import TrainingError
from ldm.first_stage_config import FirstStageRecipe
from ldm.health_page import health_page
from ldm.models.autoencoder import to_channels_last
from ldm.models.discriminator import PatchDiscriminator, hinge_loss
from ldm.models.first_stage import KLModel, VQModel, build_first_stage
from ldm.models.lpips import build_lpips
from ldm.pictures import png, side_by_side
from ldm.precision import autocast, set_products
from ldm.range import from_uint8, to_uint8
from ldm.training.batches import Batches
from ldm.training.codebook import CodeUse
from ldm.training.ema import Ema
from ldm.training.first_stage_loss import (
    Encoded,
    adaptive_weight,
    forward,
    pixel_gradient,
    reconstruction_loss,
)
from ldm.training.health import (
    channel_moments,
    norms,
    regulariser_gradients,
    watch_discriminator,
    watch_latents,
    watch_weight,
)
from ldm.training.learning_rate import learning_rate
from ldm.training.loop import History, is_due, is_logged
from ldm.training.randomness import generator, seed_of
from ldm.training.ranks import ALONE, Ranks
from ldm.training.state import check_state, load_module, load_optimizer, module_tensors, optimizer_tensors
from ldm.training.validation import HeldOut, best, judged, judged_after, num_without_better
from ldm.training.verdicts import Facts
from ldm.training.virtual_shards import run_shards
from ldm.training_config import Training

NUM_LOOKED_AT = 24


@dataclass(frozen=True)
class Pending:
    """What is known between the gradients of a step and the step itself."""

    encoded: list[Encoded]
    """Of this rank's shards."""
    buffers: list[Tensor]
    """Of the discriminator, as they were before."""
    gradient_norm: Tensor
    adversarial: bool
    measured: bool


class FirstStageTrainee:
    """A first stage in training with its discriminator, optimisers, averaged weights and code usage.

    Args:
        recipe: the first stage's recipe.
        reader: training pictures.
        held_out: pictures to look at and to score, never trained on.
        inception: where the weights of the FID Inception are; asked for only when validation wants rFID.
        ranks: who trains with this process.
        device: where the networks are.
    """

    def __init__(
        self,
        recipe: FirstStageRecipe,
        reader: SampleReader,
        held_out: SampleReader,
        *,
        inception: Callable[[], Path] | None = None,
        ranks: Ranks = ALONE,
        device: torch.device | str = "cpu",
    ) -> None:
        if recipe.training is None or recipe.model.kind == "identity":
            raise ValueError(f"first stage {recipe.name!r} must have weights to train, got the identity")
        self.training: Training = recipe.training
        self.ranks, self.device = ranks, torch.device(device)
        set_products(self.training.precision)
        self.config, self.loss, self.validation = recipe.model, recipe.loss, recipe.validation
        self.batches, self.held_out = Batches(reader, self.training, ranks), held_out
        torch.manual_seed(seed_of(self.training.seed, "first stage"))
        model = build_first_stage(recipe.model, checkpointing=recipe.gradient_checkpointing)
        assert isinstance(model, VQModel | KLModel)
        self.model: VQModel | KLModel = model.to(self.device)
        self.discriminator = PatchDiscriminator(
            self.loss.discriminator_channels, self.loss.discriminator_layers
        )
        to_channels_last(self.discriminator.to(self.device))
        self.lpips = build_lpips().to(self.device) if self.loss.perceptual_weight > 0 else None
        self.optimizer = adam(self.model, self.training, lr=self.training.lr)
        self.discriminator_lr = self.loss.discriminator_lr or self.training.lr
        self.discriminator_optimizer = adam(self.discriminator, self.training, lr=self.discriminator_lr)
        self.ema = Ema(dict(self.model.named_parameters()), decay=self.training.ema_decay)
        self.codes = CodeUse(
            recipe.model.num_codes or 0,
            batch_size=self.training.batch_size,
            revive_after_images=self.loss.revive_after_images,
            device=self.device,
        )
        self.pending: Pending | None = None
        self.scorer = self.build_scorer(inception) if self.validation.every_images else None
        keep = self.ema.averages if self.validation.keep_best else {}
        self.best_averages = {name: value.clone() for name, value in keep.items()}

    def build_scorer(self, inception: Callable[[], Path] | None) -> HeldOut:
        """The held-out pictures that are scored."""
        return HeldOut(
            self.validation,
            self.held_out,
            micro_batch=self.training.batch_size,
            lpips=self.lpips or build_lpips().to(self.device),
            inception=inception,
        )

    @property
    def num_parameters(self) -> int:
        """Parameters of the autoencoder."""
        return sum(p.numel() for p in self.model.parameters())

    def batch(self, step: int) -> Tensor:
        """This rank's part of the step-th batch, (b, 3, H, W) in [-1, 1], channels-last."""
        training = self.training
        samples = self.batches.at(step)
        if step == 0:
            check_pictures(samples["image"])
        x = from_uint8(samples["image"])
        if training.mirror:
            drawn = torch.rand(training.batch_size, generator=generator(training.seed, step, "mirror")) < 0.5
            mirrored = drawn[self.ranks.rank * len(x) :][: len(x)]
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        return x.to(self.device).contiguous(memory_format=torch.channels_last)

    def gradients(self, step: int) -> dict[str, Tensor]:
        """Gradients of autoencoder and, once that has started, discriminator: means over all shards."""
        training = self.training
        own = self.ranks.own(training.virtual_shards)
        shards = dict(zip(own, self.batch(step).chunk(len(own)), strict=True))
        images = step * training.batch_size
        adversarial = self.loss.adversarial_weight > 0 and images >= self.loss.adversarial_start_images
        measured = is_logged(training, step + 1)
        discriminating = list(self.discriminator.parameters()) if adversarial else []
        buffers = list(self.discriminator.buffers())
        before = [buffer.clone() for buffer in buffers]

        def work(index: int) -> tuple[dict[str, Tensor], Encoded]:
            encoded = self.encode_shard(shards[index], step, index)
            logged = self.backward(encoded, shards[index], images, adversarial=adversarial, measured=measured)
            return logged, encoded.detached()

        logged, encoded = run_shards(
            work,
            training.virtual_shards,
            parameters=[*self.model.parameters(), *discriminating],
            buffers=buffers,
            ranks=self.ranks,
        )
        norm = logged["gradient_norm"] = gradient_norm(self.model)
        if adversarial:
            logged["discriminator_gradient_norm"] = gradient_norm(self.discriminator)
        self.pending = Pending(encoded, before, norm, adversarial=adversarial, measured=measured)
        return logged

    def update(self, step: int) -> dict[str, Tensor]:
        """One step of the autoencoder, and one of the discriminator once that has started."""
        training, pending = self.training, self.pending
        assert pending is not None
        factor = learning_rate(training, step) / training.lr
        set_lr(self.optimizer, training.lr * factor)
        if training.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), training.clip_norm, pending.gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        logged = self.track_latents(pending.encoded, step, measured=pending.measured)
        self.ema.update(step)
        if pending.adversarial:
            set_lr(self.discriminator_optimizer, self.discriminator_lr * factor)
            self.discriminator_optimizer.step()
            self.discriminator_optimizer.zero_grad()
        self.pending = None
        return logged

    def forget(self) -> None:
        """Drop the gradients, and what the discriminator's norms took from the batch."""
        assert self.pending is not None
        self.optimizer.zero_grad()
        self.discriminator_optimizer.zero_grad()
        for buffer, value in zip(self.discriminator.buffers(), self.pending.buffers, strict=True):
            buffer.copy_(value)
        self.pending = None

    def encode_shard(self, x: Tensor, step: int, index: int) -> Encoded:
        """Forward pass of one shard of a step; the first one draws what a step of one shard draws."""
        key = (index,) if index else ()
        if index:
            torch.manual_seed(seed_of(self.training.seed, step, "layers", *key))
        with self.cast():
            return forward(self.model, x, self.loss, generator(self.training.seed, step, "posterior", *key))

    def cast(self) -> AbstractContextManager[object]:
        """The precision of networks."""
        return autocast(self.device, self.training.precision)

    def judge(self, x: Tensor) -> Tensor:
        """The discriminator's logits (B, 1, h', w') float32 of pictures (B, 3, H, W)."""
        with self.cast():
            return self.discriminator(x).float()

    def backward(
        self, encoded: Encoded, x: Tensor, images: int, *, adversarial: bool, measured: bool = False
    ) -> dict[str, Tensor]:
        """Gradients of all terms, and what is logged; with `measured` also the norm of each term's gradient.

        LPIPS and discriminator are differentiated once, down to the picture; from there one pass through the
        decoder serves all terms and the last layer's norms.
        """
        perceptual_on = self.loss.perceptual_weight > 0 and images >= self.loss.perceptual_start_images
        summed = isinstance(self.model, KLModel)
        picture = encoded.reconstruction.detach().requires_grad_()
        with self.cast():
            rec, perceptual = reconstruction_loss(
                picture,
                x,
                self.lpips if perceptual_on else None,
                weight=self.loss.perceptual_weight,
                summed=summed,
            )
        (gradient,) = torch.autograd.grad(rec, picture)
        logged = {"loss": rec.detach() + encoded.regulariser.detach(), "reconstruction": rec.detach()}
        logged |= {"regulariser": encoded.regulariser.detach(), "l1": (picture - x).abs().mean().detach()}
        terms: dict[str, Tensor] = {}
        if measured:
            terms = {"pixel": pixel_gradient(picture.detach(), x, summed=summed)}
        if perceptual_on:
            logged["lpips"] = perceptual.detach()
            terms |= {"perceptual": gradient - terms["pixel"]} if measured else {}
        if adversarial:
            logits_fake = self.judge(picture)
            pushed, found = self.adversarial_gradient(encoded, picture, logits_fake, gradient)
            gradient = gradient + pushed
            logged |= found | self.backward_discriminator(x, logits_fake, measured=measured)
            terms |= {"adversarial": pushed} if measured else {}
        if measured:
            logged |= norms(terms | regulariser_gradients(self.model, encoded, self.loss))
            logged |= watch_weight(logged["adaptive_weight"]) if adversarial else {}
        torch.autograd.backward([encoded.reconstruction, encoded.regulariser], [gradient, None])
        return logged

    def adversarial_gradient(
        self, encoded: Encoded, picture: Tensor, logits_fake: Tensor, grad_rec: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted gradient of the adversarial term in the picture, (B, 3, H, W), and what to log of it."""
        fooling = -logits_fake.mean()
        (grad_adv,) = torch.autograd.grad(fooling, picture, retain_graph=True)
        weight = adaptive_weight(encoded.reconstruction, self.model.decoder.last_layer, grad_rec, grad_adv)
        pushed = self.loss.adversarial_weight * weight * grad_adv
        return pushed, {"generator": fooling.detach(), "adaptive_weight": weight}

    def backward_discriminator(
        self, x: Tensor, logits_fake: Tensor, *, measured: bool = False
    ) -> dict[str, Tensor]:
        """Gradients of the discriminator's own loss, in its parameters alone, and what to log of it.

        Args:
            x: (B, 3, H, W) real pictures.
            logits_fake: what it said of reconstructions, with its graph.
            measured: also log how well it tells them apart.
        """
        logits_real = self.judge(x)
        loss = hinge_loss(logits_real, logits_fake)
        loss.backward(inputs=list(self.discriminator.parameters()))
        logged = {
            "discriminator": loss.detach(),
            "logits_real": logits_real.mean().detach(),
            "logits_fake": logits_fake.mean().detach(),
        }
        return logged | (watch_discriminator(logits_real, logits_fake) if measured else {})

    def track_latents(self, encoded: Sequence[Encoded], step: int, *, measured: bool) -> dict[str, Tensor]:
        """What the latents of all shards, in order, tell; dead codes are moved onto them."""
        latents = self.ranks.gather(torch.cat([e.latents for e in encoded]))
        logged: dict[str, Tensor] = {}
        if isinstance(self.model, VQModel):
            indices = torch.cat([e.quantized.indices for e in encoded if e.quantized is not None])
            logged |= self.codes.track(
                self.model.quantize,
                self.ranks.gather(indices),
                latents,
                images=(step + 1) * self.training.batch_size,
                draws=generator(self.training.seed, step, "revive"),
            )
        if measured:
            logged |= {"watch/codes_revived": self.codes.take_revived()} if logged else {}
            logged |= watch_latents(channel_moments(latents, kind=self.config.kind))
        return logged

    def validates(self, images: int) -> bool:
        """At the recipe's interval, and at the end."""
        ended = images == self.training.num_steps * self.training.batch_size
        due = self.scorer and is_due(images, self.training, every_images=self.validation.every_images)
        return self.scorer is not None and bool(ended or due)

    def validate(self) -> Mapping[str, float]:
        """Held-out scores of the averaged weights."""
        assert self.scorer is not None
        return self.scorer.scores(self.averaged())

    def heed(self, images: int, history: History) -> None:
        """Keep the averaged weights if they are the best so far."""
        found = best(self.judged(history))
        if found is not None and found[0] == images:
            for name, value in self.best_averages.items():
                value.copy_(self.ema.averages[name])

    def judged(self, history: History) -> list[tuple[int, float]]:
        """The scores that decide, higher is better."""
        return judged(history, self.validation, after=judged_after(self.loss, self.training))

    def stops(self, history: History) -> bool:
        """True once the recipe's patience with scores that are not better is over."""
        patience = self.validation.patience
        return patience > 0 and num_without_better(self.judged(history)) >= patience

    def result(self) -> dict[str, Tensor]:
        """The weights to use: averaged, those of the best validation where the recipe keeps it."""
        return self.best_averages or self.ema.averages

    def tensors(self) -> dict[str, Tensor]:
        """Everything the next step depends on."""
        return {
            **module_tensors(self.model, "model"),
            **module_tensors(self.discriminator, "discriminator"),
            **optimizer_tensors(self.optimizer, "optimizer"),
            **optimizer_tensors(self.discriminator_optimizer, "discriminator_optimizer"),
            **{f"ema.{name}": value for name, value in self.ema.averages.items()},
            **{f"best.{name}": value for name, value in self.best_averages.items()},
            **self.codes.tensors(),
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back, after a look at whether they fit."""
        optimizers = {"optimizer": self.optimizer, "discriminator_optimizer": self.discriminator_optimizer}
        check_state(tensors, self.tensors(), optimizers=optimizers)
        load_module(self.model, tensors, "model")
        load_module(self.discriminator, tensors, "discriminator")
        load_optimizer(self.optimizer, tensors, "optimizer")
        load_optimizer(self.discriminator_optimizer, tensors, "discriminator_optimizer")
        for prefix, averages in (("ema", self.ema.averages), ("best", self.best_averages)):
            for name, average in averages.items():
                average.copy_(tensors[f"{prefix}.{name}"])
        self.codes.load(tensors)

    def averaged(self) -> VQModel | KLModel:
        """The model with its averaged weights, in evaluation mode, for use while the raw one trains on."""
        model = type(self.model)(self.config)
        to_channels_last(model)
        model.load_state_dict(self.ema.averages)
        return model.to(self.device).eval()

    @torch.no_grad()
    def look(self, history: History) -> Mapping[str, bytes]:
        """Held-out pictures above their reconstructions by the averaged weights, and the page of health."""
        count = min(NUM_LOOKED_AT, len(self.held_out))
        x = from_uint8(self.held_out.fetch(range(count))["image"]).to(self.device)
        model = self.averaged()
        stored = model.encode(x)
        rec = model.decode(model.latent(stored, None))
        scale = max(1, 128 // x.shape[-1])
        pairs = png(np.asarray(side_by_side(to_uint8(x), to_uint8(rec), columns=12, scale=scale)))
        if not history:
            return {"reconstructions": pairs}
        moments = channel_moments(stored, kind=self.config.kind)
        page = health_page(history, self.facts(), deviations=moments.std.tolist())
        return {"reconstructions": pairs, "first_stage_health": page}

    def facts(self) -> Facts:
        """What a history of this run is judged by."""
        side = self.held_out.fetch(range(1))["image"].shape[1] // self.config.factor
        return Facts(
            num_codes=self.config.num_codes or 0,
            positions_per_batch=self.training.batch_size * side**2,
            values_per_latent=self.config.embed_dim * side**2,
            kl_weight=self.loss.kl_weight if self.config.kind == "kl" else 0.0,
            judged_after=judged_after(self.loss, self.training),
        )


def check_pictures(images: np.ndarray) -> None:
    """Refuse a batch (B, H, W, 3) from which nothing can be learnt.

    Raises:
        TrainingError: every pixel of it has one colour, or all of its pictures are the same.
    """
    if (images == images[:1, :1, :1]).all():
        what = (
            f"all {len(images)} pictures of the first batch are of the one colour {images[0, 0, 0].tolist()}"
        )
    elif len(images) > 1 and (images == images[:1]).all():
        what = f"all {len(images)} pictures of the first batch are the same"
    else:
        return
    raise TrainingError(
        f"training pictures must differ: {what}; look at the data set's pictures and at how they are decoded"
    )


def gradient_norm(module: nn.Module) -> Tensor:
    """Euclidean norm of all gradients of a module."""
    found = [p.grad for p in module.parameters() if p.grad is not None]
    return nn.utils.get_total_norm(found).detach()


def adam(module: nn.Module, training: Training, *, lr: float) -> torch.optim.Optimizer:
    """Adam with the recipe's betas (paper: 0.5, 0.9), in one fused kernel."""
    return torch.optim.Adam(module.parameters(), lr=lr, betas=training.betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr
