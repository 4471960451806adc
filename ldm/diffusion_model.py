"""A latent diffusion model of a model folder as one object: encode, decode, condition, predict, sample.

B batch, C channels of the latent, h w its height and width, H W those of the picture.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditions import Condition, encode_condition, fields_of, null_condition
from ldm.config import require_divisible
from ldm.diffusion.guidance import guide
from ldm.diffusion.objective import (
    Denoiser,
    eps_of_prediction,
    prediction_loss,
    vlb_weights,
    with_log_variance,
)
from ldm.diffusion.samplers import sample, timesteps_of
from ldm.diffusion.schedule import Schedule, build_schedule
from ldm.diffusion.times import Correction, NoiseSource, OnStep
from ldm.errors import ContractError
from ldm.model import Autoencoder, Denoising, LatentDiffusion, check_finite
from ldm.model_config import LatentDiffusionModel
from ldm.models.conditioning import ClassEmbedder
from ldm.models.first_stage import VQModel
from ldm.training.randomness import generator


@dataclass(frozen=True)
class DiffusionModel:
    """A latent diffusion model ready for use, its latents scaled; it checks what it is given."""

    autoencoder: Autoencoder
    networks: Denoising
    config: LatentDiffusionModel
    log_variance: Tensor | None = None
    """(T,) learned logarithm of the error's variance at each time step, if the model has one."""

    @property
    def schedule(self) -> Schedule:
        """The forward process."""
        return build_schedule(self.config.diffusion)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.networks.parameters()).device

    def to(self, device: torch.device | str) -> "DiffusionModel":
        """This model, its weights moved to a device."""
        self.networks.to(device)
        if isinstance(self.autoencoder.first_stage, nn.Module):
            self.autoencoder.first_stage.to(device)
        return self

    def encode(self, x: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) of pictures (B, 3, H, W) in [-1, 1]: VQ unquantised, KL the mean.

        Raises:
            ContractError: see `Autoencoder.encode`.
        """
        return self.config.scale * self.autoencoder.encode(x)

    def decode(self, z: Tensor, *, quantise: bool = True) -> Tensor:
        """Pictures (B, 3, H, W), nominally in [-1, 1], of scaled latents (B, C, h, w).

        Args:
            z: scaled latents.
            quantise: whether a VQ first stage takes the nearest codes first, as it was trained.

        Raises:
            ContractError: see `Autoencoder.decode`.
        """
        first_stage, unscaled = self.autoencoder.first_stage, z / self.config.scale
        if quantise or not isinstance(first_stage, VQModel):
            return self.autoencoder.decode(unscaled)
        self.autoencoder.check_latents(unscaled)
        with torch.no_grad():
            return first_stage.decode_codes(unscaled.contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def condition(self, **given: Any) -> Condition:
        """What the UNet gets of a batch of conditions; field names and shapes are in `ldm.conditions`.

        For example `model.condition(class_label=torch.tensor([3, 7]))`.

        Raises:
            ContractError: a field is missing, unknown, of another shape or out of its range.
        """
        return encode_condition(
            {name: on(value, self.device) for name, value in given.items()},
            self.config.conditioning,
            self.networks.conditioner,
            num_classes=self.config.num_classes,
            autoencoder=self.autoencoder,
        )

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
        self.check(x_t, t, condition)
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
        self.check(z, t, condition)
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
        sampler: str = "ddim",
        steps: int = 50,
        eta: float = 0.0,
        guidance: float = 1.0,
        null: Condition | None = None,
        seed: int = 0,
        start: Tensor | None = None,
        noise: NoiseSource | None = None,
        times: list[int] | None = None,
        correct: Correction | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Scaled latents (B, C, h, w), one for each condition.

        Args:
            condition: of `condition`; None for an unconditional model.
            num: B of an unconditional model.
            sampler: see `ldm.diffusion.samplers`.
            steps: of the sampler.
            eta: noise of ddim, 0 to 1.
            guidance: scale of classifier-free guidance; 1 is none.
            null: what stands for nothing; by default the model's own null condition.
            seed: of all noise; that of the i-th picture is keyed by (seed, i).
            start: x_T (B, C, h, w), the noise to start from, instead of the seed's.
            noise: noise by step index, (B, C, h, w), instead of the seed's.
            times: falling time steps instead of the sampler's.
            correct: changes x before each step (`ldm.diffusion.editing`).
            on_step: told after each step.

        Raises:
            ContractError: a condition that does not fit, or guidance without a null condition.
            ValueError: a sampler or a number of steps that there is not.
        """
        count = len(start) if start is not None else len(condition) if condition is not None else num
        shape = (self.config.latent_channels, *self.latent_sides(condition))

        def keyed(purpose: str, step: int = 0) -> Tensor:
            draws = [torch.randn(shape, generator=generator(seed, purpose, step, i)) for i in range(count)]
            return torch.stack(draws).to(self.device)

        start = keyed("x_T") if start is None else start
        for each in (condition, null) if null is not None else (condition,):
            self.check(start, torch.zeros(count, dtype=torch.int64), each)
        return sample(
            sampler,
            self.denoiser(condition, guidance=guidance, null=null),
            x_T=start.contiguous(memory_format=torch.channels_last),
            schedule=self.schedule,
            times=timesteps_of(sampler, self.schedule, steps) if times is None else times,
            eta=eta,
            noise=noise or (lambda step: keyed("eta", step)),
            correct=correct,
            on_step=on_step,
        )

    def sample(self, condition: Condition | None = None, **settings: Any) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1]; the settings are those of `sample_latents`."""
        return self.decode(self.sample_latents(condition, **settings)).clamp(-1.0, 1.0)

    def denoiser(
        self, condition: Condition | None, *, guidance: float = 1.0, null: Condition | None = None
    ) -> Denoiser:
        """(x_t, t) -> eps with its conditions bound, guided when asked for: what samplers take.

        It does not check its arguments, and gradients pass it, as image guiding needs.
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
        )

    def latent_sides(self, condition: Condition | None) -> tuple[int, int]:
        """Height and width of latents: the maps' of the condition, or those of training."""
        if condition is not None and condition.concat is not None:
            return condition.concat.shape[2], condition.concat.shape[3]
        return self.config.latent_size, self.config.latent_size

    def check(self, x_t: Tensor, t: Tensor, condition: Condition | None) -> None:
        """Refuse what the UNet does not take."""
        channels, unet = self.config.latent_channels, self.config.unet
        if x_t.ndim != 4 or x_t.shape[1] != channels:
            raise ContractError(
                f"noisy latents of this model must have the shape (B, {channels}, h, w), got "
                f"{tuple(x_t.shape)}"
            )
        for side in x_t.shape[2:]:
            levels = 2 ** (len(unet.channel_mult) - 1)
            require_divisible("the side of a latent", side, levels, "the UNet's levels", error=ContractError)
        check_finite("noisy latents", x_t)
        if t.shape != (len(x_t),) or t.is_floating_point():
            raise ContractError(
                f"time steps must be integers of shape ({len(x_t)},), got {t.dtype} {tuple(t.shape)}"
            )
        last = self.config.diffusion.num_timesteps - 1
        if len(t) and not 0 <= int(t.min()) <= int(t.max()) <= last:
            raise ContractError(f"time steps must be 0 to {last}, got {int(t.min())} to {int(t.max())}")
        self.check_condition(x_t, condition or Condition())

    def check_condition(self, x_t: Tensor, condition: Condition) -> None:
        """Refuse a condition that is not what the UNet needs beside these latents."""
        unet, wanted = self.config.unet, dict[str, str]()
        if unet.context_dim is not None:
            wanted["context"] = f"({len(x_t)}, L, {unet.context_dim})"
        if unet.in_channels > self.config.latent_channels:
            beside = unet.in_channels - self.config.latent_channels
            wanted["concat"] = str((len(x_t), beside, *x_t.shape[2:]))
        if unet.num_classes is not None:
            wanted["label"] = f"({len(x_t)},)"
        given = condition.parts()
        fits = given.keys() == wanted.keys() and all(
            wanted[name] == shape_like(wanted[name], tensor) for name, tensor in given.items()
        )
        if not fits:
            told = {name: tuple(tensor.shape) for name, tensor in given.items()}
            made = ", ".join(fields_of(self.config.conditioning))
            raise ContractError(
                f"the UNet takes {wanted or 'no condition'} beside these latents, got {told or 'none'}; make "
                f"it by model.condition({made})"
            )

    def labelled(self) -> LatentDiffusion:
        """This model as one of class labels or of nothing, whose pictures do not depend on their number.

        Raises:
            ContractError: it is conditioned on something else.
        """
        conditioner = self.networks.conditioner
        if conditioner is not None and not isinstance(conditioner, ClassEmbedder):
            assert self.config.conditioning is not None
            raise ContractError(
                "samples can be asked for by class label alone here, and this model is conditioned on "
                f"{self.config.conditioning.kind}; use ldm.load(...).sample"
            )
        size = self.config.latent_size
        return LatentDiffusion(
            first_stage=self.autoencoder.first_stage,
            networks=self.networks,
            schedule=self.schedule,
            objective=self.config.diffusion.objective,
            scale=self.config.scale,
            latent_shape=(self.config.latent_channels, size, size),
            classes=tuple(map(str, range(self.config.num_classes))),
        )


def shape_like(wanted: str, tensor: Tensor) -> str:
    """The shape of a tensor, its number of tokens written as L where the wanted shape has it so."""
    shape = [str(size) for size in tensor.shape]
    if "L" in wanted and len(shape) == 3:
        shape[1] = "L"
    return f"({', '.join(shape)}{',' if len(shape) == 1 else ''})"


def on(value: object, device: torch.device) -> object:
    """The value, on a device if it is a tensor."""
    return value.to(device) if isinstance(value, Tensor) else value
