"""A recipe and its parts as typed, frozen values with their limits; `ldm.recipe` reads them from YAML.

No value is an import path (ADR 0004).
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from datasets.config import DatasetConfig
from ldm.first_stage_config import FirstStageRecipe
from ldm.network_config import (
    ClassVectorConditioning,
    Conditioning,
    Config,
    HybridConditioning,
    LowResConditioning,
    SegmentationConditioning,
    UNetConfig,
)
from ldm.training_config import Training

Orientation = Literal["as_is", "mirrored"]
Device = Literal["auto", "cpu", "cuda"]
"""Where tensors are computed; `auto` is a GPU where there is one, see `ldm.device`."""


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
    device: Device = "auto"
    """Where networks compute. It is where the work is done, so no part of the key, though last bits differ
    between classes of devices: equality is claimed within one class."""

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
