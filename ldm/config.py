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
    HybridConditioning,
    LowResConditioning,
    SegmentationConditioning,
    UNetConfig,
)

MIN_RFID_IMAGES = 4


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
    lr_schedule: Literal["constant", "cosine", "warmup_cosine"] = "constant"
    """`cosine` falls over the whole run, `warmup_cosine` from the end of the warm-up to `decay_images`."""
    warmup_images: int = Field(default=0, ge=0)
    """Images over which the learning rate rises."""
    warmup_start: float | None = Field(default=None, ge=0, le=1)
    """Share of `lr` in the first step; None gives the first step one step's share of the rise."""
    lr_floor: float = Field(default=0.01, ge=0, le=1)
    """Share of `lr` that a cosine falls to."""
    decay_images: int | None = Field(default=None, gt=0)
    """Images at which `warmup_cosine` reaches its floor; None is the end of the run."""
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
        """A run has at least one step, and its learning rate is one of the schedules."""
        if self.decay_images is not None and self.lr_schedule != "warmup_cosine":
            raise ValueError(
                f"decay_images ({self.decay_images}) belongs to lr_schedule warmup_cosine, got "
                f"{self.lr_schedule}; leave it out, or use warmup_cosine"
            )
        if self.lr_schedule == "warmup_cosine" and self.warmup_images >= (
            self.decay_images or self.num_images
        ):
            raise ValueError(
                f"warmup_images ({self.warmup_images}) must end before the learning rate has fallen, at "
                f"{self.decay_images or self.num_images} images; use a shorter warm-up"
            )
        if self.num_steps < 1:
            raise ValueError(
                f"num_images ({self.num_images}) must reach one batch ({self.batch_size}); set it higher"
            )
        return self


class FirstStageTraining(Training):
    """A training run of a first stage, whose batch statistics belong to virtual shards."""

    virtual_shards: int = Field(default=1, ge=1)
    """Equal shards that each batch is cut into, in order. Discriminator BatchNorm and adaptive weight are
    those of a shard; gradients are averaged over the shards by a fixed tree. Part of the bits."""

    @model_validator(mode="after")
    def check_shards(self) -> Self:
        """The shards of a batch are equal."""
        if self.batch_size % self.virtual_shards:
            divisors = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
            raise ValueError(
                f"virtual_shards ({self.virtual_shards}) must divide batch_size ({self.batch_size}); "
                f"use one of {', '.join(map(str, divisors))}"
            )
        return self


class Validation(Config):
    """Scores of held-out pictures while a first stage trains, and what follows from them."""

    every_images: int = Field(default=0, ge=0)
    """Images between validations; the end of training is validated too. 0 never validates."""
    num_images: int = Field(default=100, ge=1)
    """Held-out pictures that are scored, the last ones of the split; all of them where there are fewer."""
    rfid: bool = False
    """Also compute the Frechet distance of reconstructions to their own originals."""
    patience: int = Field(default=0, ge=0)
    """Training ends after so many validations in a row without a better rFID (PSNR without `rfid`).
    Validations before the last loss term has joined in do not count. 0 trains to the end."""
    keep_best: bool = False
    """The result is the averaged weights of the best validation, not of the last step."""

    @model_validator(mode="after")
    def check(self) -> Self:
        """Nothing is asked of validations that never happen."""
        asked = [name for name in ("rfid", "patience", "keep_best") if getattr(self, name)]
        if asked and not self.every_images:
            raise ValueError(
                f"validation.{asked[0]} needs validations, got validation.every_images=0; set it to the "
                "images between two of them"
            )
        if self.rfid and self.num_images < MIN_RFID_IMAGES:
            raise ValueError(
                f"validation.rfid needs validation.num_images of at least {MIN_RFID_IMAGES}, got "
                f"{self.num_images}; set it higher"
            )
        return self


