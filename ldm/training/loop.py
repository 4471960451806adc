"""The one training loop: step, log, validate, look, save; counted in images seen, resumed exactly."""

import logging
import math
import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from datasets.store import WorkArea
from ldm.errors import TrainingError
from ldm.training.checkpoint import Checkpoint, Checkpoints
from ldm.training.randomness import seed_of
from ldm.training_config import Training

logger = logging.getLogger(__name__)
CHECKPOINT_EVERY_S = 20.0
LOG_EVERY_STEPS = 10

GRADIENT = "gradient/"
"""Metrics of this group are norms of the gradient of one loss term each."""
NUM_SILENT_LOGS = 5
"""So many logged gradients of a term in a row that are exactly zero stop a run."""

History = dict[str, list[tuple[int, float]]]
"""Logged metrics: name -> (images seen, value)."""


class Trainee(Protocol):
    """A model in training: its state, and what one step does."""

    @property
    def training(self) -> Training:
        """How long, in which steps, and how often pictures are wanted."""
        ...

    def step(self, step: int) -> Mapping[str, Tensor]:
        """Do the step-th (from 0) optimiser step; scalars to log, the first of them the loss."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything the next step depends on."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        ...

    def validate(self, images: int, history: History) -> Mapping[str, float]:
        """Held-out scores after so many images, none where none are due; `history` is without them."""
        ...

    def stops(self, history: History) -> bool:
        """True if training should end early, as its history of scores has it."""
        ...

    def look(self, history: History) -> Mapping[str, bytes]:
        """PNG pictures by name, of the state as it is and of how it came there."""
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


def is_logged(training: Training, step: int) -> bool:
    """True if metrics are written down after so many steps."""
    return step % LOG_EVERY_STEPS == 0 or step == training.num_steps


def is_due(images: int, training: Training, *, every_images: int) -> bool:
    """True if the step that led to so many images seen reached the next multiple of `every_images`."""
    return images // every_images > (images - training.batch_size) // every_images


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
    trainee: Trainee,
    work: WorkArea,
    *,
    report: Report,
    of: Mapping[str, Any] | None = None,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
) -> History:
    """Train to the end from wherever the work area's newest checkpoint left off.

    Args:
        trainee: the model in training; it is left in its final state.
        work: where checkpoints live; the caller clears it once the result is committed.
        report: told of metrics, pictures and progress.
        of: the run's configuration; checkpoints of another are refused.
        checkpoint_every_s: seconds of work between checkpoints.

    Returns:
        Every logged metric: name -> (images seen, value).

    Raises:
        TrainingError: the loss stopped being finite, or the checkpoint is of another configuration.
        SpaceError: the store is too full for a checkpoint.
    """
    with Checkpoints(work, of=of, keep_every=trainee.training.keep_every_steps) as checkpoints:
        return run(trainee, checkpoints, report=report, checkpoint_every_s=checkpoint_every_s)


def run(trainee: Trainee, checkpoints: Checkpoints, *, report: Report, checkpoint_every_s: float) -> History:
    """What `train` does, between the first look at checkpoints and the last one saved."""
    training = trainee.training
    step, history = resume(trainee, checkpoints)
    if step == 0:
        show(trainee, 0, history, report)
    saved_at = time.monotonic()
    while step < training.num_steps and not trainee.stops(history):
        torch.manual_seed(seed_of(training.seed, step, "layers"))  # dropout draws from the global generator
        values = trainee.step(step)
        step += 1
        images = step * training.batch_size
        if is_logged(training, step):
            log(values, step, images, history, report)
        record(trainee.validate(images, history), images, history, report)
        ended = step == training.num_steps or trainee.stops(history)
        report.progress(images, training.num_images)
        if is_due(images, training, every_images=training.picture_every_images):
            show(trainee, images, history, report)
        if time.monotonic() - saved_at > checkpoint_every_s or ended:
            report.flush()
            checkpoints.save(Checkpoint(step, trainee.tensors(), history))
            saved_at = time.monotonic()
    return history


def show(trainee: Trainee, images: int, history: History, report: Report) -> None:
    """Report what the trainee looks like after so many images; the series begin at 0, untrained."""
    for name, png in trainee.look(history).items():
        report.picture(name, images, png)


def resume(trainee: Trainee, checkpoints: Checkpoints) -> tuple[int, History]:
    """Load the newest checkpoint, if any; the step to do next and the history so far."""
    checkpoint = checkpoints.load()
    if checkpoint is None:
        return 0, {}
    trainee.load(checkpoint.tensors)
    images = checkpoint.step * trainee.training.batch_size
    logger.info("resuming at %d of %d images", images, trainee.training.num_images)
    return checkpoint.step, checkpoint.history


def log(values: Mapping[str, Tensor], step: int, images: int, history: History, report: Report) -> None:
    """Write metrics down; check that all are numbers, the loss first, and that every term has a gradient."""
    numbers = {name: float(value) for name, value in values.items()}
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise TrainingError(
                f"{name} must be finite, got {value} between steps {step - LOG_EVERY_STEPS} and {step} "
                f"({images} images seen); lower training.lr or set training.clip_norm"
            )
    record(numbers, images, history, report)
    check_gradients(history)


def record(numbers: Mapping[str, float], images: int, history: History, report: Report) -> None:
    """Write numbers down in the history and report them."""
    for key, value in numbers.items():
        history.setdefault(key, []).append((images, value))
    if numbers:
        report.metrics(images, numbers)


def check_gradients(history: History) -> None:
    """Stop a run in which a loss term that is switched on trains nothing.

    Raises:
        TrainingError: a metric `gradient/<term>` was exactly zero NUM_SILENT_LOGS times in a row.
    """
    for name, points in history.items():
        last = points[-NUM_SILENT_LOGS:]
        if name.startswith(GRADIENT) and len(last) == NUM_SILENT_LOGS and not any(v for _, v in last):
            term = name.removeprefix(GRADIENT)
            raise TrainingError(
                f"a loss term that is switched on must have a gradient, that of {term!r} was exactly zero at "
                f"the last {NUM_SILENT_LOGS} logged steps ({last[0][0]} to {last[-1][0]} images seen). It is "
                "evaluated without gradient (no_grad, detach), its weight is zero on the way, or what it "
                "depends on is saturated; let the gradient through, lower training.lr, or switch the term "
                "off by setting its weight in `loss` to 0"
            )


def images_seen(history: History) -> int:
    """Images seen at the last point of a history, 0 of an empty one."""
    return max((points[-1][0] for points in history.values()), default=0)
