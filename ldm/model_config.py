"""What a whole latent diffusion model is, outside a recipe: the config of a model folder."""

import operator
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ldm.config import Diffusion, Recipe
from ldm.first_stage_config import FirstStageModel
from ldm.network_config import (
    ClassConditioning,
    ClassVectorConditioning,
    Conditioning,
    Config,
    HybridConditioning,
    UNetConfig,
)

AnyConditioning = Conditioning | HybridConditioning
Weights = Literal["raw", "ema"]
"""The weights of the last training step, or their moving average."""


class LatentDiffusionModel(Config):
    """Networks, noise and scale of a latent diffusion model."""

    first_stage: FirstStageModel
    unet: UNetConfig
    conditioning: Annotated[AnyConditioning, Field(discriminator="kind")] | None = None
    num_classes: int = Field(default=0, ge=0)
    """Classes it was trained on, without the null class; 0 for a model without class labels."""
    class_names: tuple[str, ...] = Field(default=(), exclude_if=operator.not_)
    """What the classes are called, in their order; () where they have numbers alone."""
    diffusion: Diffusion
    elbo_weight: float = Field(default=0.0, ge=0)
    """Weight of the terms of the variational bound in its training loss; 0 in all published configs."""
    scale: float = Field(default=1.0, gt=0)
    """Latents are multiplied by it before diffusion."""
    latent_size: int = Field(ge=1)
    """Side of the square latents that it was trained on."""
    has_ema: bool = False
    """Whether the moving average of the UNet's weights is there beside the raw ones."""

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return self.first_stage.embed_dim

    @property
    def can_guide(self) -> bool:
        """Whether it was trained with conditions left out, which guidance needs."""
        conditioning = self.conditioning
        return conditioning is not None and conditioning.has_null and conditioning.drop_rate > 0

    @model_validator(mode="after")
    def check(self) -> Self:
        """The parts fit together."""
        unet, latent, conditioning = self.unet, self.first_stage.embed_dim, self.conditioning
        beside = 0 if conditioning is None else conditioning.concat_channels(latent)
        if (unet.in_channels, unet.out_channels) != (latent + beside, latent):
            raise ValueError(
                f"the UNet must have {latent + beside} channels in (the latent's {latent}, the condition's "
                f"{beside}) and {latent} out, got {unet.in_channels} and {unet.out_channels}"
            )
        wanted = None if conditioning is None else conditioning.context_dim
        if unet.context_dim != wanted:
            raise ValueError(
                f"the UNet's context_dim ({unet.context_dim}) must be the width of the condition's tokens "
                f"({wanted})"
            )
        by_vector = isinstance(conditioning, ClassVectorConditioning)
        if (unet.num_classes is not None) != by_vector:
            raise ValueError(f"a UNet's num_classes ({unet.num_classes}) is for class vectors alone")
        tokens = conditioning.tokens if isinstance(conditioning, HybridConditioning) else conditioning
        if (self.num_classes > 0) != isinstance(tokens, ClassConditioning | ClassVectorConditioning):
            raise ValueError(f"num_classes ({self.num_classes}) is for models of class labels, and only them")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"class_names must name all {self.num_classes} classes, got {len(self.class_names)} names; "
                "leave them out, or name each"
            )
        return self


def model_config_of(recipe: Recipe, *, scale: float, classes: Sequence[str]) -> LatentDiffusionModel:
    """What the model is that a recipe trains.

    Args:
        recipe: the run.
        scale: of its latents.
        classes: names of the data set's classes; a model without class labels leaves them out.
    """
    unet, labels = recipe.unet, isinstance(recipe.conditioning, ClassConditioning | ClassVectorConditioning)
    num_classes = len(classes) if unet.num_classes is None else unet.num_classes - 1
    return LatentDiffusionModel(
        first_stage=recipe.first_stage.model,
        unet=unet,
        conditioning=recipe.conditioning,
        num_classes=num_classes if labels else 0,
        class_names=tuple(classes) if labels and len(classes) == num_classes else (),
        diffusion=recipe.diffusion,
        scale=scale,
        latent_size=recipe.latent_size,
    )
