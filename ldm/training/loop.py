"""The one training loop: step, log, validate, look, save; counted in images seen, resumed exactly.

Several ranks run it side by side, each on its own shards, and all come to the same state; the first of them
reports, looks, validates and saves.
"""

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
from ldm.training.ranks import ALONE, Ranks
from ldm.training.report import Report, Silent
from ldm.training.stopping import Stopping
from ldm.training_config import Training

logger = logging.getLogger(__name__)
CHECKPOINT_EVERY_S = 20.0
LOG_EVERY_STEPS = 10

GRADIENT = "gradient/"
"""Metrics of this group are norms of the gradient of one loss term each."""
NUM_SILENT_LOGS = 5
"""So many logged gradients of a term in a row that are exactly zero stop a run."""
JUDGED = ("loss", "gradient_norm", "discriminator_gradient_norm")
"""A step in which one of these is not finite changes nothing."""
NUM_BAD_IN_A_ROW = 5
"""So many such steps in a row stop a run: it is not the batches."""
BAD_SHARE = 0.01
"""A run also stops when more than this share of its steps, and more than NUM_BAD_IN_A_ROW, were such."""

History = dict[str, list[tuple[int, float]]]
"""Logged metrics: name -> (images seen, value)."""


class Trainee(Protocol):
    """A model in training: its state, and what one step does."""

    @property
    def training(self) -> Training:
        """How long, in which steps, and how often pictures are wanted."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def gradients(self, step: int) -> dict[str, Tensor]:
        """Compute the gradients of the step-th (from 0) step; scalars to log, among them those JUDGED."""
        ...

    def update(self, step: int) -> dict[str, Tensor]:
        """Do the step with these gradients; more scalars to log."""
        ...

    def forget(self) -> None:
        """Leave the step out: be as before its gradients."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything the next step depends on."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        ...

    def validates(self, images: int) -> bool:
        """Whether held-out scores are due after so many images."""
        ...

    def validate(self) -> Mapping[str, float]:
        """Held-out scores."""
        ...

    def heed(self, images: int, history: History) -> None:
        """Do what follows from the scores after so many images, which `history` ends with."""
        ...

    def stops(self, history: History) -> bool:
        """True if training should end early, as its history of scores has it."""
        ...

    def look(self, history: History) -> Mapping[str, bytes]:
        """PNG pictures by name, of the state as it is and of how it came there."""
        ...


def is_logged(training: Training, step: int) -> bool:
    """True if metrics are written down after so many steps."""
    return step % LOG_EVERY_STEPS == 0 or step == training.num_steps


def is_due(images: int, training: Training, *, every_images: int) -> bool:
    """True if the step that led to so many images seen reached the next multiple of `every_images`."""
    return images // every_images > (images - training.batch_size) // every_images


class Pulse(Protocol):
    """Where a rank says that it lives, and what it does."""

    def __call__(self, phase: str, step: int) -> None:
        """It begins a phase of the step-th step."""
        ...


def no_pulse(phase: str, step: int) -> None:
    """For a run that nobody watches."""


def train(
    trainee: Trainee,
    work: WorkArea,
    *,
    report: Report,
    of: Mapping[str, Any] | None = None,
    ranks: Ranks = ALONE,
    pulse: Pulse = no_pulse,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
) -> History:
    """Train to the end from wherever the work area's newest checkpoint left off.

    SIGTERM to any rank ends all of them after the step they are in, with a checkpoint.

    Args:
        trainee: the model in training; it is left in its final state.
        work: where checkpoints live; the caller clears it once the result is committed.
        report: told of metrics, pictures and progress, by the first rank.
        of: the run's configuration; checkpoints of another are refused.
        ranks: the processes that do this together.
        pulse: told at every step what this rank is at.
        checkpoint_every_s: seconds of work between checkpoints.

    Returns:
        Every logged metric: name -> (images seen, value).

    Raises:
        TrainingError: the loss or its gradient is not finite again and again, or the checkpoint is of another
            configuration, or it was told to stop.
        SpaceError: the store is too full for a checkpoint.
    """
    training = trainee.training
    keep_every = training.keep_every_steps
    with Stopping() as stopping, Checkpoints(work, of=of, keep_every=keep_every) as checkpoints:
        run = Run(trainee, checkpoints, report, ranks, pulse)
        run.resume()
        saved_at = time.monotonic()
        while run.goes_on:
            run.do_step()
            late = time.monotonic() - saved_at > checkpoint_every_s
            stopped, due = ranks.any_of([stopping.asked, late and ranks.is_first], device=trainee.device)
            if due or stopped or not run.goes_on:
                run.save()
                saved_at = time.monotonic()
            if stopped:
                logger.info("told to stop: saved at %d of %d images", run.images, training.num_images)
                break
    if run.goes_on:
        raise TrainingError(
            f"training was told to stop, and did at {run.images} of {training.num_images} images; the same "
            "command goes on from there"
        )
    return run.history


