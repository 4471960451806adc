"""Networks ready for use: a trained first stage as one object, and what is trained in the second stage.

B batch, C channels of the latent, h w its height and width, H W those of the picture.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load
from torch import Tensor, nn

from datasets.manifest import Manifest
from datasets.store import Store
from ldm.config import Recipe, require_divisible
from ldm.device import home, placed
from ldm.errors import ContractError
from ldm.first_stage_config import FirstStageModel
from ldm.models.band_plan import GIB, Coding, plan_rows
from ldm.models.bands import decode_in_bands, encode_in_bands
from ldm.models.conditioning import Conditioner, Hybrid, build_conditioner
from ldm.models.first_stage import FirstStage, VQModel, build_first_stage
from ldm.models.unet import UNet, build_unet

WEIGHTS = "weights.safetensors"
MAX_PIXEL = 1.001
"""Largest size of a pixel that still counts as lying in [-1, 1]."""


def moved(first_stage: FirstStage, device: torch.device | str) -> FirstStage:
    """The first stage, its weights moved to a device; the identity has none."""
    if isinstance(first_stage, nn.Module):
        first_stage.to(device)
    return first_stage


@dataclass(frozen=True)
class Autoencoder:
    """A trained first stage as one object; it checks what it is given, and computes where its weights are."""

    first_stage: FirstStage
    config: FirstStageModel

    def to(self, device: torch.device | str) -> "Autoencoder":
        """This first stage, its weights moved to a device."""
        moved(self.first_stage, device)
        return self

    def encode(self, x: Tensor, *, memory_gib: float | None = None) -> Tensor:
        """Latents (B, C, h, w): VQ before quantisation, KL the posterior's mean.

        Args:
            x: (B, 3, H, W) pictures in [-1, 1]; H and W divisible by f.
            memory_gib: work in bands that take no more memory than this beside the weights; None works whole.

        Raises:
            ContractError: another shape, a number that is not finite, a range that is not [-1, 1], or a
                budget that even the smallest bands exceed.
        """
        self.check_pictures(x)
        x = placed(x, home(self.first_stage, x.device)).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            if memory_gib is None:
                stored = self.first_stage.encode(x)
            else:
                rows = self.rows("encode", x, (x.shape[2], x.shape[3]), memory_gib)
                stored = encode_in_bands(self.first_stage, x, rows=rows)
            return self.first_stage.latent(stored, None)

    def decode(self, z: Tensor, *, memory_gib: float | None = None) -> Tensor:
        """Pictures (B, 3, h * f, w * f), nominally in [-1, 1], of unscaled latents; VQ quantises first.

        Args:
            z: (B, C, h, w) latents as `encode` gives them.
            memory_gib: work in bands that take no more memory than this beside the weights; None works whole.

        Raises:
            ContractError: another number of channels, a number that is not finite, or a budget that even the
                smallest bands exceed.
        """
        self.check_latents(z)
        z = placed(z, home(self.first_stage, z.device)).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            if memory_gib is None:
                return self.first_stage.decode(z)
            size = (z.shape[2] * self.config.factor, z.shape[3] * self.config.factor)
            return decode_in_bands(self.first_stage, z, rows=self.rows("decode", z, size, memory_gib))

    def decode_codes(self, indices: Tensor) -> Tensor:
        """Pictures (B, 3, h * f, w * f), nominally in [-1, 1], of codes of a VQ first stage.

        Args:
            indices: (B, h, w) int64, each 0 to the number of codes - 1.

        Raises:
            ContractError: this first stage has no codes, another shape or type, or an index out of range.
        """
        model = self.first_stage
        if not isinstance(model, VQModel):
            raise ContractError(
                f"only a VQ first stage has codes, this one is of kind {self.config.kind}; decode latents"
            )
        if indices.ndim != 3 or indices.dtype != torch.int64:
            raise ContractError(
                f"codes must be given as (B, h, w) int64, got {tuple(indices.shape)} {indices.dtype}; "
                "give one index for each position of the latent"
            )
        last = model.quantize.embedding.num_embeddings - 1
        wrong = indices[(indices < 0) | (indices > last)]
        if len(wrong):
            raise ContractError(
                f"indices of codes must be 0 to {last}, got {int(wrong[0])} and {len(wrong) - 1} others; "
                "were they made by another first stage?"
            )
        with torch.no_grad():
            return model.decode_codes(model.quantize.lookup(indices.to(home(model, indices.device))))

    def rows(self, coding: Coding, batch: Tensor, size: tuple[int, int], memory_gib: float) -> int:
        """Rows of a band with which coding a batch of pictures of this height and width stays in memory."""
        return plan_rows(
            self.config,
            *size,
            budget_bytes=memory_gib * GIB,
            coding=coding,
            batch=len(batch),
            itemsize=batch.element_size(),
        )

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

    def __init__(self, unet: UNet, conditioner: Conditioner | Hybrid | None) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner


def build_denoising(recipe: Recipe, *, num_classes: int) -> Denoising:
    """The networks of a recipe, freshly initialised from torch's global generator."""
    if recipe.unet.num_classes is not None:  # the table of class vectors ends with the null class
        num_classes = recipe.unet.num_classes - 1
    return Denoising(build_unet(recipe.unet), build_conditioner(recipe.conditioning, num_classes=num_classes))


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


def first_stage_weights(store: Store, manifest: Manifest) -> dict[str, Tensor]:
    """The averaged weights of a first stage's artifact; none for the identity."""
    is_identity = manifest.content.what["model"]["kind"] == "identity"
    return {} if is_identity else load(store.read(manifest, WEIGHTS))


def load_first_stage(store: Store, manifest: Manifest) -> FirstStage:
    """The first stage of an artifact, with its averaged weights, in evaluation mode."""
    config = FirstStageModel.model_validate(manifest.content.what["model"])
    return restore_first_stage(config, first_stage_weights(store, manifest))
