"""Sends a journal to a tracking service: everything, in order, each thing exactly once.

What was taken is remembered after each call. A call that was cut short is made again with the same contents
and the same times, so a service must take one thing twice as once. What an attempt reports again after a
resume is told by its step: the last one taken of each series is remembered as well.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ldm.tracking.journal import Delivered, Entry, Journal, Room

logger = logging.getLogger(__name__)

NUM_POINTS_PER_SEND = 200
PICTURE_SERIES = "picture {}"


@dataclass(frozen=True, slots=True)
class Point:
    """One number: `value` of `key` after `step` images seen, taken at `timestamp_ms` (Unix time)."""

    key: str
    value: float
    step: int
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class KnownRun:
    """A run that the service has, and how often it was begun."""

    id: str
    num_attempts: int


class Service(Protocol):
    """A tracking service: blocking calls that may raise and that may safely be repeated."""

    address: str

    def answers(self) -> bool:
        """Whether it is there at all."""
        ...

    def is_hopeless(self, error: Exception, /) -> bool:
        """True for an error that trying again cannot cure."""
        ...

    def find(self, name: str) -> KnownRun | None:
        """Returns the run that has this id, or was created for the journal of this name."""
        ...

    def create(self, begin: Entry, *, journal: str) -> str:
        """Returns the id of a new run, created for a journal as its first entry says."""
        ...

    def describe(self, run_id: str, begin: Entry, *, parent: str | None, attempt: int) -> None:
        """Marks a run as running and adds tags and the parameters that it does not have yet."""
        ...

    def last_step(self, run_id: str, key: str) -> int:
        """Returns the last step of a series of points; -1 if there is none."""
        ...

    def has_picture(self, run_id: str, name: str, step: int) -> bool:
        """Whether a series of pictures has one at this step."""
        ...

    def send_points(self, run_id: str, points: Sequence[Point]) -> None:
        """Records metric points."""
        ...

    def send(self, run_id: str, entry: Entry, *, journal: Journal) -> None:
        """Records anything else."""
        ...


class NotYetError(Exception):
    """What an entry needs is not in the service yet, and somebody else brings it there."""


@dataclass
class _Parcel:
    """Entries that are sent at once: points, or one of anything else."""

    entries: list[Entry]
    begin: int
    end: int

    @property
    def has_points(self) -> bool:
        return self.entries[0]["do"] == "points"

    @property
    def num_points(self) -> int:
        return sum(len(entry["values"]) for entry in self.entries)

    def takes(self, entry: Entry) -> bool:
        """Whether an entry is sent with these."""
        both = self.has_points and entry["do"] == "points"
        return both and self.num_points + len(entry["values"]) <= NUM_POINTS_PER_SEND

    @property
    def label(self) -> str:
        """What log lines call it."""
        entry = self.entries[0]
        if self.has_points:
            return f"{self.num_points} metric points"
        name = next((str(entry[key]) for key in ("name", "path", "key", "status") if key in entry), "")
        return f"{entry['do']} {name}".strip()


class Delivery:
    """Sends one journal, as far as it was written and as the service takes it; never raises because of it.

    Attributes:
        delivered: how far it is.
        is_away: whether the service did not answer the last time.
        is_early: whether it only waits for another run to be created.
    """

    def __init__(self, room: Room, journal: Journal, service: Service) -> None:
        self.delivered = journal.delivered()
        self.is_away = self.is_early = False
        self._room, self._journal, self._service = room, journal, service

    def advance(self, is_due_elsewhere: Callable[[], bool] = lambda: False) -> bool:
        """True when everything was taken; stops early when asked to, or when the service is away."""
        self.is_early = False
        with self._journal.sending() as ours:
            if not ours:
                return False
            self.delivered = self._journal.delivered()
            for parcel in self._parcels():
                if not self._is_settled(parcel):
                    return False
                self._forget(parcel)
                if is_due_elsewhere():
                    return False
            self._again()
            return not self.delivered.deferred

    def _parcels(self) -> Iterator[_Parcel]:
        parcel: _Parcel | None = None
        for entry, begin, end in self._journal.entries(self.delivered.offset):
            if parcel is not None and parcel.takes(entry):
                parcel.entries.append(entry)
                parcel.end = end
                continue
            if parcel is not None:
                yield parcel
            parcel = _Parcel([entry], begin, end)
        if parcel is not None:
            yield parcel

    def _is_settled(self, parcel: _Parcel) -> bool:
        """True if a parcel was taken, refused or put off; False if the service must be waited for."""
        steps: dict[str, int] = {}
        try:
            steps = self._send(parcel)
        except NotYetError:
            self.is_early = True
            return False
        except Exception as error:
            lives, entry = self._service.answers(), parcel.entries[0]
            if lives and self._service.is_hopeless(error) and self.delivered.run_id is not None:
                self._warn("%s refused %s, which is dropped: %s", parcel, error)
            elif lives and entry["do"] not in {"begin", "points"}:
                self._warn("%s did not take %s; it is tried again: %s", parcel, error)
                self.delivered.deferred.append(parcel.begin)
            else:
                if not self.is_away:
                    self._warn("%s did not take %s; work goes on and it is tried again: %s", parcel, error)
                self.is_away = True
                return False
        if self.is_away:
            logger.info("%s answers again; what had waited is delivered", self._service.address)
            self.is_away = False
        self.delivered.offset = parcel.end
        self.delivered.last_steps |= steps
        self._journal.save(self.delivered)
        return True

    def _warn(self, message: str, parcel: _Parcel, error: Exception) -> None:
        logger.warning(message, self._service.address, parcel.label, first_line(error))

    def _again(self) -> None:
        """Tries once more what the service alone of all did not take."""
        for offset in list(self.delivered.deferred):
            entry = self._journal.entry_at(offset)
            parcel = _Parcel([entry], offset, offset)
            try:
                self._send(parcel)
            except Exception as error:
                if not self._service.is_hopeless(error) or not self._service.answers():
                    continue
                self._warn("%s refused %s, which is dropped: %s", parcel, error)
            self.delivered.deferred.remove(offset)
            self._journal.save(self.delivered)
            self._forget(parcel)

    def _forget(self, parcel: _Parcel) -> None:
        """Removes the file of an entry that is settled."""
        file = parcel.entries[0].get("file")
        if file is not None and parcel.begin not in self.delivered.deferred:
            (self._journal.files / file).unlink(missing_ok=True)

    def _send(self, parcel: _Parcel) -> dict[str, int]:
        """Sends a parcel; returns the last step of each series in it."""
        entry, run_id = parcel.entries[0], self.delivered.run_id
        if entry["do"] == "begin":
            self._begin(entry)
            return {}
        assert run_id is not None
        if parcel.has_points:
            return self._send_points(run_id, parcel.entries)
        if entry["do"] == "picture":
            return self._send_picture(run_id, entry)
        self._service.send(run_id, entry, journal=self._journal)
        return {}

    def _begin(self, entry: Entry) -> None:
        name, before = self._journal.name, self.delivered.run_id
        known = (self._service.find(before) if before else None) or self._service.find(name)
        parent = self._parent(entry)
        if known is None:
            if entry["continues"]:
                message = "%s has no run %s to continue; another is begun"
                logger.warning(message, self._service.address, before or name)
            run_id = self._service.create(entry, journal=name)
            self.delivered = Delivered(self.delivered.offset, run_id, deferred=self.delivered.deferred)
        else:
            run_id = known.id
            if run_id != before:
                self.delivered.run_id, self.delivered.adopted = run_id, True
                self.delivered.num_attempts = known.num_attempts
        self._journal.save(self.delivered)
        attempt = self.delivered.num_attempts + 1
        self._service.describe(run_id, entry, parent=parent, attempt=attempt)
        self.delivered.num_attempts = attempt

    def _parent(self, begin: Entry) -> str | None:
        """Returns the service's id of the run above."""
        name = begin["parent"]
        journal = self._room.known(name) if name else None
        if name is None or journal is None:
            known = self._service.find(name) if name else None
            return known.id if known else name
        run_id = journal.delivered().run_id
        if run_id is None:
            raise NotYetError
        return run_id

    def _last_step(self, run_id: str, key: str) -> int:
        if key in self.delivered.last_steps:
            return self.delivered.last_steps[key]
        return self._service.last_step(run_id, key) if self.delivered.adopted else -1

    def _send_points(self, run_id: str, entries: Sequence[Entry]) -> dict[str, int]:
        steps: dict[str, int] = {}
        new: list[Point] = []
        for entry in entries:
            for key, value in entry["values"].items():
                last = steps[key] if key in steps else self._last_step(run_id, key)
                step = last + 1 if entry["step"] is None else entry["step"]
                steps[key] = max(last, step)
                if step > last:
                    new.append(Point(key, value, step, entry["at_ms"]))
        if new:
            self._service.send_points(run_id, new)
        return steps

    def _send_picture(self, run_id: str, entry: Entry) -> dict[str, int]:
        series, step = PICTURE_SERIES.format(entry["name"]), entry["step"]
        last = self.delivered.last_steps.get(series, -1)
        is_known = step <= last or (
            self.delivered.adopted and self._service.has_picture(run_id, entry["name"], step)
        )
        if not is_known:
            self._service.send(run_id, entry, journal=self._journal)
        return {series: max(last, step)}


def first_line(error: Exception) -> str:
    """Returns what an error says in one line fit for a log."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
