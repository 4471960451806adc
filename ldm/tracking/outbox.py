"""What a run reports through: its journal and the thread that sends from it."""

import logging
import time
from collections.abc import Callable
from typing import Any

from ldm.tracking.delivery import Service, first_line
from ldm.tracking.journal import Entry, Journal, Room
from ldm.tracking.sender import Sender

logger = logging.getLogger(__name__)


class Outbox:
    """Takes entries at once and for good; they are sent from a thread, now or by a later run.

    Args:
        room: where journals lie.
        journal: the run's own.
        begin: its first entry.
        service: who the entries are for.

    Raises:
        OSError: the journal cannot be written.
    """

    def __init__(self, room: Room, journal: Journal, begin: Entry, service: Service) -> None:
        self._room, self._journal = room, journal
        self._writer = room.write(journal)
        self._writer.append({**begin, "do": "begin", "at_ms": _now_ms()})
        self._sender = Sender(room, journal, self._writer, service)

    @property
    def run_id(self) -> str:
        """The run's id in the service; before it was created there, the journal's name."""
        return self._sender.run_id or self._journal.name

    def put(self, entry: Entry, *, data: bytes | None = None, is_urgent: bool = True) -> None:
        """Writes an entry, and the contents of its file; a full disk loses it, with a warning."""

        def append() -> None:
            file: dict[str, Any] = {} if data is None else {"file": self._writer.keep(data)}
            self._writer.append({**entry, **file, "at_ms": _now_ms()})

        self._carefully(append)
        if is_urgent:
            self._sender.wake()

    def sync(self) -> None:
        """Waits until all entries are safe on disk."""
        self._carefully(self._writer.sync)

    def flush(self, timeout_s: float) -> bool:
        """True if the service took all that was put before this call, within `timeout_s` seconds."""
        return self._sender.flush(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Waits at most `timeout_s` seconds until the service has all; a warning says what is left then."""
        is_delivered = self._sender.close(timeout_s)
        self._writer.close()  # also during a call: what it does not bring home is left behind
        if not is_delivered and (left := self._room.waiting()):
            logger.warning("%s", left)

    def _carefully(self, write: Callable[[], None]) -> None:
        """Writes to the journal; a disk that does not take it must not stop the work."""
        try:
            write()
        except OSError as error:
            logger.warning(
                "%s does not take a report, which is lost: %s", self._journal.path, first_line(error)
            )


def _now_ms() -> int:
    """Unix time in ms."""
    return int(time.time() * 1000)
