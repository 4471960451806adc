"""Checkpoints of a training run: written in the background, verified, and the last good one found again.

A checkpoint is a safetensors file and, written last, a JSON beside it that makes it exist. The JSON names the
digest of the tensors and is sealed by its own, so every byte is verified before it is parsed, and nothing is
ever executed.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from datasets.errors import CorruptionError, StoreError
from datasets.keys import canonical_json, sha256_hex
from datasets.store import WorkArea
from ldm.training.record import Record, check_configuration, parsed, sealed
from ldm.training.serialised import serialised
from ldm.training_config import Training

logger = logging.getLogger(__name__)

KEPT = 2
"""Newest good checkpoints that stay."""
FILE = re.compile(r"checkpoint-([0-9]{9}|[1-9][0-9]{9,17})\.(json|safetensors)")
MAX_RECORD_BYTES = 2**30
"""A larger JSON is not read; its history would have tens of millions of points."""
UNREADABLE = (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError, MemoryError)
"""What reading a file that is none of ours may raise, though its digest is right."""


@dataclass(frozen=True)
class Checkpoint:
    """State of a run after `step` optimiser steps."""

    step: int
    tensors: dict[str, Tensor]
    history: dict[str, list[tuple[int, float]]]
    """Logged metrics so far: name -> (images seen, value)."""
    skipped: tuple[int, ...] = ()
    """Steps that were left out: their numbers were not finite, or the recipe says so."""


class Checkpoints:
    """The checkpoints of one run: two good ones, and others that stay.

    One thread of its own writes. At its height a save takes the size of the state once in memory, which is
    both the snapshot and the file, and three checkpoints on disk, as none is dropped before the next is good.

    As a context manager it waits for the last save; where an exception passes, what became of that save is
    logged and does not take the exception's place.

    Args:
        work: where they live.
        of: the run's configuration, of JSON types. A checkpoint that was saved with another is refused; None
            compares nothing.
        keep_every: the first checkpoint at or after each multiple of so many steps is never dropped; 0 keeps
            the newest two alone.
    """

    def __init__(self, work: WorkArea, *, of: Mapping[str, Any] | None = None, keep_every: int = 0) -> None:
        self._work, self._keep_every = work, keep_every
        self._of: dict[str, Any] | None = None if of is None else json.loads(canonical_json(of))
        self._damaged: set[int] = set()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._saving: Future[None] | None = None
        self.incidents: list[str] = []
        """What `load` passed over so far, each with file and reason."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception:
            if kind is None:
                raise
            logger.warning("the last checkpoint could not be saved", exc_info=True)
        finally:
            self._thread.shutdown()

    def load(self) -> Checkpoint | None:
        """The newest good checkpoint, or None where there is none; damaged ones are passed over and reported.

        Raises:
            TrainingError: it is of another configuration; every field that differs is named.
            StoreError: the store cannot be read, or the save before failed.
        """
        self.wait()
        for step in reversed(saved(self._work)):
            try:
                return read(self._work, step, of=self._of)
            except CorruptionError as error:
                self._damaged.add(step)
                self.incidents.append(str(error))
                logger.warning("a damaged checkpoint is passed over for the one before it: %s", error)
        return None

    def save(self, checkpoint: Checkpoint) -> None:
        """Copy a checkpoint and return; it is written behind the caller's back, after the save before it.

        Raises:
            SpaceError: the store was too full for the save before.
            StoreError: the save before failed otherwise.
            ValueError: a tensor has elements of a type that training keeps none of.
        """
        self.wait()
        data = serialised(checkpoint.tensors)
        history = {name: list(points) for name, points in checkpoint.history.items()}
        self._saving = self._thread.submit(self._save, checkpoint.step, data, history, checkpoint.skipped)

    def wait(self) -> None:
        """Return once the last save is good.

        Raises:
            SpaceError: the store is too full for it.
            StoreError: it failed otherwise.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _save(
        self,
        step: int,
        data: bytearray,
        history: dict[str, list[tuple[int, float]]],
        skipped: tuple[int, ...],
    ) -> None:
        """Write a checkpoint and drop the others that need not stay; nothing of a failed one is left."""
        record = Record(
            step=step,
            sha256=sha256_hex(data),
            num_bytes=len(data),
            history=history,
            skipped=skipped,
            of=self._of,
        )
        try:
            write(self._work, data, record)
        except BaseException:
            with suppress(StoreError):
                remove(self._work, step)
            raise
        self._damaged.discard(step)
        self._drop(step)

    def _drop(self, newest: int) -> None:
        """Remove damaged and older checkpoints, and what killed saves left; another run's newer ones stay."""
        good = [step for step in saved(self._work) if step not in self._damaged]
        stay = {*good[-KEPT:], *permanent(good, every=self._keep_every)}
        for step in steps_of(self._work.names("checkpoint-")):
            if step not in stay and (step < newest or step in self._damaged):
                remove(self._work, step)
        self._damaged.clear()
        self._work.sweep()


