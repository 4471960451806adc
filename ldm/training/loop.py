"""The one training loop: step, log, look, save; counted in images seen, resumed exactly."""

import logging
import math
import time
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from datasets.store import WorkArea
from ldm.config import Training
from ldm.errors import TrainingError
from ldm.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ldm.training.randomness import seed_of

logger = logging.getLogger(__name__)
CHECKPOINT_EVERY_S = 20.0
LOG_EVERY_STEPS = 10

History = dict[str, list[tuple[int, float]]]


class Trainee(Protocol):
    """A model in training: its state, and what one step does."""

    training: Training

    def step(self, step: int) -> Mapping[str, Tensor]:
        """Do the step-th (from 0) optimiser step; scalars to log, the first of them the loss."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything the next step depends on."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        ...

    def look(self) -> Mapping[str, bytes]:
        """PNG pictures by name, of the state as it is."""
        ...


class Report(Protocol):
    """Where long work tells how far it is."""

    def metrics(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Scalars at a point of the run."""
        ...

    def picture(self, name: str, images_seen: int, png: bytes) -> None:
        """A picture at a point of the run."""
        ...

    def progress(self, done: int, total: int) -> None:
        """How many of how many images."""
        ...

    def flush(self) -> object:
        """Wait until all that was told so far is kept; called before each checkpoint."""
        ...


class Silent:
    """A report that keeps nothing."""

    def metrics(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Ignored."""

    def picture(self, name: str, images_seen: int, png: bytes) -> None:
        """Ignored."""

    def progress(self, done: int, total: int) -> None:
        """Ignored."""

    def flush(self) -> None:
        """Nothing to keep."""


def learning_rate(training: Training, step: int) -> float:
    """Learning rate of the step-th step: linear warm-up, then constant or a cosine down to its floor.

    The published schedules are `constant` with `warmup_start` (LambdaLinear: lsun_churches) and
    `warmup_cosine` (LambdaWarmUpCosine: inpainting_big), each with multipliers as shares of their largest.
    """
    images, floor = step * training.batch_size, training.lr_floor
    warmup = warmup_share(training, images)
    if training.lr_schedule == "constant":
        return training.lr * warmup
    if training.lr_schedule == "cosine":
        fall = 0.5 * (1.0 + math.cos(math.pi * images / training.num_images))
        return training.lr * warmup * (floor + (1.0 - floor) * fall)
    since, end = images - training.warmup_images, training.decay_images or training.num_images
    done = min(max(since / (end - training.warmup_images), 0.0), 1.0)
    return training.lr * warmup * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done)))


def warmup_share(training: Training, images: int) -> float:
    """Share of the learning rate that warm-up allows after so many images, 1 when it is over."""
    if images >= training.warmup_images:
        return 1.0
    if training.warmup_start is not None:
        return training.warmup_start + (1.0 - training.warmup_start) * images / training.warmup_images
    return min(1.0, (images + training.batch_size) / training.warmup_images)


def train(
    trainee: Trainee, work: WorkArea, *, report: Report, checkpoint_every_s: float = CHECKPOINT_EVERY_S
) -> History:
    """Train to the end from wherever the work area's newest checkpoint left off.

    Args:
        trainee: the model in training; it is left in its final state.
        work: where checkpoints live; the caller clears it once the result is committed.
        report: told of metrics, pictures and progress.
        checkpoint_every_s: seconds of work between checkpoints.

    Returns:
        Every logged metric: name -> (images seen, value).

    Raises:
        TrainingError: the loss stopped being finite.
    """
    training = trainee.training
    step, history = resume(trainee, work)
    if step == 0:
        show(trainee, 0, report)
    saved_at = time.monotonic()
    while step < training.num_steps:
        torch.manual_seed(seed_of(training.seed, step, "layers"))  # dropout draws from the global generator
        values = trainee.step(step)
        step += 1
        images = step * training.batch_size
        if step % LOG_EVERY_STEPS == 0 or step == training.num_steps:
            log(values, step, images, history, report)
        report.progress(images, training.num_images)
        if (
            images // training.picture_every_images
            > (images - training.batch_size) // training.picture_every_images
        ):
            show(trainee, images, report)
        if time.monotonic() - saved_at > checkpoint_every_s or step == training.num_steps:
            report.flush()
            save_checkpoint(work, Checkpoint(step, trainee.tensors(), history))
            saved_at = time.monotonic()
    return history


def show(trainee: Trainee, images: int, report: Report) -> None:
    """Report what the trainee looks like after so many images; the series begin at 0, untrained."""
    for name, png in trainee.look().items():
        report.picture(name, images, png)


def resume(trainee: Trainee, work: WorkArea) -> tuple[int, History]:
    """Load the newest checkpoint, if any; the step to do next and the history so far."""
    checkpoint = load_checkpoint(work)
    if checkpoint is None:
        return 0, {}
    trainee.load(checkpoint.tensors)
    images = checkpoint.step * trainee.training.batch_size
    logger.info("resuming at %d of %d images", images, trainee.training.num_images)
    return checkpoint.step, checkpoint.history


def log(values: Mapping[str, Tensor], step: int, images: int, history: History, report: Report) -> None:
    """Write metrics down and check that the loss, the first of them, is a number."""
    numbers = {name: float(value) for name, value in values.items()}
    name, loss = next(iter(numbers.items()))
    if not math.isfinite(loss):
        raise TrainingError(
            f"{name} must be finite, got {loss} between steps {step - LOG_EVERY_STEPS} and {step} "
            f"({images} images seen); lower training.lr or set training.clip_norm"
        )
    for key, value in numbers.items():
        history.setdefault(key, []).append((images, value))
    report.metrics(images, numbers)