class FirstStageRecipe(Config):
    """One first stage: network, objective, training."""

    name: str
    description: str = ""
    model: FirstStageModel
    loss: FirstStageLoss = FirstStageLoss()
    training: FirstStageTraining | None = None
    """None for the identity, which has nothing to train."""
    gradient_checkpointing: bool = False
    """Train in less memory and more time; the bits are the same, so it is no part of the key."""
    validation: Validation = Validation()

    @model_validator(mode="after")
    def check(self) -> Self:
        """Whatever has weights must be trained."""
        if self.model.kind != "identity" and self.training is None:
            raise ValueError(f"first stage {self.name!r} has weights, so it needs a `training` section")
        return self


Orientation = Literal["as_is", "mirrored"]


class Encoding(Config):
    """How the corpus becomes latents."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the stored latents."""
    micro_batch: int = Field(default=64, gt=0)
    """Pictures per forward pass, the last one padded; part of the bits."""
    orientations: tuple[Orientation, ...] = ("as_is",)
    """`[as_is, mirrored]` stores each training picture twice, the second time mirrored left to right: two
    samples, of which an epoch has each once. Held-out pictures are stored as they are."""
    picture: bool = False
    """Keep the cropped picture (lossless, 8 bits) beside its latent, for tasks that need pixels."""
    workers: int = Field(default=1, ge=1)
    """Processes that encode side by side, each with `threads` threads; the bytes are the same for any number,
    so it is no part of the key."""

    @model_validator(mode="after")
    def check(self) -> Self:
        """Pictures are stored as they are, and mirrored beside it or not."""
        if self.orientations not in {("as_is",), ("as_is", "mirrored")}:
            raise ValueError(
                f"orientations must be [as_is] or [as_is, mirrored], got [{', '.join(self.orientations)}]; "
                "choose one of them"
            )
        return self


class Diffusion(Config):
    """The forward process, what the UNet predicts, and how its error counts (paper App. B, eq. 2)."""

    schedule: Literal["linear", "sqrt_linear", "sqrt", "cosine", "flow"] = "linear"
    """Names of the published code; `linear` is the published models'. `flow` is rectified flow's."""
    num_timesteps: int = Field(default=1000, ge=2)
    linear_start: float = Field(default=0.0015, gt=0, lt=1)
    linear_end: float = Field(default=0.0195, gt=0, lt=1)
    """First and last beta of `linear` (square roots spaced evenly) and `sqrt_linear`; squares of `sqrt`'s."""
    objective: Literal["eps", "v", "x0", "flow"] = "eps"
    """What the UNet predicts: the noise, v (Salimans & Ho 2022), which gets large shapes right sooner, the
    latent, or eps - x_0 (rectified flow)."""
    loss: Literal["l2", "l1"] = "l2"
    """Squared or absolute error."""
    weighting: Literal["simple", "min_snr"] = "simple"
    """Weight of each time step: 1, or that of Hang et al. 2023, capped where there is little noise."""
    learn_log_variance: bool = False
    """Learn a log-variance of the error per time step, which then weighs it; off in all published configs."""

    @model_validator(mode="after")
    def check(self) -> Self:
        """Noise rises, and an error is weighed one way."""
        if self.linear_start > self.linear_end:
            raise ValueError(
                f"linear_start ({self.linear_start}) must not exceed linear_end ({self.linear_end}); "
                "exchange them, noise rises with the time step"
            )
        if self.weighting == "min_snr" and (self.loss == "l1" or self.learn_log_variance):
            raise ValueError(
                "weighting min_snr is made for squared errors without a learned weight, got "
                f"loss={self.loss}, learn_log_variance={self.learn_log_variance}; use loss=l2 without it, "
                "or weighting=simple"
            )
        return self