def num_kept(training: Training) -> int:
    """Checkpoints that lie on disk at the height of a run, the one being written among them."""
    every = training.keep_every_images
    return KEPT + 1 + (training.num_images // every if every else 0)


def permanent(steps: Sequence[int], *, every: int) -> set[int]:
    """The first of ascending steps at or after each multiple of `every`, none where that is 0."""
    if every == 0:
        return set()
    first: dict[int, int] = {}
    for step in steps:
        first.setdefault(step // every, step)
    return {step for multiple, step in first.items() if multiple > 0}


def name_of(step: int) -> str:
    """What the two files of a checkpoint are called, without their endings."""
    return f"checkpoint-{step:09d}"


def steps_of(names: Sequence[str]) -> list[int]:
    """Steps that there are files of, ascending; other names are not of checkpoints."""
    return sorted({int(match[1]) for name in names if (match := FILE.fullmatch(name))})


def saved(work: WorkArea) -> list[int]:
    """Steps of the finished checkpoints in a work area, ascending."""
    return steps_of([name for name in work.names("checkpoint-") if name.endswith(".json")])


def remove(work: WorkArea, step: int) -> None:
    """Remove a checkpoint; it ends to exist first."""
    work.remove(f"{name_of(step)}.json")
    work.remove(f"{name_of(step)}.safetensors")


def write(work: WorkArea, data: bytearray, record: Record) -> None:
    """Write a checkpoint's two files, the JSON once the tensors were read back, and read that back too."""
    name = name_of(record.step)
    work.remove(f"{name}.json")  # one of the same step, if any, ends to exist before its tensors change
    work.write(f"{name}.safetensors", data)
    if work.digest(f"{name}.safetensors") != record.sha256:
        raise CorruptionError(not_read_back(work, f"{name}.safetensors"))
    line = sealed(record)
    work.write(f"{name}.json", line)
    if work.read(f"{name}.json") != line:
        raise CorruptionError(not_read_back(work, f"{name}.json"))


def not_read_back(work: WorkArea, name: str) -> str:
    """The message about a file that is not what was written."""
    return (
        f"a checkpoint must be read back as it was written, but {work.uri}/{name} is not; the checkpoint "
        "before it is kept; check the disk, or name another store with --store"
    )


def read(work: WorkArea, step: int, *, of: Mapping[str, Any] | None) -> Checkpoint:
    """A checkpoint of a configuration, every byte of it verified before it is parsed.

    Raises:
        CorruptionError: it is damaged, or it is none of ours.
        TrainingError: it is of another configuration.
    """
    record = read_record(work, step)
    check_configuration(record.of, of, where=f"{work.uri}/{name_of(step)}.json")
    name = f"{name_of(step)}.safetensors"
    if name not in work.names(name) or work.size(name) != record.num_bytes:
        raise CorruptionError(f"{name} must be a file of {record.num_bytes} bytes")
    data = work.read(name)
    if data is None or sha256_hex(data) != record.sha256:
        raise CorruptionError(f"{name} must have the digest {record.sha256[:12]}... that its JSON names")
    try:
        tensors = load(data)
    except UNREADABLE as error:
        raise CorruptionError(
            f"{name} must be a safetensors file ({type(error).__name__}: {error})"
        ) from error
    return Checkpoint(step=step, tensors=tensors, history=record.history, skipped=record.skipped)


def read_record(work: WorkArea, step: int) -> Record:
    """What the JSON of a checkpoint says."""
    name = f"{name_of(step)}.json"
    size = work.size(name)
    if size is None or size > MAX_RECORD_BYTES:
        raise CorruptionError(f"{name} must have at most {MAX_RECORD_BYTES} bytes, got {size}")
    record = parsed(work.read(name) or b"", name=name)
    if record.step != step:
        raise CorruptionError(f"{name} must be of the step in its name, and is of step {record.step}")
    return record
