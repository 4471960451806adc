"""Sampling in padded passes of a fixed size, so that no picture depends on how many others are drawn.

B batch, C channels of the latent, h w its height and width; what is keyed is a
function of (seed, purpose, step, index of the picture).
"""

from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ldm.config import Sampling, require_steps
from ldm.diffusion.editing import keep_known, start_from
from ldm.diffusion.guidance import guide_by_target
from ldm.diffusion.image_guiding import Decode, low_resolution_distance, near_target
from ldm.diffusion.objective import Denoiser
from ldm.diffusion.samplers import sample, timesteps_of
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.times import NoiseSource, OnStep
from ldm.edits import LatentEdit
from ldm.errors import RecipeError
from ldm.training.randomness import generator

MICRO_BATCH = 4
"""Latents per forward pass where nobody says: published models are large."""


@dataclass(frozen=True)
class Pass:
    """Pictures that go through the networks together."""

    indices: range
    """Of the pictures."""
    size: int
    """B of the pass, to which it is padded by repeating the last picture."""

    @property
    def rows(self) -> Tensor:
        """(B,) int64: the indices and the padding."""
        padding = [self.indices[-1]] * (self.size - len(self.indices))
        return torch.tensor([*self.indices, *padding])

    def noise(self, shape: tuple[int, ...], seed: int, purpose: str, step: int = 0) -> Tensor:
        """Standard normal (B, *shape), that of each picture keyed by its index."""
        draws = [generator(seed, purpose, step, int(i)) for i in self.rows]
        return torch.stack([torch.randn(shape, generator=one) for one in draws])


def passes(count: int, micro_batch: int) -> list[Pass]:
    """The passes in which `count` pictures are drawn."""
    starts = range(0, count, micro_batch)
    return [Pass(range(start, min(start + micro_batch, count)), micro_batch) for start in starts]


def draw(
    denoise: Denoiser,
    part: Pass,
    sampling: Sampling,
    edit: LatentEdit,
    *,
    start: Tensor,
    noise: NoiseSource | None,
    schedule: Schedule,
    decode: Decode,
    on_step: OnStep | None,
) -> Tensor:
    """The latents of one pass, shaped like `start`.

    Args:
        denoise: (x_t, t) -> eps, guided by the condition.
        part: the pictures.
        sampling: sampler, steps, eta, seed.
        edit: pictures to change, to keep parts of, or to draw towards.
        start: (B, C, h, w), the noise to start from.
        noise: noise by step index for all pictures, instead of the seed's.
        schedule: the forward process.
        decode: scaled latents -> pictures, differentiable; for an edit's target.
        on_step: told after each step.
    """

    def keyed(purpose: str, step: int) -> Tensor:
        return part.noise(start.shape[1:], sampling.seed, purpose, step).to(start.device)

    x, times = start, timesteps_of(sampling.sampler, schedule, sampling.steps)
    if edit.target is not None:
        likely = near_target(decode, edit.target, distance=low_resolution_distance)
        denoise = guide_by_target(denoise, likely, schedule=schedule, scale=edit.target_scale)
    if edit.x_0 is not None and edit.strength is not None:
        x, times = start_from(edit.x_0, x, times, schedule=schedule, strength=edit.strength)
    correct = None
    if edit.x_0 is not None and edit.known is not None:
        correct = keep_known(edit.x_0, edit.known, schedule=schedule, noise=partial(keyed, "known"))
    return sample(
        sampling.sampler,
        denoise,
        x_T=x.contiguous(memory_format=torch.channels_last),
        schedule=schedule,
        times=times,
        eta=sampling.eta,
        noise=partial(keyed, "eta")
        if noise is None
        else lambda step: noise(step)[part.rows].to(start.device),
        correct=correct,
        on_step=on_step,
    )


def sampling_of(settings: Mapping[str, Any], *, num_timesteps: int | None) -> Sampling:
    """Settings with defaults for the rest.

    Args:
        settings: fields of `ldm.config.Sampling`.
        num_timesteps: T, with which the number of steps is compared; None leaves it to the sampler.

    Raises:
        RecipeError: a setting that there is not, or one out of its range.
    """
    try:
        sampling = Sampling.model_validate(dict(settings))
        if num_timesteps is not None:
            require_steps(sampling, num_timesteps)
    except ValidationError as error:
        said = "; ".join(": ".join([*map(str, e["loc"]), e["msg"]]) for e in error.errors())
        raise RecipeError(f"sampling: {said}; settings are {', '.join(Sampling.model_fields)}") from None
    except ValueError as error:
        raise RecipeError(str(error)) from None
    return sampling


def rows_of(given: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The fields of a batch, sample by sample; all at once where they are not batches of one size."""
    sizes = {len(value) for value in given.values() if is_batch(value)}
    if len(sizes) == 1 and all(map(is_batch, given.values())) and sizes != {0}:
        for i in range(*sizes):
            yield {name: value[i : i + 1] for name, value in given.items()}
    else:
        yield given


def is_batch(value: object) -> bool:
    """Whether a value is a tensor with a batch axis, or a sequence."""
    return value.ndim > 0 if isinstance(value, Tensor) else isinstance(value, Sized)
