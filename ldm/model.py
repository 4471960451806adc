"""Trained models as objects: an autoencoder, and a latent diffusion model that conditions, predicts, samples.

B batch, C channels of the latent, h w its height and width, H W those of the picture.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load
from torch import Tensor, nn

from datasets.manifest import Manifest
from datasets.store import Store
from ldm.config import FirstStageModel, Recipe, Sampling, require_divisible
from ldm.diffusion.ddim import sample_ddim
from ldm.diffusion.guidance import guide
from ldm.diffusion.objective import Objective, eps_of_prediction
from ldm.diffusion.schedule import Schedule, linear_schedule
from ldm.errors import ContractError
from ldm.models.conditioning import ClassEmbedder, Conditioner, build_conditioner
from ldm.models.first_stage import FirstStage, build_first_stage, decode_in_micro_batches
from ldm.models.unet import UNet, build_unet
from ldm.training.randomness import generator

WEIGHTS = "weights.safetensors"
MAX_PIXEL = 1.001
"""Largest size of a pixel that still counts as lying in [-1, 1]."""


@dataclass(frozen=True)
class Autoencoder:
    """A trained first stage as one object; it checks what it is given."""

    first_stage: FirstStage
    config: FirstStageModel

    def encode(self, x: Tensor) -> Tensor:
        """Latents (B, C, h, w): VQ before quantisation, KL the posterior's mean.

        Args:
            x: (B, 3, H, W) pictures in [-1, 1]; H and W divisible by f.

        Raises:
            ContractError: another shape, a number that is not finite, or a range that is not [-1, 1].
        """
        self.check_pictures(x)
        with torch.no_grad():
            stored = self.first_stage.encode(x.contiguous(memory_format=torch.channels_last))
            return self.first_stage.latent(stored, None)

    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, h * f, w * f), nominally in [-1, 1], of unscaled latents; VQ quantises first.

        Args:
            z: (B, C, h, w) latents as `encode` gives them.

        Raises:
            ContractError: another number of channels, or a number that is not finite.
        """
        self.check_latents(z)
        with torch.no_grad():
            return self.first_stage.decode(z.contiguous(memory_format=torch.channels_last))

    def check_pictures(self, x: Tensor) -> None:
        """Refuse what is not a batch of pictures for this first stage."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ContractError(
                f"pictures must have the shape (B, 3, H, W), got {tuple(x.shape)}; bring grey and "
                "transparent pictures to RGB first"
            )
        for side, size in zip(("height", "width"), x.shape[2:], strict=True):
            require_divisible(f"the {side} of a picture", size, self.config.factor, "f", error=ContractError)
        check_finite("pictures", x)
        if float(x.abs().amax()) > MAX_PIXEL:
            raise ContractError(
                f"pictures must lie in [-1, 1], got values up to {float(x.abs().amax()):.4g}; "
                "divide bytes by 127.5 and subtract 1 (ldm.range.from_uint8)"
            )

    def check_latents(self, z: Tensor) -> None:
        """Refuse what is not a batch of latents of this first stage."""
        if z.ndim != 4 or z.shape[1] != self.config.embed_dim:
            raise ContractError(
                f"latents of this first stage must have the shape (B, {self.config.embed_dim}, h, w), "
                f"got {tuple(z.shape)}; were they made by another first stage?"
            )
        check_finite("latents", z)


def check_finite(what: str, values: Tensor) -> None:
    """Refuse NaN and infinity, saying how many there are."""
    wrong = int((~values.isfinite()).sum())
    if wrong:
        raise ContractError(
            f"{what} must be finite, got {wrong} of {values.numel()} numbers that are NaN or infinite; "
            "look at where they come from"
        )


class Denoising(nn.Module):
    """What is trained in the second stage: the UNet and the conditioning encoder."""

    def __init__(self, unet: UNet, conditioner: Conditioner | None) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner


def build_denoising(recipe: Recipe, *, num_classes: int) -> Denoising:
    """The networks of a recipe, freshly initialised from torch's global generator."""
    if recipe.unet.num_classes is not None:  # the table of class vectors ends with the null class
        num_classes = recipe.unet.num_classes - 1
    return Denoising(build_unet(recipe.unet), build_conditioner(recipe.conditioning, num_classes=num_classes))


