"""Signs of life: each rank writes what it is at, since when, and how long that may take."""

import json
import os
import statistics
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

BEACON = "beacon-{rank}.json"
NUM_BYTES = 160
LIMITS_S = {"start": 300.0, "look": 900.0, "validate": 1800.0, "save": 900.0}
FIRST_STEPS_S = 300.0
"""A rank's first steps allocate, and may compile."""
NUM_FIRST_STEPS = 2
STEP_S, STEP_FACTOR = 10.0, 3.0
"""A step may take so long, or so many times the median of the last ones, whichever is longer."""
NUM_STEPS_KEPT = 51


class Beacon:
    """One rank's sign of life; called as the loop's pulse.

    Args:
        folder: shared with the supervisor, on one machine, whose monotonic clock all read.
        rank: whose.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        path = folder / BEACON.format(rank=rank)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._durations: deque[float] = deque(maxlen=NUM_STEPS_KEPT)
        self._num_steps = 0
        self._step_began: float | None = None

    def __call__(self, phase: str, step: int) -> None:
        """It begins a phase of the step-th step."""
        now = time.monotonic()
        if self._step_began is not None:
            self._durations.append(now - self._step_began)
        self._step_began = now if phase == "step" else None
        self._num_steps += phase == "step"
        until, cpu_s = now + self._limit(phase), time.process_time()
        text = json.dumps({"phase": phase, "step": step, "until": until, "cpu_s": cpu_s})
        os.pwrite(self._file, text.encode().ljust(NUM_BYTES), 0)

    def _limit(self, phase: str) -> float:
        if phase != "step":
            return LIMITS_S[phase]
        if self._num_steps <= NUM_FIRST_STEPS:
            return FIRST_STEPS_S
        return max(STEP_S, STEP_FACTOR * statistics.median(self._durations))


def overdue(folder: Path, num_ranks: int, *, since: float) -> str | None:
    """Who is overdue, in words, once all ranks are; None before that.

    Ranks wait for each other in the sum of a step: as long as one is in time, others may wait for it.

    Args:
        folder: shared with the ranks.
        num_ranks: how many.
        since: when they were started, on the monotonic clock.
    """
    now, words = time.monotonic(), []
    for rank in range(num_ranks):
        try:
            said = json.loads((folder / BEACON.format(rank=rank)).read_bytes())
        except FileNotFoundError:
            said = {"phase": "start", "step": 0, "until": since + LIMITS_S["start"]}
        except ValueError:
            return None  # it is being written
        if now <= said["until"]:
            return None
        words.append(f"rank {rank} is at {said['phase']} of step {said['step']}")
    return ", ".join(words)


def cpu_seconds(folder: Path) -> float:
    """CPU seconds of all ranks by their last signs of life, which are removed for the next attempt."""
    total = 0.0
    for path in folder.glob(BEACON.format(rank="*")):
        with suppress(ValueError):
            total += json.loads(path.read_bytes())["cpu_s"]
        path.unlink()
    return total
