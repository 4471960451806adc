"""How anything is trained: how long, in which steps, how often it is looked at."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ldm.network_config import Config

Precision = Literal["float32", "tf32", "bfloat16"]
NOT_WHAT = {"picture_every_images", "keep_every_images", "ranks"}
"""Settings of a training run that change no bit of its result."""


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
    virtual_shards: int = Field(default=1, ge=1)
    """Equal shards that each batch is cut into, in order: what one pass through the networks takes. Random
    draws and batch statistics are those of a shard; gradients are averaged over the shards by a fixed tree.
    Part of the bits."""
    ranks: int = Field(default=1, ge=1)
    """Processes that train together, each with `threads` threads or a GPU of its own, and a part of the
    virtual shards. The bits are the same for any number, so it is no part of the key."""
    precision: Precision = "float32"
    """What networks compute in: float32 throughout; float32 with products of TF32, which GPUs have; or
    bfloat16 where torch's autocast allows it. Weights, optimiser, averages, norms and losses are float32."""
    skip_steps: tuple[int, ...] = ()
    """Steps, from 0, that are left out, as one is whose loss or gradient is not finite."""
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
        self.check_shards()
        if self.num_steps < 1:
            raise ValueError(
                f"num_images ({self.num_images}) must reach one batch ({self.batch_size}); set it higher"
            )
        return self

    def check_shards(self) -> None:
        """The shards of a batch are equal, and ranks have equal parts that are whole branches of the tree."""
        if self.batch_size % self.virtual_shards:
            divisors = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
            raise ValueError(
                f"virtual_shards ({self.virtual_shards}) must divide batch_size ({self.batch_size}); "
                f"use one of {', '.join(map(str, divisors))}"
            )
        shards = self.virtual_shards
        allowed = [
            n for n in range(1, shards + 1) if n == 1 or (is_power_of_two(n) and is_power_of_two(shards))
        ]
        if self.ranks not in allowed:
            raise ValueError(
                f"ranks ({self.ranks}) must be a power of two that leaves each rank 1, 2, 4, ... of the "
                f"virtual_shards ({self.virtual_shards}); use ranks of {', '.join(map(str, allowed))}, or "
                f"virtual_shards={2 ** (self.ranks - 1).bit_length()}, which trains to other bits"
            )


def is_power_of_two(count: int) -> bool:
    """Whether a number is 1, 2, 4, ..."""
    return count > 0 and count & (count - 1) == 0
