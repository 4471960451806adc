"""Parts of a piece of work, shared out among processes of a machine by locks that end with their owner."""

from __future__ import annotations

import fcntl
from pathlib import Path
from types import TracebackType
from typing import Self


class Claims:
    """Locks on numbered parts: one process at a time has a part, which is free again when that process ends.

    A lock is one byte of a file that all share. The system holds it for the process: a kill leaves nothing
    behind, and two objects of one process do not exclude each other.

    Args:
        path: The file; it is created.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def take(self, part: int) -> bool:
        """Claim a part; return False when another process has it."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, part)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def release(self, part: int) -> None:
        """Give a part back."""
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, part)
