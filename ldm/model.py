"""A trained latent diffusion model as one object: encode, decode, condition, predict, sample.

B batch, C channels of the latent, h w its height and width, H W those of the picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load
from torch import Tensor, nn

from datasets.manifest import Manifest
from datasets.store import Store
from ldm.config import FirstStageModel, Recipe, Sampling
from ldm.diffusion.ddim import sample_ddim
from ldm.diffusion.guidance import guide
from ldm.diffusion.objective import Objective, eps_of_prediction
from ldm.diffusion.schedule import Schedule, linear_schedule
from ldm.errors import ContractError
from ldm.models.conditioning import ClassEmbedder, build_conditioner
from ldm.models.first_stage import FirstStage, build_first_stage, decode_in_micro_batches
from ldm.models.unet import UNet, build_unet
from ldm.training.randomness import generator

WEIGHTS = "weights.safetensors"


class Denoising(nn.Module):
    """What is trained in the second stage: the UNet and the conditioning encoder."""

    def __init__(self, unet: UNet, conditioner: ClassEmbedder | None) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner


def build_denoising(recipe: Recipe, *, num_classes: int) -> Denoising:
    """The networks of a recipe, freshly initialised from torch's global generator."""
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
        """Tokens (B, 1, D) of class labels (B,) int64, -1 asking for nothing; None without a conditioner."""
        conditioner = self.networks.conditioner
        if conditioner is None:
            return None
        return conditioner(torch.where(labels < 0, conditioner.num_classes, labels))

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
        known = self.networks.conditioner.num_classes if self.networks.conditioner is not None else 0
        wrong = sorted({label for label in labels if not -1 <= label < known})
        if wrong:
            raise ContractError(f"class labels must be -1 (none) to {known - 1} for this model, got {wrong}")
        if sampling.guidance != 1.0 and not known:
            raise ContractError(
                f"guidance ({sampling.guidance}) needs a conditional model with a null condition, and this "
                "one is unconditional; use sampling.guidance=1"
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


def load_first_stage(store: Store, manifest: Manifest) -> FirstStage:
    """The first stage of an artifact, with its averaged weights, in evaluation mode."""
    config = FirstStageModel.model_validate(manifest.content.what["model"])
    model = build_first_stage(config)
    if isinstance(model, nn.Module):
        model.load_state_dict(load(store.read(manifest, WEIGHTS)))
        model.eval().requires_grad_(False)
    return model


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
