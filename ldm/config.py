"""The parts of a recipe as typed, frozen values with their limits; `ldm.recipe` reads them from YAML.

No value is an import path (ADR 0004).
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from datasets.config import DatasetConfig
from ldm.network_config import (
    ClassVectorConditioning,
    Conditioning,
    Config,
    LowResConditioning,
    SegmentationConditioning,
    UNetConfig,
)


class FirstStageModel(Config):
    """Network of a first stage (paper Tab. 8, App. G)."""

    kind: Literal["vq", "kl", "identity"]
    """Regularisation of the latent; `identity` is the pixel baseline, f = 1."""
    channels: int = Field(default=128, ge=1)
    """Width of the first level."""
    channel_mult: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1,), min_length=1)
    """Width of each level as a multiple of `channels`; each level but the first halves the resolution."""
    num_res_blocks: int = Field(default=2, ge=1)
    """Residual blocks per level (the decoder has one more)."""
    attention_factors: tuple[int, ...] = ()
    """Downsampling factors at which every block is followed by attention."""
    mid_attention: bool = True
    """Attention at the lowest resolution."""
    z_channels: int = Field(default=3, ge=1)
    """Channels between encoder and `quant_conv`."""
    embed_dim: int = Field(default=3, ge=1)
    """Channels of the latent."""
    num_codes: int | None = Field(default=None, ge=2)
    """Size of the codebook |Z|; VQ only."""
    beta: float = Field(default=0.25, ge=0)
    """Weight of the codebook term against the commitment term; VQ only."""
    norm_groups: int = Field(default=32, ge=1)
    """Groups of every GroupNorm."""
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @property
    def factor(self) -> int:
        """f: how many picture pixels make one latent position along each side."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def stored_channels(self) -> int:
        """Channels a latent shard holds: twice the latent's for KL (mean and log-variance)."""
        return 2 * self.embed_dim if self.kind == "kl" else self.embed_dim

    @model_validator(mode="after")
    def check(self) -> Self:
        """Reject what no network can be built from."""
        if self.kind == "vq" and self.num_codes is None:
            raise ValueError(
                "a VQ first stage needs num_codes, the size of its codebook; set model.num_codes"
            )
        if self.kind == "identity" and (self.factor != 1 or self.embed_dim != 3):
            raise ValueError(
                "an identity first stage has f = 1 and 3 channels; leave channel_mult and embed_dim out"
            )
        for mult in self.channel_mult if self.kind != "identity" else ():
            if self.channels * mult % self.norm_groups:
                raise ValueError(
                    f"channels * channel_mult ({self.channels} * {mult}) must be divisible by norm_groups "
                    f"({self.norm_groups}); choose widths that are multiples of it"
                )
        return self


class FirstStageLoss(Config):
    """Objective of a first stage (paper App. G)."""

    perceptual_weight: float = Field(default=1.0, ge=0)
    """Weight of LPIPS, added to every pixel's L1 distance."""
    perceptual_start_images: int = Field(default=0, ge=0)
    """Images seen before LPIPS joins in."""
    adversarial_weight: float = Field(default=0.75, ge=0)
    """Factor on the adaptive weight of the generator's adversarial term."""
    adversarial_start_images: int = Field(default=0, ge=0)
    """Images seen before the discriminator joins in."""
    kl_weight: float = Field(default=1e-6, ge=0)
    """Weight of the KL term, which like the reconstruction term is summed over a picture; KL only."""
    codebook_weight: float = Field(default=1.0, ge=0)
    """Weight of the codebook and commitment terms; VQ only."""
    discriminator_channels: int = Field(default=64, ge=1)
    discriminator_layers: int = Field(default=3, ge=1)
    discriminator_lr: float | None = Field(default=None, gt=0)
    """Learning rate of the discriminator; by default the autoencoder's."""
    revive_after_images: int = Field(default=0, ge=0)
    """A code unused for so many images moves onto a latent of the batch; 0 leaves dead ones dead. VQ only."""


class Training(Config):
    """A training run, counted in images seen."""

    num_images: int = Field(gt=0)
    """Images seen at the end; steps are num_images / batch_size."""
    batch_size: int = Field(gt=0)
    lr: float = Field(gt=0)
    """Learning rate at its height."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` falls to a hundredth of `lr` at the end."""
    warmup_images: int = Field(default=0, ge=0)
    """Images over which the learning rate rises from zero."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.01, ge=0)
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Decay of the averaged weights per step, reached by min(decay, (1 + n) / (10 + n))."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient; None leaves it alone."""
    mirror: bool = False
    """Mirror pictures left to right with probability 1/2."""
    seed: int = 0
    picture_every_images: int = Field(default=50_000, gt=0)
    """Images between pictures for people to look at."""

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.num_images // self.batch_size

    @model_validator(mode="after")
    def check(self) -> Self:
        """A run has at least one step."""
        if self.num_steps < 1:
            raise ValueError(
                f"num_images ({self.num_images}) must reach one batch ({self.batch_size}); set it higher"
            )
        return self


class FirstStageRecipe(Config):
    """One first stage: network, objective, training."""

    name: str
    description: str = ""
    model: FirstStageModel
    loss: FirstStageLoss = FirstStageLoss()
    training: Training | None = None
    """None for the identity, which has nothing to train."""

    @model_validator(mode="after")
    def check(self) -> Self:
        """Whatever has weights must be trained."""
        if self.model.kind != "identity" and self.training is None:
            raise ValueError(f"first stage {self.name!r} has weights, so it needs a `training` section")
        return self


