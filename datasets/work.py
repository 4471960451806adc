"""Work areas: what attempts at an artifact keep in the store to continue after a kill; not an artifact."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from datasets.blobs import LocalBlobs, RemoteBlobs
from datasets.manifest import NAME_PATTERN


def fitting(value: str, pattern: re.Pattern[str], rule: str) -> str:
    """Return a value after checking that it has a pattern."""
    if not pattern.fullmatch(value):
        raise ValueError(f"{rule}, got {value!r}")
    return value


def file_name(name: str) -> str:
    """Return a file name after checking that it can be one everywhere and cannot leave its folder."""
    return fitting(name, NAME_PATTERN, "a file name must be made of letters, digits and any of ._=+-")


class WorkArea:
    """What attempts at one artifact keep to continue after a kill: flat names, each write in one step.

    Args:
        blobs: The store's blobs.
        folder: The area's folder in the store.
        scratch: Its folder on this machine.
    """

    def __init__(self, blobs: LocalBlobs | RemoteBlobs, folder: str, *, scratch: Path) -> None:
        self._blobs = blobs
        self._folder = folder
        self._scratch = scratch

    def write(self, name: str, data: bytes | bytearray) -> None:
        """Write a file, whole and durable, in place of what it held.

        Raises:
            SpaceError: When the store is full; what the file held before is still there.
        """
        self._blobs.replace(f"{self._folder}/{file_name(name)}", data)

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes, or None when it does not exist."""
        return self._blobs.read(f"{self._folder}/{file_name(name)}")

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, or None when it does not exist."""
        return self._blobs.size(f"{self._folder}/{file_name(name)}")

    def digest(self, name: str) -> str | None:
        """Return the SHA-256 of a file as it is read back, in constant memory, or None without one."""
        return self._blobs.digest(f"{self._folder}/{file_name(name)}")

    def names(self, prefix: str = "") -> list[str]:
        """Return the sorted names of the files that begin with a prefix."""
        return [name for name in self._blobs.names(self._folder) if name.startswith(prefix)]

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        self._blobs.remove(f"{self._folder}/{file_name(name)}")

    def sweep(self) -> None:
        """Remove what killed writers left half-written, recognised by an hour without a write."""
        self._blobs.sweep(self._folder)

    @property
    def uri(self) -> str:
        """The area's address in the store."""
        return self._blobs.address(self._folder)

    def num_bytes(self) -> int:
        """Return the size of what the store keeps of it."""
        return self._blobs.num_bytes(self._folder)

    def clear(self) -> None:
        """Remove everything in the area, scratch on this machine too."""
        self._blobs.remove_folder(self._folder)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def path(self, name: str) -> Path:
        """Return a path on this machine for scratch; its folder exists.

        In a local store it is the very file that ``read`` reads; else it is unknown to the store.
        """
        self._scratch.mkdir(parents=True, exist_ok=True)
        return self._scratch / file_name(name)