@dataclass(frozen=True)
class LatentDiffusion:
    """First stage, networks, schedule and latent scale of one model."""

    first_stage: FirstStage
    networks: Denoising
    schedule: Schedule
    objective: Objective
    """What the UNet predicts."""
    scale: float
    """Latents are multiplied by it before diffusion, divided by it before decoding."""
    latent_shape: tuple[int, int, int]
    """C, h, w."""
    classes: tuple[str, ...]

    def condition(self, labels: Tensor) -> Tensor | None:
        """Tokens (B, 1, D) of class labels (B,) int64, -1 asking for nothing; None without a conditioner.

        Raises:
            ContractError: the model is conditioned on something else.
        """
        conditioner = self.networks.conditioner
        if conditioner is None:
            return None
        if not isinstance(conditioner, ClassEmbedder):
            raise ContractError(
                "pictures can be asked for by class label alone so far, and this model is conditioned "
                f"otherwise (by its {type(conditioner).__name__})"
            )
        return conditioner(torch.where(labels < 0, conditioner.last_row, labels))

    def predict(self, x_t: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """The noise eps (B, C, h, w) in noisy scaled latents at time steps t (B,)."""
        prediction = self.networks.unet(x_t, t, context)
        return eps_of_prediction(prediction, x_t, t, schedule=self.schedule, objective=self.objective)

    def decode(self, latents: Tensor, *, micro_batch: int) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of scaled latents."""
        return decode_in_micro_batches(self.first_stage, latents / self.scale, micro_batch=micro_batch)

    @torch.no_grad()
    def sample_latents(
        self,
        labels: Sequence[int],
        sampling: Sampling,
        *,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Scaled latents (N, C, h, w), one per label.

        The noise of the i-th is keyed by (seed, i), and passes are padded to a fixed size, so that a picture
        does not depend on how many others were asked for.

        Args:
            labels: class indices; -1 asks for nothing in particular.
            sampling: steps, eta, guidance, micro-batch, seed.
            on_step: called with (evaluations done, evaluations in all).

        Raises:
            ContractError: a label outside the model's classes, or guidance of an unconditional model.
        """
        self.check(labels, sampling)
        size = sampling.micro_batch
        passes = -(-len(labels) // size)
        parts = []
        for start in range(0, len(labels), size):
            chosen = list(labels[start : start + size])
            padded = torch.tensor(chosen + [-1] * (size - len(chosen)))
            done = start // size * sampling.steps
            parts.append(
                self.sample_pass(
                    padded,
                    range(start, start + size),
                    sampling,
                    on_step=lambda i, n, done=done: on_step(done + i, passes * n) if on_step else None,
                )[: len(chosen)]
            )
        return torch.cat(parts)

    def check(self, labels: Sequence[int], sampling: Sampling) -> None:
        """Refuse what this model cannot sample."""
        conditioner = self.networks.conditioner
        known = conditioner.num_classes if isinstance(conditioner, ClassEmbedder) else 0
        has_null = not isinstance(conditioner, ClassEmbedder) or conditioner.has_null
        lowest = "-1 (none)" if has_null else "0"
        wrong = sorted({label for label in labels if not (-1 if has_null else 0) <= label < known})
        if wrong:
            raise ContractError(f"class labels must be {lowest} to {known - 1} for this model, got {wrong}")
        if sampling.guidance != 1.0 and not (known and has_null):
            raise ContractError(
                f"guidance ({sampling.guidance}) needs a conditional model with a null condition, and this "
                f"one {'has none' if known else 'is unconditional'}; use sampling.guidance=1"
            )

    def sample_pass(
        self,
        labels: Tensor,
        indices: range,
        sampling: Sampling,
        *,
        on_step: Callable[[int, int], None] | None,
    ) -> Tensor:
        """One padded pass: latents of the pictures with these indices."""

        def noise(purpose: str, step: int = 0) -> Tensor:
            draws = [
                torch.randn(self.latent_shape, generator=generator(sampling.seed, purpose, step, i))
                for i in indices
            ]
            return torch.stack(draws).contiguous(memory_format=torch.channels_last)

        context, null = self.condition(labels), self.condition(torch.full_like(labels, -1))
        if context is None or null is None:
            denoise = lambda x_t, t: self.predict(x_t, t, None)  # noqa: E731
        else:
            denoise = guide(self.predict, context, null, scale=sampling.guidance)
        return sample_ddim(
            denoise,
            noise("x_T"),
            schedule=self.schedule,
            steps=sampling.steps,
            eta=sampling.eta,
            noise=lambda step: noise("eta", step),
            on_step=on_step,
        )

    def sample(
        self,
        labels: Sequence[int],
        sampling: Sampling,
        *,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Pictures (N, 3, H, W) in [-1, 1], one per label; see `sample_latents`."""
        latents = self.sample_latents(labels, sampling, on_step=on_step)
        return self.decode(latents, micro_batch=sampling.micro_batch)


def restore_first_stage(config: FirstStageModel, weights: Mapping[str, Tensor]) -> FirstStage:
    """The first stage of a config with these weights, float32 on the CPU, in evaluation mode.

    Weights of another precision are converted. Nothing is drawn from the global random state.
    """
    with torch.device("meta"):
        model = build_first_stage(config)
    if isinstance(model, nn.Module):
        model.to_empty(device="cpu").load_state_dict(weights)
        model.eval().requires_grad_(False)
    return model


def load_first_stage(store: Store, manifest: Manifest) -> FirstStage:
    """The first stage of an artifact, with its averaged weights, in evaluation mode."""
    config = FirstStageModel.model_validate(manifest.content.what["model"])
    weights = {} if config.kind == "identity" else load(store.read(manifest, WEIGHTS))
    return restore_first_stage(config, weights)


def assemble(
    recipe: Recipe,
    networks: Denoising,
    first_stage: FirstStage,
    *,
    scale: float,
    classes: Sequence[str],
) -> LatentDiffusion:
    """The parts of a model put together as its recipe says."""
    diffusion, model = recipe.diffusion, recipe.first_stage.model
    return LatentDiffusion(
        first_stage=first_stage,
        networks=networks,
        schedule=linear_schedule(diffusion.num_timesteps, diffusion.linear_start, diffusion.linear_end),
        objective=diffusion.objective,
        scale=scale,
        latent_shape=(model.embed_dim, recipe.latent_size, recipe.latent_size),
        classes=tuple(classes),
    )
