"""The thread that sends beside the work: a run's own journal first, then what earlier runs left behind."""

import logging
import threading
from collections.abc import Callable

from ldm.tracking.delivery import Delivery, Service, first_line
from ldm.tracking.journal import Journal, Room, Writer

logger = logging.getLogger(__name__)

INTERVAL_S = 10.0
EARLY_S = 0.5
"""Seconds until it is tried again while only another run must be created first."""


class Sender:
    """A daemon thread that delivers a journal, and every other of the room that nobody writes.

    Args:
        room: where journals lie.
        journal: the run's own.
        writer: its writer, given up when the thread ends: until then nobody else delivers the journal.
        service: who takes them.
        interval_s: seconds between deliveries, also while the service is away.
    """

    def __init__(
        self,
        room: Room,
        journal: Journal,
        writer: Writer,
        service: Service,
        *,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._room, self._journal, self._writer, self._service = room, journal, writer, service
        self._own = Delivery(room, journal, service)
        self._interval_s = interval_s
        self._is_asked = True
        self._is_closing = self._is_delivered = False
        self._num_begun = self._num_done = 0
        self._state = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="ldm-sender", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The run's id in the service; None before it was created."""
        return self._own.delivered.run_id

    def wake(self) -> None:
        """Has the thread look at once, unless the service is away."""
        if not self._own.is_away:
            with self._state:
                self._is_asked = True
                self._state.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """True if all that was written before this call was taken within `timeout_s` seconds."""
        with self._state:
            target = self._num_begun + 1
            self._is_asked = True
            self._state.notify_all()
            self._state.wait_for(lambda: self._num_done >= target, timeout=timeout_s)
            return self._num_done >= target and self._is_delivered

    def close(self, timeout_s: float) -> bool:
        """True if all was taken within `timeout_s` seconds; nothing may be written any more."""
        with self._state:
            self._is_closing = True
            self._state.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive() and self._is_delivered

    def _is_due(self) -> bool:
        return self._is_closing or self._is_asked

    def _is_all_taken(self) -> bool:
        try:
            return self._own.advance()
        except OSError as error:
            message = "%s cannot remember what was sent, so it is sent again: %s"
            logger.warning(message, self._journal.folder, first_line(error))
            return False

    def _run(self) -> None:
        is_closing = False
        while not is_closing or self._own.is_early:
            with self._state:
                if self._own.is_early:
                    self._state.wait(EARLY_S)
                else:
                    self._state.wait_for(self._is_due, timeout=self._interval_s)
                self._is_asked, is_closing = False, self._is_closing
                self._num_begun += 1
            is_delivered = self._is_all_taken()
            with self._state:
                self._is_delivered = is_delivered
                self._num_done += 1
                self._state.notify_all()
            if is_delivered and not is_closing:
                deliver_left_behind(self._room, self._service, is_due_elsewhere=self._is_due)
        self._writer.close()
        if self._is_delivered:
            self._journal.discard_if_unused()


def deliver_left_behind(room: Room, service: Service, *, is_due_elsewhere: Callable[[], bool]) -> None:
    """Delivers the journals that nobody writes, until told to stop or one is not taken."""
    for journal in room.journals():
        if is_due_elsewhere():
            return
        if not journal.is_written:
            delivery = Delivery(room, journal, service)
            if delivery.advance(is_due_elsewhere):
                journal.discard_if_unused()
            elif delivery.is_away:
                return
