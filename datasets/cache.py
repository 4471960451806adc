"""Files of a remote store kept on this machine: verified, within a bound, and never a reason to fail."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from pathlib import Path

from datasets.blobs import write_whole
from datasets.keys import sha256_hex

_log = logging.getLogger(__name__)

_FIRST = threading.Lock()


class FileCache:
    """Whole files by their SHA-256; the least recently used go first, and processes may share the folder.

    A file is read in one go, so nothing is taken from a reader that has begun. What cannot be kept, because
    the disk is full or the folder cannot be written, is not: a logged warning says so once.

    Args:
        folder: Where the files lie; nothing else may lie there.
        max_bytes: The bound on their sizes together; those who keep one at the same moment may each go beyond
            it by that file.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._warned = False

    def read(self, digest: str) -> bytes | None:
        """Return the bytes of that digest, or None when they are not here; damaged ones are removed."""
        path = self._folder / digest
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if sha256_hex(data) != digest:
            _log.warning("%s is damaged and will be fetched again", path)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):  # another process may just have removed it
            os.utime(path)
        return data

    def keep(self, digest: str, data: bytes) -> None:
        """Keep bytes under their digest if there is room, or room can be made within the bound."""
        if len(data) > self._max_bytes:
            return
        try:
            self._make_room(len(data))
            write_whole(self._folder / digest, lambda stream: stream.write(data), publish=os.replace)
        except OSError as error:
            with _FIRST:  # of several threads that find no room one warns
                told, self._warned = self._warned, True
            if not told:
                _log.warning(
                    "nothing more is kept in %s (%s), so files are read from the store each time; "
                    "free space there, or start where there is some",
                    self._folder,
                    error,
                )

    def _make_room(self, num_bytes: int) -> None:
        """Remove the least recently used files until so many bytes more are within the bound."""
        files = self._files()
        held_bytes = sum(about.st_size for about, _ in files)
        for about, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
            if held_bytes + num_bytes <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            held_bytes -= about.st_size

    def _files(self) -> list[tuple[os.stat_result, Path]]:
        """Return what lies here, of killed writers too; others may be removing some of it."""
        found = []
        for path in self._folder.glob("*"):
            with contextlib.suppress(FileNotFoundError):
                found.append((path.stat(), path))
        return found
