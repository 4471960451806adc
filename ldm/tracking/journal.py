"""What tracked runs have to say, on disk before anybody is told, and how far it was delivered.

    <journals>/<room>/address                 the tracking address that a room's journals are for
    <journals>/<room>/<name>/journal.jsonl    entries, `{"do": ..., ...}`, each appended by one write
    <journals>/<room>/<name>/delivered.json   which of them the service has taken
    <journals>/<room>/<name>/files/           pictures and files that entries name, until they are taken
    <journals>/<room>/<name>/sending          lock of the one who sends

A journal may have several writers, one after another or side by side: attempts at one run. Each holds a
shared lock on the file for as long as it lives, which the system frees when its process dies; a journal is
removed when it is delivered and nobody writes. What cannot be read, the last line of a writer that was
killed, is passed over.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
NUM_ROOM_DIGITS = 12

Entry = Mapping[str, Any]


@dataclass
class Delivered:
    """How far a service has taken a journal.

    Attributes:
        offset: Bytes of the journal that are settled, but for `deferred`.
        run_id: The run in the service; None before it was created.
        adopted: Whether that run has things that this journal does not know of.
        num_attempts: How often the run was begun.
        last_steps: The last step taken of each series of points or pictures.
        deferred: Offsets of entries that the service alone of all did not take; they are tried again.
    """

    offset: int = 0
    run_id: str | None = None
    adopted: bool = False
    num_attempts: int = 0
    last_steps: dict[str, int] = field(default_factory=dict)
    deferred: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Waiting:
    """What an address has yet to take: the number of runs, of points and of all else."""

    address: str
    num_runs: int
    num_points: int
    num_others: int

    def __str__(self) -> str:
        return (
            f"{self.num_points:,} points and {self.num_others:,} other reports of {self.num_runs:,} "
            f"run{'' if self.num_runs == 1 else 's'} wait for MLflow at {self.address}; they are sent "
            "when the next run there begins"
        )


class Writer:
    """Appends entries; a line is whole or, after a kill or on a full disk, passed over by readers."""

    def __init__(self, journal: "Journal") -> None:
        self._files = journal.files
        self._handle = _opened_to_append(journal.path)
        self._torn = _ends_torn(journal.path)
        self._open = threading.Lock()

    def append(self, entry: Entry) -> None:
        """Adds an entry. Raises OSError."""
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        whole = b"\n" + line if self._torn else line
        self._torn = True
        if os.write(self._handle, whole) == len(whole):
            self._torn = False
        else:
            raise OSError("the disk is full")

    def keep(self, data: bytes) -> str:
        """Returns the name of a new file with `data`, for an entry. Raises OSError."""
        name = uuid.uuid4().hex
        self._files.mkdir(exist_ok=True)
        (self._files / name).write_bytes(data)
        return name

    def sync(self) -> None:
        """Waits until what was appended survives a loss of power. Raises OSError."""
        os.fsync(self._handle)

    def close(self) -> None:
        """Gives the journal up; a second call does nothing."""
        if self._open.acquire(blocking=False):
            os.close(self._handle)


class Journal:
    """One run's journal; its folder is made by the first writer."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.folder = folder
        self.path = folder / "journal.jsonl"
        self.files = folder / "files"

    def entries(self, offset: int = 0) -> Iterator[tuple[Entry, int, int]]:
        """Yields each entry from an offset on, with the offsets of its begin and end."""
        with suppress(FileNotFoundError), self.path.open("rb") as lines:
            lines.seek(offset)
            for line in lines:
                if not line.endswith(b"\n"):
                    return
                begin, offset = offset, offset + len(line)
                with suppress(ValueError):
                    entry = json.loads(line)
                    yield entry, begin, offset

    @property
    def begun_ms(self) -> int:
        """When it was begun (Unix time); 0 when it is empty."""
        return next((entry["at_ms"] for entry, _, _ in self.entries()), 0)

    def entry_at(self, offset: int) -> Entry:
        """Returns the entry that begins there."""
        return next(self.entries(offset))[0]

    def undelivered(self) -> Iterator[Entry]:
        """Yields the entries that the service has yet to take."""
        delivered = self.delivered()
        yield from (self.entry_at(offset) for offset in delivered.deferred)
        yield from (entry for entry, _, _ in self.entries(delivered.offset))

    def delivered(self) -> Delivered:
        """Returns how far the service has taken it; if that is damaged, not at all: it is asked then."""
        try:
            return Delivered(**json.loads((self.folder / "delivered.json").read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return Delivered()

    def save(self, delivered: Delivered) -> None:
        """Remembers how far the service has taken it."""
        temporary = self.folder / "delivered.json.tmp"
        temporary.write_text(json.dumps(asdict(delivered)), encoding="utf-8")
        temporary.replace(self.folder / "delivered.json")

    @property
    def has_ended(self) -> bool:
        """Whether the last attempt said how it ended."""
        last = None
        for entry, _, _ in self.entries():
            last = entry["do"] if entry["do"] in {"begin", "end"} else last
        return last == "end"

    @contextmanager
    def sending(self) -> Iterator[bool]:
        """Holds the right to send, if nobody else has it: whether."""
        try:
            handle = (self.folder / "sending").open("w")
        except FileNotFoundError:
            yield False
        else:
            with handle, _locked(handle.fileno()) as ours:
                yield ours

    def discard_if_unused(self) -> None:
        """Removes it, unless somebody writes."""
        with suppress(FileNotFoundError), self.path.open("rb") as handle, _locked(handle.fileno()) as unused:
            if unused:
                shutil.rmtree(self.folder)

    @property
    def is_written(self) -> bool:
        """Whether somebody writes."""
        with suppress(FileNotFoundError), self.path.open("rb") as handle, _locked(handle.fileno()) as unused:
            return not unused
        return False


class Room:
    """The journals for one address."""

    def __init__(self, journals: Path, address: str) -> None:
        self.address = address
        self.folder = journals / hashlib.sha256(address.encode()).hexdigest()[:NUM_ROOM_DIGITS]

    @classmethod
    def at(cls, folder: Path) -> Self:
        """Returns the room in a folder. Raises OSError."""
        return cls(folder.parent, (folder / "address").read_text("utf-8"))

    def journal(self, stage: str, run_id: str | None) -> Journal:
        """Returns the journal of a run known by the journal's name or the service's id; else a new one."""
        for journal in self.journals():
            if run_id is not None and run_id in {journal.name, journal.delivered().run_id}:
                return journal
        if run_id is not None and NAME.fullmatch(run_id):
            return Journal(self.folder / run_id)
        return Journal(self.folder / f"{stage}-{uuid.uuid4().hex[:16]}")

    def known(self, run_id: str) -> Journal | None:
        """Returns the journal of a run, if there is one."""
        journal = self.journal("", run_id)
        return journal if journal.path.exists() else None

    def write(self, journal: Journal) -> Writer:
        """Returns a new writer of a journal. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "address").write_text(self.address, "utf-8")
        return Writer(journal)

    def journals(self) -> list[Journal]:
        """Returns all journals, those begun first at the front."""
        found = [Journal(path.parent) for path in self.folder.glob("*/journal.jsonl")]
        return sorted(found, key=lambda journal: journal.begun_ms)

    def waiting(self) -> Waiting | None:
        """Returns what was not delivered though nobody writes it any more; None if there is no such thing."""
        left = [journal for journal in self.journals() if not journal.is_written]
        entries = [list(journal.undelivered()) for journal in left]
        points = sum(len(e["values"]) for one in entries for e in one if e["do"] == "points")
        others = sum(e["do"] != "points" for one in entries for e in one)
        num_runs = sum(bool(one) for one in entries)
        return Waiting(self.address, num_runs, points, others) if num_runs else None


def waiting(journals: Path) -> list[Waiting]:
    """Returns what each address has yet to take of the runs that ended or were cut off."""
    rooms = (Room.at(path.parent) for path in sorted(journals.glob("*/address")))
    return [one for room in rooms if (one := room.waiting())]


def _opened_to_append(path: Path) -> int:
    """Opens a journal that stays: one that is removed between its opening and its lock is made again."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue
        fcntl.flock(handle, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)


def _ends_torn(path: Path) -> bool:
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        return file.read() not in {b"", b"\n"}


@contextmanager
def _locked(handle: int) -> Iterator[bool]:
    """Holds the lock of an open file, if it is free: whether."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
