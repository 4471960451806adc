"""SIGTERM, which preemption and cancelling send, as a wish that the loop grants after its step."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class Stopping:
    """While it is entered, SIGTERM only sets `asked`; leaving sends it once more, to whoever had it before.

    Python gives signals to the main thread alone; in another one nothing is caught.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: object = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is None:
            return
        signal.signal(signal.SIGTERM, self._before)  # pyright: ignore[reportArgumentType]
        if self.asked:
            os.kill(os.getpid(), signal.SIGTERM)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.asked = True
