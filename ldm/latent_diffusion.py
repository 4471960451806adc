"""A latent diffusion model as one object: encode, decode, condition, predict, sample.

B batch, C channels of the latent, h w its height and width, H W those of the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ldm.conditions import Condition, encode_condition, null_condition
from ldm.config import Recipe
from ldm.device import placed
from ldm.diffusion.guidance import guide
from ldm.diffusion.objective import (
    Denoiser,
    eps_of_prediction,
    prediction_loss,
    vlb_weights,
    with_log_variance,
)
from ldm.diffusion.schedule import Schedule, build_schedule
from ldm.diffusion.times import NoiseSource, OnStep
from ldm.edits import Edit, latent_edit
from ldm.errors import ContractError
from ldm.model import Autoencoder, Denoising
from ldm.model_config import LatentDiffusionModel, model_config_of
from ldm.models.first_stage import FirstStage, VQModel, decode_in_micro_batches
from ldm.sampling import MICRO_BATCH, draw, passes, rows_of, sampling_of
from ldm.unet_inputs import check_inputs


@dataclass(frozen=True)
class LatentDiffusion:
    """A latent diffusion model ready for use, its latents scaled; it checks what it is given."""

    autoencoder: Autoencoder
    networks: Denoising
    config: LatentDiffusionModel
    log_variance: Tensor | None = None
    """(T,) learned logarithm of the error's variance at each time step, if the model has one."""

    @cached_property
    def schedule(self) -> Schedule:
        """The forward process."""
        return build_schedule(self.config.diffusion)

    @property
    def first_stage(self) -> FirstStage:
        """The first stage, which checks nothing."""
        return self.autoencoder.first_stage

    @property
    def classes(self) -> tuple[str, ...]:
        """What its classes are called; their numbers where they have no names; () without class labels."""
        return self.config.class_names or tuple(map(str, range(self.config.num_classes)))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """C, h, w of the latents that it was trained on."""
        return (self.config.latent_channels, self.config.latent_size, self.config.latent_size)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.networks.parameters()).device

    def to(self, device: torch.device | str) -> "LatentDiffusion":
        """This model, its weights moved to a device."""
        self.networks.to(device)
        self.autoencoder.to(device)
        return self

    def encode(self, x: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) of pictures (B, 3, H, W) in [-1, 1]: VQ unquantised, KL the mean.

        Raises:
            ContractError: see `Autoencoder.encode`.
        """
        return self.config.scale * self.autoencoder.encode(placed(x, self.device))

    def decode(self, z: Tensor, *, quantise: bool = True) -> Tensor:
        """Pictures (B, 3, H, W), nominally in [-1, 1], of scaled latents (B, C, h, w).

        Args:
            z: scaled latents.
            quantise: whether a VQ first stage takes the nearest codes first, as it was trained.

        Raises:
            ContractError: see `Autoencoder.decode`.
        """
        first_stage, unscaled = self.autoencoder.first_stage, placed(z, self.device) / self.config.scale
        if quantise or not isinstance(first_stage, VQModel):
            return self.autoencoder.decode(unscaled)
        self.autoencoder.check_latents(unscaled)
        with torch.no_grad():
            return first_stage.decode_codes(unscaled.contiguous(memory_format=torch.channels_last))

    def decode_with_gradient(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), not clamped, of scaled latents, differentiable, for image guiding.

        The gradient passes a codebook as in training, straight through.
        """
        unscaled, first_stage = z / self.config.scale, self.first_stage
        if isinstance(first_stage, VQModel):
            return first_stage.decode_codes(first_stage.quantize(unscaled).latent)
        return first_stage.decode(unscaled)

    @torch.no_grad()
    def condition(self, **given: Any) -> Condition:
        """What the UNet gets of a batch of conditions; field names and shapes are in `ldm.conditions`.

        For example `model.condition(class_label=torch.tensor([3, 7]))`. Each is encoded by itself, so that
        none depends on the others.

        Raises:
            ContractError: a field is missing, unknown, of another shape or out of its range.
        """
        encoded = [
            encode_condition(
                {name: on(value, self.device) for name, value in row.items()},
                self.config.conditioning,
                self.networks.conditioner,
                num_classes=self.config.num_classes,
                autoencoder=self.autoencoder,
            )
            for row in rows_of(given)
        ]
        parts = [row.parts() for row in encoded]
        return Condition(**{name: torch.cat([row[name] for row in parts]) for name in parts[0]})

    @torch.no_grad()
    def null(self, like: Condition) -> Condition:
        """As many conditions as `like` that ask for nothing.

        Raises:
            ContractError: this model was trained with conditions alone.
        """
        if not self.config.can_guide:
            kind = None if self.config.conditioning is None else self.config.conditioning.kind
            raise ContractError(
                "guidance needs a model that was trained with a null condition, and this one "
                f"({f'conditioned on {kind}' if kind else 'unconditional'}) was not; use guidance=1, or "
                "give the condition that stands for nothing as `null`"
            )
        return null_condition(
            like, self.config.conditioning, self.networks.conditioner, num_classes=self.config.num_classes
        )

    @torch.no_grad()
    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The noise eps (B, C, h, w) in noisy scaled latents at time steps t (B,) int64.

        Raises:
            ContractError: latents or time steps of another shape, or a condition that does not fit.
        """
        check_inputs(self.config, x_t, t, condition or Condition())
        return self.eps(x_t, t, condition)

    def eps(self, x_t: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        """What `predict` gives, unchecked and with gradients."""
        prediction = self.denoise(x_t, t, condition)
        objective = self.config.diffusion.objective
        return eps_of_prediction(prediction, x_t, t, schedule=self.schedule, objective=objective)

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        """What the UNet says, unchecked and with gradients: noise, v or the latent, by the objective."""
        given = condition or Condition()
        return self.networks.unet(x_t, t, given.context, concat=given.concat, label=given.label)

    @torch.no_grad()
    def losses(
        self, z: Tensor, t: Tensor, eps: Tensor, condition: Condition | None = None
    ) -> dict[str, Tensor]:
        """The training loss of scaled latents (B, C, h, w), noised by eps to time steps t (B,); its parts.

        Returns:
            Scalars: `loss_simple`, the mean error; `loss_vlb`, that error weighted as in the variational
            bound; `loss`, what training minimised.

        Raises:
            ContractError: see `predict`.
        """
        check_inputs(self.config, z, t, condition or Condition())
        schedule, diffusion = self.schedule, self.config.diffusion
        simple = prediction_loss(
            lambda x_t, t: self.denoise(x_t, t, condition),
            z,
            t,
            eps,
            schedule=schedule,
            objective=diffusion.objective,
            distance=diffusion.loss,
        )
        vlb = (vlb_weights(schedule).to(simple)[t] * simple).mean()
        learned = None if self.log_variance is None else self.log_variance.to(simple.device)
        weighed = simple if learned is None else with_log_variance(simple, learned, t)
        loss = weighed.mean() + self.config.elbo_weight * vlb
        return {"loss": loss, "loss_simple": simple.mean(), "loss_vlb": vlb}

    @torch.no_grad()
    def sample_latents(
        self,
        condition: Condition | None = None,
        *,
        num: int = 1,
        null: Condition | None = None,
        edit: Edit | None = None,
        start: Tensor | None = None,
        noise: NoiseSource | None = None,
        on_step: OnStep | None = None,
        micro_batch: int = MICRO_BATCH,
        **settings: Any,
    ) -> Tensor:
        """Scaled latents (B, C, h, w) on the CPU, one for each condition.

        All noise of the i-th is keyed by (seed, i), and passes are padded to `micro_batch`, so its bits do
        not depend on how many others are drawn. Another micro-batch changes last bits.

        Args:
            condition: of `condition`; None for an unconditional model.
            num: B of an unconditional model.
            null: what stands for nothing, one for each condition; by default the model's own null condition.
            edit: pictures to change, to keep parts of, or to draw towards.
            start: x_T (B, C, h, w), the noise to start from, instead of the seed's.
            noise: noise by step index, (B, C, h, w), instead of the seed's.
            on_step: told after each step with (steps done, steps of all passes).
            micro_batch: latents per forward pass.
            settings: the other fields of `ldm.config.Sampling`: sampler, steps, eta, guidance,
                guidance_interval, guidance_rescale, seed.

        Raises:
            ContractError: a condition or an edit that does not fit, or guidance without a null condition.
            RecipeError: a setting that there is not, or one out of its range.
        """
        num_timesteps = self.config.diffusion.num_timesteps if start is None else None
        sampling = sampling_of(settings | {"micro_batch": micro_batch}, num_timesteps=num_timesteps)
        condition, edit = condition or Condition(), (edit or Edit()).to(self.device)
        shape = self.shape_of(condition, edit) if start is None else tuple(start.shape[1:])
        count = len(start) if start is not None else len(condition) or num
        blank, t = torch.zeros(count, *shape), torch.zeros(count, dtype=torch.int64)
        for each in (condition,) if null is None else (condition, null):
            check_inputs(self.config, blank if start is None else start, t, each)
        factor = self.autoencoder.config.factor
        edit.check_fits(count, (shape[1] * factor, shape[2] * factor))
        edited = latent_edit(edit, self.encode, factor)
        parts, drawn = passes(count, sampling.micro_batch), []
        for number, part in enumerate(parts):
            denoise = self.denoiser(
                condition.rows(part.rows),
                guidance=sampling.guidance,
                interval=sampling.guidance_interval,
                rescale=sampling.guidance_rescale,
                null=None if null is None else null.rows(part.rows),
            )
            first = part.noise(shape, sampling.seed, "x_T") if start is None else start[part.rows]
            latents = draw(
                denoise,
                part,
                sampling,
                edited.rows(part.rows),
                start=first.to(self.device),
                noise=noise,
                schedule=self.schedule,
                decode=self.decode_with_gradient,
                on_step=None if on_step is None else partial(on_pass, on_step, number, len(parts)),
            )
            drawn.append(latents[: len(part.indices)].cpu())
        return torch.cat(drawn)

    @torch.no_grad()
    def sample(
        self,
        condition: Condition | None = None,
        *,
        edit: Edit | None = None,
        micro_batch: int = MICRO_BATCH,
        **settings: Any,
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] on the CPU, one for each condition.

        Arguments and errors are those of `sample_latents`. What a mask keeps of an edit's image is put back
        as it is.
        """
        latents = self.sample_latents(condition, edit=edit, micro_batch=micro_batch, **settings)
        pictures = decode_in_micro_batches(
            self.first_stage, latents / self.config.scale, micro_batch=micro_batch
        )
        return pictures if edit is None else edit.pasted(pictures)

    def denoiser(
        self,
        condition: Condition | None,
        *,
        guidance: float = 1.0,
        interval: tuple[int, int] | None = None,
        rescale: float = 0.0,
        null: Condition | None = None,
    ) -> Denoiser:
        """(x_t, t) -> eps with its conditions bound, guided when asked for: what samplers take.

        It does not check its arguments, and gradients pass it, as image guiding needs. See
        `ldm.diffusion.guidance.guide` for the numbers.

        Raises:
            ContractError: guidance without a null condition.
        """
        if guidance == 1.0:
            return lambda x_t, t: self.eps(x_t, t, condition)
        given = condition or Condition()
        nothing = self.null(given) if null is None else null
        both, rows = nothing.followed_by(given), torch.arange(2 * len(given), device=self.device)
        return guide(
            lambda x_t, t, chosen: self.eps(x_t, t, both.rows(chosen)),
            rows[len(given) :],
            rows[: len(given)],
            scale=guidance,
            interval=interval,
            rescale=rescale,
        )

    def shape_of(self, condition: Condition, edit: Edit) -> tuple[int, int, int]:
        """C, h, w: those of the condition's maps, of the image to edit, or of training."""
        if condition.concat is not None:
            return (self.config.latent_channels, condition.concat.shape[2], condition.concat.shape[3])
        if edit.image is not None:
            height, width = (side // self.autoencoder.config.factor for side in edit.image.shape[2:])
            return (self.config.latent_channels, height, width)
        return self.latent_shape


def on_pass(on_step: OnStep, number: int, num_passes: int, done: int, steps: int) -> None:
    """Tell of a step of one pass as one of all."""
    on_step(number * steps + done, num_passes * steps)


def on(value: object, device: torch.device) -> object:
    """The value, on a device if it is a tensor."""
    return value.to(device) if isinstance(value, Tensor) else value


def class_condition(model: LatentDiffusion, labels: Sequence[int]) -> Condition | None:
    """The condition of class labels, -1 asking for none; None of a model without classes."""
    return model.condition(class_label=torch.tensor(labels)) if model.classes else None


def assemble(
    recipe: Recipe,
    networks: Denoising,
    first_stage: FirstStage,
    *,
    scale: float,
    classes: Sequence[str],
) -> LatentDiffusion:
    """The parts of a model put together as its recipe says; `classes` are the data set's names of them."""
    config = model_config_of(recipe, scale=scale, classes=classes)
    return LatentDiffusion(Autoencoder(first_stage, config.first_stage), networks, config)