class Encoding(Config):
    """How the corpus becomes latents."""

    dtype: Literal["float32", "float16"] = "float32"
    """Type of the stored latents."""
    micro_batch: int = Field(default=64, gt=0)
    """Pictures per forward pass, the last one padded; part of the bits."""


class Diffusion(Config):
    """The forward process and what the UNet predicts (paper App. B, eq. 2)."""

    num_timesteps: int = Field(default=1000, ge=2)
    linear_start: float = Field(default=0.0015, gt=0, lt=1)
    linear_end: float = Field(default=0.0195, gt=0, lt=1)
    """First and last beta; the square roots are spaced evenly."""
    objective: Literal["eps", "v"] = "eps"
    """What the UNet predicts: the noise, or v (Salimans & Ho 2022), which gets large shapes right sooner."""


class Sampling(Config):
    """How pictures are drawn."""

    sampler: Literal["ddim"] = "ddim"
    steps: int = Field(default=50, ge=1)
    eta: float = Field(default=0.0, ge=0)
    guidance: float = Field(default=1.0, ge=0)
    """Classifier-free guidance scale; 1 is none."""
    micro_batch: int = Field(default=64, gt=0)
    """Latents per forward pass, the last one padded; part of the bits."""
    seed: int = 0


class Evaluation(Config):
    """How a model is scored."""

    num_images: int = Field(default=400, ge=4)
    """Pictures in every set: samples, reconstructions, noise decodings, and each half of the real ones."""
    micro_batch: int = Field(default=25, gt=0)
    """Pictures per pass of the FID Inception, the last one padded."""
    classifier_images: int = Field(default=60_000, ge=0)
    """Images the class judge is trained on."""
    grid_per_class: int = Field(default=4, ge=1)


class Recipe(Config):
    """One complete run."""

    name: str
    description: str = ""
    dataset: DatasetConfig
    first_stage: FirstStageRecipe
    encoding: Encoding = Encoding()
    unet: UNetConfig
    conditioning: Conditioning | None = Field(default=None, discriminator="kind")
    diffusion: Diffusion = Diffusion()
    training: Training
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()
    threads: int = Field(default=2, ge=1)
    """Threads of every computation on a CPU; other counts give other last bits, so it is part of the key."""

    @property
    def latent_size(self) -> int:
        """Side of the square latent."""
        return self.dataset.image_size_px // self.first_stage.model.factor

    @property
    def num_classes(self) -> int:
        """Classes of the data set."""
        return len(self.dataset.classes)

    @model_validator(mode="after")
    def check(self) -> Self:
        """The parts fit together."""
        size, factor = self.dataset.image_size_px, self.first_stage.model.factor
        unet = self.unet
        require_divisible("dataset.image_size_px", size, factor, "the first stage's f")
        require_divisible(
            "the latent's side", size // factor, 2 ** (len(unet.channel_mult) - 1), "the UNet's levels"
        )
        check_unet(self)
        if self.sampling.guidance != 1.0 and (self.conditioning is None or not self.conditioning.has_null):
            raise ValueError(
                f"sampling.guidance ({self.sampling.guidance}) needs `conditioning` with a null condition; "
                "use 1 without one"
            )
        return self


def check_unet(recipe: Recipe) -> None:
    """Refuse a UNet that does not fit the latent and the condition."""
    unet, conditioning, first_stage = recipe.unet, recipe.conditioning, recipe.first_stage.model
    latent = first_stage.embed_dim
    beside = 0 if conditioning is None else conditioning.concat_channels(latent)
    if (unet.in_channels, unet.out_channels) != (latent + beside, latent):
        also = f", in_channels with the condition's {beside} on top" if beside else ""
        raise ValueError(
            f"unet.in_channels and unet.out_channels ({unet.in_channels}, {unet.out_channels}) must equal "
            f"the latent's channels, first_stage.model.embed_dim ({latent}){also}"
        )
    wanted = None if conditioning is None else conditioning.context_dim
    if unet.context_dim != wanted:
        raise ValueError(
            f"unet.context_dim ({unet.context_dim}) must equal conditioning.context_dim ({wanted})"
        )
    if (unet.num_classes is not None) != isinstance(conditioning, ClassVectorConditioning):
        raise ValueError(
            f"unet.num_classes ({unet.num_classes}) belongs to `conditioning: {{kind: class_vector}}`; "
            "set both or neither"
        )
    if (
        isinstance(conditioning, LowResConditioning | SegmentationConditioning)
        and conditioning.factor != first_stage.factor
    ):
        raise ValueError(
            f"a {conditioning.kind} condition comes at 1/{conditioning.factor} of the picture's side, but it "
            f"must have the latent's, 1/{first_stage.factor}; choose a first stage of "
            f"f = {conditioning.factor}, or change it"
        )


def require_divisible(
    what: str, value: int, divisor: int, why: str, *, error: type[Exception] = ValueError
) -> None:
    """Raise `error` with the neighbours that would do, unless `divisor` divides `value`."""
    if value % divisor:
        below, above = value // divisor * divisor, -(-value // divisor) * divisor
        cure = f"use {below} or {above}" if below else f"use {above}"
        raise error(f"{what} ({value}) must be divisible by {divisor} ({why}); {cure}")
