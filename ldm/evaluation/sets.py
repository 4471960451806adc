"""The sets of pictures that are scored, each of n pictures, and what each number between them means.

N pictures, H W height and width. All are (N, H, W, 3) uint8.

    reference        the second half of 2n held-out pictures: what everything is compared with
    real             the first half: its distance to the reference is the floor, the score of a perfect model
    reconstruction   the first half through the first stage and back: rFID
    noise            decodings of Gaussian noise with the latents' moments: what the UNet has to beat
    samples          the model's
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from datasets.stream import SampleReader
from ldm.conditions import Condition, reads_captions
from ldm.config import Recipe
from ldm.device import home
from ldm.latent_diffusion import LatentDiffusion, class_condition
from ldm.latents import LatentContract
from ldm.models.first_stage import FirstStage, decode_in_micro_batches
from ldm.range import from_uint8, to_uint8
from ldm.training.randomness import generator

SETS = ("reference", "real", "reconstruction", "noise", "samples")
MIN_SCORED = 4
"""The smallest n: precision and recall look at a picture's third nearest neighbour."""


def nchw(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 array -> (N, 3, H, W) uint8 tensor."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)


def num_scored(recipe: Recipe, held_out: SampleReader) -> int:
    """n: as many as the recipe asks for, or half of the held-out pictures where there are fewer."""
    return min(recipe.evaluation.num_images, len(held_out) // 2)


def sample_labels(num_classes: int, count: int) -> list[int]:
    """Labels of the scored samples: every class in turn, or none."""
    return [i % num_classes if num_classes else -1 for i in range(count)]


def asked_condition(
    model: LatentDiffusion, labels: Sequence[int], held_out: SampleReader
) -> Condition | None:
    """What as many samples as labels are asked by: classes, or captions of held-out pictures in turn.

    Args:
        model: what is asked; None comes back for an unconditional one.
        labels: its classes, of a model of classes; else only their number counts.
        held_out: a reader of captions, for a model of captions.
    """
    if not reads_captions(model.config.conditioning):
        return class_condition(model, labels)
    captions = held_out.fetch([i % len(held_out) for i in range(len(labels))])["caption"]
    return model.condition(caption=captions)


def reconstruct(first_stage: FirstStage, images: np.ndarray, *, micro_batch: int) -> np.ndarray:
    """Pictures through the first stage and back, KL by its mean, in padded passes of a fixed size."""
    parts, device = [], home(first_stage)
    for start in range(0, len(images), micro_batch):
        x = from_uint8(images[start : start + micro_batch], device=device)
        padded = torch.cat([x, x.new_zeros(micro_batch - len(x), *x.shape[1:])])
        with torch.no_grad():
            padded = padded.to(home(first_stage)).contiguous(memory_format=torch.channels_last)
            stored = first_stage.encode(padded)
            parts.append(to_uint8(first_stage.decode(first_stage.latent(stored, None))[: len(x)]))
    return np.concatenate(parts)


def decode_noise(
    first_stage: FirstStage,
    contract: LatentContract,
    shape: tuple[int, int, int],
    count: int,
    *,
    recipe: Recipe,
) -> np.ndarray:
    """Decodings of independent Gaussians with each channel's mean and deviation over the corpus."""
    noise = torch.randn((count, *shape), generator=generator(recipe.sampling.seed, "noise decodings"))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (contract.mean, contract.std))
    latents = (noise * std + mean).to(home(first_stage)).contiguous(memory_format=torch.channels_last)
    return to_uint8(decode_in_micro_batches(first_stage, latents, micro_batch=recipe.sampling.micro_batch))


def make_set(
    name: str,
    *,
    recipe: Recipe,
    model: LatentDiffusion,
    contract: LatentContract,
    held_out: SampleReader,
    on_step: Callable[[int, int], None],
) -> np.ndarray:
    """The pictures of one of `SETS`."""
    count = num_scored(recipe, held_out)
    if name == "samples":
        condition = asked_condition(model, sample_labels(len(model.classes), count), held_out)
        return to_uint8(model.sample(condition, num=count, on_step=on_step, **dict(recipe.sampling)))
    if name == "noise":
        return decode_noise(model.first_stage, contract, model.latent_shape, count, recipe=recipe)
    start = count if name == "reference" else 0
    real = held_out.fetch(range(start, start + count))["image"]
    if name == "reconstruction":
        return reconstruct(model.first_stage, real, micro_batch=recipe.sampling.micro_batch)
    return real
