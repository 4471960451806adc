"""How anything is trained: how long, in which steps, how often it is looked at."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ldm.network_config import Config


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
    keep_every_images: int = Field(default=0, ge=0)
    """Images between checkpoints that stay while the run lasts; 0 keeps the newest two alone."""

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.num_images // self.batch_size

    @property
    def keep_every_steps(self) -> int:
        """Optimiser steps between checkpoints that stay, 0 where none do."""
        return -(-self.keep_every_images // self.batch_size)

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