class Sampling(Config):
    """How pictures are drawn."""

    sampler: Literal["ddim", "ddpm", "plms", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "euler", "heun"] = "ddim"
    """See ldm/diffusion/samplers.py."""
    steps: int = Field(default=50, ge=1)
    eta: float = Field(default=0.0, ge=0)
    """Noise of DDIM: 0 is deterministic, 1 as noisy as ddpm."""
    guidance: float = Field(default=1.0, ge=0)
    """Classifier-free guidance scale; 1 is none."""
    guidance_interval: tuple[int, int] | None = None
    """First and last time step at which guidance acts; None is all of them."""
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)
    """Share by which guided noise is scaled back to the unguided one's deviation (Lin et al. 2023)."""
    micro_batch: int = Field(default=64, gt=0)
    """Latents per forward pass, the last one padded; part of the bits."""
    seed: int = 0

    @model_validator(mode="after")
    def check(self) -> Self:
        """Reject what would have no effect."""
        if self.eta > 0 and self.sampler != "ddim":
            raise ValueError(
                f"eta ({self.eta}) is the noise of sampler ddim, and {self.sampler} has none to set; use "
                "eta=0, or sampler=ddim"
            )
        if self.guidance == 1.0 and (self.guidance_interval is not None or self.guidance_rescale > 0):
            raise ValueError(
                f"guidance_interval ({self.guidance_interval}) and guidance_rescale "
                f"({self.guidance_rescale}) need guidance, and a guidance of 1 is none; set guidance, or "
                "leave them out"
            )
        if self.guidance_interval is not None and self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(
                f"guidance_interval {self.guidance_interval} must rise; give the lower time step first"
            )
        return self


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
    conditioning: Conditioning | HybridConditioning | None = Field(default=None, discriminator="kind")
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
        if self.training.mirror:
            raise ValueError(
                "training.mirror is for pictures, and latents cannot be mirrored; leave it out and set "
                "encoding.orientations=[as_is, mirrored], which stores both"
            )
        conditioning = self.conditioning
        if self.sampling.guidance != 1.0 and (
            conditioning is None or not conditioning.has_null or not conditioning.drop_rate
        ):
            raise ValueError(
                f"sampling.guidance ({self.sampling.guidance}) needs `conditioning` with a null condition "
                "and a drop_rate above 0, which trains it; use 1 without one"
            )
        require_steps(self.sampling, self.diffusion.num_timesteps)
        return self


def require_steps(sampling: Sampling, num_timesteps: int) -> None:
    """Refuse a number of steps that a sampler does not take.

    Raises:
        ValueError: ddpm with fewer steps than there are, or another sampler with as many.
    """
    if sampling.sampler == "ddpm" and sampling.steps != num_timesteps:
        raise ValueError(
            f"sampling.steps ({sampling.steps}) must be diffusion.num_timesteps ({num_timesteps}) for "
            f"sampler ddpm, which leaves none out; use sampling.steps={num_timesteps}, or sampler=ddim "
            "with eta=1"
        )
    if sampling.sampler != "ddpm" and sampling.steps >= num_timesteps:
        raise ValueError(
            f"sampling.steps ({sampling.steps}) must be below diffusion.num_timesteps ({num_timesteps}) for "
            f"sampler {sampling.sampler}; use at most {num_timesteps - 1}"
        )


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
    maps = conditioning.maps if isinstance(conditioning, HybridConditioning) else conditioning
    if isinstance(maps, LowResConditioning | SegmentationConditioning) and maps.factor != first_stage.factor:
        raise ValueError(
            f"a {maps.kind} condition comes at 1/{maps.factor} of the picture's side, but it must have the "
            f"latent's, 1/{first_stage.factor}; choose a first stage of f = {maps.factor}, or change it"
        )


def require_divisible(
    what: str, value: int, divisor: int, why: str, *, error: type[Exception] = ValueError
) -> None:
    """Raise `error` with the neighbours that would do, unless `divisor` divides `value`."""
    if value % divisor:
        below, above = value // divisor * divisor, -(-value // divisor) * divisor
        cure = f"use {below} or {above}" if below else f"use {above}"
        raise error(f"{what} ({value}) must be divisible by {divisor} ({why}); {cure}")
