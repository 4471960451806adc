"""Background delivery: reports leave the caller at once and reach a slow or absent service later.

Two kinds of things are delivered: points (numbers, sent many at a time) and jobs (all else, a call each).
Both stay in memory until they are accepted; while the service is away they wait, up to a limit, and are tried
again at every interval. Delivery may repeat after an unclear failure, so receivers must accept a thing twice.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

logger = logging.getLogger(__name__)

INTERVAL_S = 10.0
NUM_POINTS_PER_SEND = 200
NUM_POINTS_KEPT = 100_000
NUM_JOBS_KEPT = 500
NUM_TRIES_PER_JOB = 30

T = TypeVar("T")


def with_patience(call: Callable[[], T], *, num_tries: int = 4, pause_s: float = 0.25) -> T:
    """Returns what `call` returns; repeats it while another process holds a SQLite file locked."""
    for _ in range(num_tries - 1):
        try:
            return call()
        except Exception as error:
            if "locked" not in str(error):
                raise
            time.sleep(pause_s)
    return call()


@dataclass(frozen=True, slots=True)
class Point:
    """One number: `value` of `key` after `step` images seen, taken at `timestamp_ms` (Unix time)."""

    key: str
    value: float
    step: int
    timestamp_ms: int


@dataclass(slots=True)
class _Job:
    label: str
    call: Callable[[], object]
    num_tries: int = 0


class Outbox:
    """A daemon thread that delivers points and jobs in order and never raises into the caller.

    Args:
        send: takes a list of at most NUM_POINTS_PER_SEND points; raising means "not accepted".
        is_hopeless: says of an error that trying again cannot help; the thing is then dropped with a warning.
        service: how log lines call the receiver, for example "MLflow (sqlite:////data/mlflow.db)".
        interval_s: seconds between deliveries, also while the service is away.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Point]], None],
        is_hopeless: Callable[[Exception], bool],
        *,
        service: str,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._send = send
        self._is_hopeless = is_hopeless
        self._service = service
        self._interval_s = interval_s
        self._points: deque[Point] = deque()
        self._jobs: deque[_Job] = deque()
        self._num_lost = 0
        self._away = False
        self._asked = False
        self._closing = False
        self._num_begun = 0
        self._num_done = 0
        self._state = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="ldm-outbox", daemon=True)
        self._thread.start()

    def add_points(self, points: Sequence[Point]) -> None:
        """Takes points over and returns at once; beyond NUM_POINTS_KEPT the oldest are lost and counted."""
        with self._state:
            self._points.extend(points)
            while len(self._points) > NUM_POINTS_KEPT:
                self._points.popleft()
                self._num_lost += 1
            if len(self._points) >= NUM_POINTS_PER_SEND:
                self._state.notify_all()

    def add_job(self, label: str, call: Callable[[], object]) -> None:
        """Takes a call over and returns at once; beyond NUM_JOBS_KEPT the oldest are lost and counted."""
        with self._state:
            self._jobs.append(_Job(label, call))
            if len(self._jobs) > NUM_JOBS_KEPT:
                self._jobs.popleft()
                self._num_lost += 1
            self._state.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """True if everything handed over before this call was accepted within `timeout_s` seconds."""
        with self._state:
            target = self._num_begun + 1
            self._asked = True
            self._state.notify_all()
            self._state.wait_for(lambda: self._num_done >= target, timeout=timeout_s)
            return self._num_done >= target and not self._points and not self._jobs

    def close(self, timeout_s: float) -> None:
        """Delivers what is left for at most `timeout_s` seconds; a warning counts what remains then."""
        with self._state:
            self._closing = True
            self._state.notify_all()
        self._thread.join(timeout_s)
        with self._state:
            num_points, num_jobs = len(self._points), len(self._jobs)
            if num_points or num_jobs or self._num_lost:
                message = "%s did not take everything: %d points and %d calls unsent, %d dropped"
                logger.warning(message, self._service, num_points, num_jobs, self._num_lost)

    def _due(self) -> bool:
        full = bool(self._jobs) or len(self._points) >= NUM_POINTS_PER_SEND
        return self._closing or self._asked or (full and not self._away)

    def _run(self) -> None:
        closing = False
        while not closing:
            with self._state:
                self._state.wait_for(self._due, timeout=self._interval_s)
                self._asked = False
                closing = self._closing
                self._num_begun += 1
            self._set_away(not (self._deliver_points() and self._deliver_jobs()))
            with self._state:
                self._num_done += 1
                self._state.notify_all()

    def _set_away(self, away: bool) -> None:
        if self._away and not away:
            logger.info("%s answers again; what had waited is delivered", self._service)
        self._away = away

    def _lose(self, count: int) -> None:
        with self._state:
            self._num_lost += count

    def _accepted(self, label: str, call: Callable[[], object]) -> bool:
        """False if `call` failed in a way that may pass; a hopeless failure is dropped and so settled."""
        try:
            call()
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            if self._is_hopeless(error):
                self._lose(1)
                logger.warning("%s refused %s, which is dropped: %s", self._service, label, reason)
                return True
            if not self._away:
                message = "%s did not take %s; work goes on and it is tried again: %s"
                logger.warning(message, self._service, label, reason)
            return False
        return True

    def _deliver_points(self) -> bool:
        while True:
            with self._state:
                batch = [self._points.popleft() for _ in range(min(len(self._points), NUM_POINTS_PER_SEND))]
            if not batch:
                return True
            if not self._accepted(f"{len(batch)} metric points", lambda batch=batch: self._send(batch)):
                with self._state:
                    self._points.extendleft(reversed(batch))
                return False

    def _deliver_jobs(self) -> bool:
        while True:
            with self._state:
                job = self._jobs.popleft() if self._jobs else None
            if job is None:
                return True
            if not self._accepted(job.label, job.call):
                job.num_tries += 1
                with self._state:
                    if job.num_tries < NUM_TRIES_PER_JOB:
                        self._jobs.append(job)  # at the tail: a job that always fails holds up no other
                    else:
                        self._num_lost += 1
                return False