class Run:
    """A run under way: how far it is, what it logged, and which of its steps were left out."""

    def __init__(
        self, trainee: Trainee, checkpoints: Checkpoints, report: Report, ranks: Ranks, pulse: Pulse
    ) -> None:
        self.trainee, self.training, self.checkpoints = trainee, trainee.training, checkpoints
        self.report: Report = report if ranks.is_first else Silent()
        self.ranks, self.pulse = ranks, pulse
        self.step = 0
        self.history: History = {}
        self.left_out: list[int] = []

    @property
    def images(self) -> int:
        """Images seen."""
        return self.step * self.training.batch_size

    @property
    def goes_on(self) -> bool:
        """Whether there is another step to do."""
        return self.step < self.training.num_steps and not self.trainee.stops(self.history)

    def resume(self) -> None:
        """Go to the newest checkpoint, if any; a run that begins is looked at untrained."""
        self.pulse("start", 0)
        checkpoint = self.checkpoints.load()
        if self.checkpoints.incidents:
            self.report.metrics(self.images, {"checkpoints_passed_over": len(self.checkpoints.incidents)})
        if checkpoint is None:
            self.look()
            return
        self.trainee.load(checkpoint.tensors)
        self.step, self.history = checkpoint.step, checkpoint.history
        self.left_out = list(checkpoint.skipped)
        logger.info("resuming at %d of %d images", self.images, self.training.num_images)

    def do_step(self) -> None:
        """One step, and what is due after it."""
        training, step = self.training, self.step
        self.pulse("step", step)
        values = {} if step in training.skip_steps else self.learn(step)
        self.step += 1
        if not values:
            self.left_out.append(step)
            self.record({"steps_left_out": float(len(self.left_out))})
        elif is_logged(training, self.step):
            self.record(finite({name: float(value) for name, value in values.items()}, self.images))
            check_gradients(self.history)
        if self.trainee.validates(self.images):
            self.pulse("validate", step)
            scores = self.trainee.validate() if self.ranks.is_first else {}
            self.record(self.ranks.from_first(scores, device=self.trainee.device))
            self.trainee.heed(self.images, self.history)
        self.report.progress(self.images, training.num_images)
        if is_due(self.images, training, every_images=training.picture_every_images):
            self.look()

    def learn(self, step: int) -> dict[str, Tensor]:
        """Do a step, unless what it computed is not finite; scalars to log, none of a step left out."""
        torch.manual_seed(seed_of(self.training.seed, step, "layers"))  # which dropout draws from
        values = self.trainee.gradients(step)
        judged = {name: float(values[name]) for name in JUDGED if name in values}
        bad = {name: value for name, value in judged.items() if not math.isfinite(value)}
        if bad:
            self.trainee.forget()
            self.warn_of(step, bad)
            return {}
        return values | self.trainee.update(step)

    def warn_of(self, step: int, bad: Mapping[str, float]) -> None:
        """Say why a step is left out, and stop the run if it is not the first of many.

        Raises:
            TrainingError: it is one of too many.
        """
        bad_steps = [*(s for s in self.left_out if s not in self.training.skip_steps), step]
        found = ", ".join(f"{name} {value}" for name, value in bad.items())
        logger.warning("step %d is left out, its numbers are not finite: %s", step, found)
        row = bad_steps[-NUM_BAD_IN_A_ROW:]
        in_a_row = len(row) == NUM_BAD_IN_A_ROW and row[-1] - row[0] == NUM_BAD_IN_A_ROW - 1
        if in_a_row or len(bad_steps) > max(NUM_BAD_IN_A_ROW, BAD_SHARE * self.training.num_steps):
            raise TrainingError(
                f"loss and gradient must be finite, got {found} at step {step} ({self.images} images seen), "
                f"as at {len(bad_steps) - 1} steps before it, which were left out: {bad_steps}; "
                "lower training.lr or set training.clip_norm"
            )

    def record(self, numbers: Mapping[str, float]) -> None:
        """Write numbers down in the history and report them."""
        for key, value in numbers.items():
            self.history.setdefault(key, []).append((self.images, value))
        if numbers:
            self.report.metrics(self.images, numbers)

    def look(self) -> None:
        """Report what the trainee looks like; the series begin at 0, untrained."""
        self.pulse("look", self.step)
        if self.ranks.is_first:
            for name, png in self.trainee.look(self.history).items():
                self.report.picture(name, self.images, png)

    def save(self) -> None:
        """Write a checkpoint, after all that it has reported is kept."""
        self.pulse("save", self.step)
        if self.ranks.is_first:
            self.report.flush()
            skipped = tuple(self.left_out)
            self.checkpoints.save(Checkpoint(self.step, self.trainee.tensors(), self.history, skipped))


def finite(numbers: dict[str, float], images: int) -> dict[str, float]:
    """The numbers, of which all are.

    Raises:
        TrainingError: one is not.
    """
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise TrainingError(
                f"{name} must be finite, got {value} at {images} images seen; lower training.lr or set "
                "training.clip_norm"
            )
    return numbers


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
