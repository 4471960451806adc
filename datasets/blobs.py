"""Named bytes in a folder or in an object store, written whole or not at all.

Two classes of one shape: ``LocalBlobs`` for a folder, ``RemoteBlobs`` for all else that fsspec knows. Paths
are relative and use "/". ``create`` never overwrites and returns what the path holds afterwards, so that a
lost race, or a lost answer, is told from a success by comparing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import fsspec

from datasets.errors import SpaceError, StoreError
from datasets.keys import sha256_file, sha256_hex

TEMPORARY = ".tmp-"
STALE_S = 3600.0
COPY_BYTES = 1 << 20
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def worded(error: Exception, address: str) -> StoreError:
    """Return the store's own error for what went wrong at an address."""
    if isinstance(error, OSError) and error.errno in FULL:
        return SpaceError(
            f"{address} needs more room than there is ({error}); "
            "free space there or name another place with --store"
        )
    return StoreError(
        f"the store must be readable and writable, but {address} is not ({type(error).__name__}: {error}); "
        "check it or name another with --store"
    )


@contextlib.contextmanager
def translated(address: str, *, kinds: type[Exception] = OSError) -> Iterator[None]:
    """Turn what goes wrong inside into a StoreError that names the place."""
    try:
        yield
    except StoreError:
        raise
    except kinds as error:
        raise worded(error, address) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create a folder with its parents and make their names durable.

    Raises:
        NotADirectoryError: When a file is in the way.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error
    for place in missing:
        sync_folder(place.parent)


def write_whole(
    target: Path, fill: Callable[[IO[bytes]], object], *, publish: Callable[[Path, Path], object]
) -> None:
    """Write a local file so that it appears complete and durable, or not at all.

    Args:
        target: The final path; its folder is created.
        fill: Writes the content to the stream it is given.
        publish: ``os.link`` to refuse an existing target with FileExistsError, ``os.replace`` to take its
            place.
    """
    make_folder(target.parent)
    temporary = target.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        with temporary.open("xb") as stream:
            fill(stream)
            stream.flush()
            os.fsync(stream.fileno())
        publish(temporary, target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _unless_shared(_function: object, _path: str, info: tuple[type, BaseException, object]) -> None:
    """Raise what kept a folder from being removed, unless it was another process at work in it."""
    error = info[1]
    if not (isinstance(error, OSError) and error.errno in {errno.ENOENT, errno.ENOTEMPTY}):
        raise error


class LocalBlobs:
    """Blobs below a local folder: a temporary file, fsync, then link or rename, then fsync of the folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def address(self, path: str) -> str:
        """Return the path's place, for people and messages."""
        return str(self.root / path)

    def probe(self) -> None:
        """Create the folder and a file in it, then remove the file; raises OSError when it cannot."""
        make_folder(self.root)
        probe = self.root / f"{TEMPORARY}{secrets.token_hex(8)}"
        probe.touch(exist_ok=False)
        probe.unlink()

    def create(self, path: str, data: bytes) -> bytes:
        """Write bytes where nothing is yet; return what the path holds afterwards."""
        target = self.root / path
        with translated(self.address(path)):
            if not target.exists():
                with contextlib.suppress(FileExistsError):
                    write_whole(target, lambda stream: stream.write(data), publish=os.link)
                    return data
            return target.read_bytes()

    def create_from(self, path: str, source: Path) -> str:
        """Copy a file to where nothing is yet; return the SHA-256 of what the path holds afterwards."""
        target = self.root / path
        with translated(self.address(path)):
            if not target.exists():
                with source.open("rb") as origin, contextlib.suppress(FileExistsError):
                    write_whole(
                        target, lambda stream: shutil.copyfileobj(origin, stream, COPY_BYTES), publish=os.link
                    )
            return sha256_file(target)

    def replace(self, path: str, data: bytes | bytearray) -> None:
        """Write bytes to a path, in one step in place of what it held."""
        with translated(self.address(path)):
            write_whole(self.root / path, lambda stream: stream.write(data), publish=os.replace)

    def read(self, path: str) -> bytes | None:
        """Return the bytes of a path, or None when there are none."""
        with translated(self.address(path)):
            try:
                return (self.root / path).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def size(self, path: str) -> int | None:
        """Return the size of a path in bytes, or None when it does not exist."""
        with translated(self.address(path)):
            try:
                return (self.root / path).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

    def digest(self, path: str) -> str | None:
        """Return the SHA-256 of what a path holds, in constant memory, or None when it does not exist."""
        with translated(self.address(path)):
            try:
                return sha256_file(self.root / path)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def num_bytes(self, folder: str) -> int:
        """Return the size of all files below a folder, 0 when it does not exist."""
        with translated(self.address(folder)):
            return sum(found.lstat().st_size for found in (self.root / folder).rglob("*") if found.is_file())

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the files directly in a folder, links and temporary ones left out."""
        with translated(self.address(folder)):
            try:
                entries = list(os.scandir(self.root / folder))
                files = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(name for name in files if not name.startswith(TEMPORARY))

    def match(self, pattern: str) -> list[str]:
        """Return the sorted paths that match a glob pattern."""
        return sorted(found.relative_to(self.root).as_posix() for found in self.root.glob(pattern))

    def remove(self, path: str) -> None:
        """Remove a path if it exists."""
        with translated(self.address(path)):
            (self.root / path).unlink(missing_ok=True)

    def remove_folder(self, folder: str) -> None:
        """Remove a folder and all in it, if it exists."""
        with translated(self.address(folder)):
            shutil.rmtree(self.root / folder, onerror=_unless_shared)

    def discard(self, folder: str) -> None:
        """Remove a folder so that nobody sees a part of it: it gets another name first."""
        aside = (self.root / folder).with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
        with translated(self.address(folder)), contextlib.suppress(FileNotFoundError):
            (self.root / folder).rename(aside)
            shutil.rmtree(aside)

    def sweep(self, folder: str) -> None:
        """Remove the temporary files of killed writers, recognised by an hour without a write."""
        for left in (self.root / folder).glob(f"{TEMPORARY}*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > STALE_S:
                    left.unlink()


class RemoteBlobs:
    """Blobs in an object store: one put each, create-only where nothing may be overwritten.

    Args:
        filesystem: The fsspec filesystem.
        root: The store's root in it, e.g. ``bucket/prefix``.
    """

    def __init__(self, filesystem: Any, root: str) -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/")

    def address(self, path: str) -> str:
        """Return the path's place, for people and messages."""
        return self.filesystem.unstrip_protocol(self._full(path))

    def probe(self) -> None:
        """Put an object and remove it; raises what the filesystem raises when that is impossible."""
        path = self._full(f"{TEMPORARY}{secrets.token_hex(8)}")
        self.filesystem.pipe_file(path, b"probe")
        self.filesystem.rm_file(path)

    def create(self, path: str, data: bytes) -> bytes:
        """Put bytes where nothing is yet; return what the path holds afterwards."""
        full = self._full(path)
        held = self._create(path, lambda: self.filesystem.pipe_file(full, data, mode="create"))
        return data if held is None else held

    def create_from(self, path: str, source: Path) -> str:
        """Put a file where nothing is yet; return the SHA-256 of what the path holds afterwards."""
        digest = sha256_file(source)
        full = self._full(path)
        held = self._create(path, lambda: self.filesystem.put_file(str(source), full, mode="create"))
        return digest if held is None else sha256_hex(held)

    def replace(self, path: str, data: bytes | bytearray) -> None:
        """Put bytes at a path, in place of what it held."""
        with translated(self.address(path), kinds=Exception):
            self.filesystem.pipe_file(self._full(path), data)

    def read(self, path: str) -> bytes | None:
        """Return the bytes of a path, or None when there are none."""
        with translated(self.address(path), kinds=Exception):
            try:
                return self.filesystem.cat_file(self._full(path))
            except FileNotFoundError:
                return None

    def size(self, path: str) -> int | None:
        """Return the size of a path in bytes, or None when it does not exist."""
        with translated(self.address(path), kinds=Exception):
            try:
                return int(self.filesystem.info(self._full(path))["size"])
            except FileNotFoundError:
                return None

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the objects directly in a folder."""
        with translated(self.address(folder), kinds=Exception):
            try:
                entries = self.filesystem.ls(self._full(folder), detail=True)
            except FileNotFoundError:
                return []
        names = (entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "file")
        return sorted(name for name in names if name)  # some stores list the folder itself, as "folder/"

    def digest(self, path: str) -> str | None:
        """Return the SHA-256 of what a path holds, in constant memory, or None when it does not exist."""
        with translated(self.address(path), kinds=Exception):
            try:
                with self.filesystem.open(self._full(path), "rb") as stream:
                    return hashlib.file_digest(stream, "sha256").hexdigest()
            except FileNotFoundError:
                return None

    def num_bytes(self, folder: str) -> int:
        """Return the size of all objects below a folder, 0 when there are none."""
        with translated(self.address(folder), kinds=Exception):
            return int(self.filesystem.du(self._full(folder)))

    def match(self, pattern: str) -> list[str]:
        """Return the sorted paths that match a glob pattern."""
        with translated(self.address(pattern), kinds=Exception):
            found = self.filesystem.glob(self._full(pattern))
        return sorted(str(path)[len(self.root) + 1 :] for path in found)

    def remove(self, path: str) -> None:
        """Remove a path if it exists."""
        with translated(self.address(path), kinds=Exception), contextlib.suppress(FileNotFoundError):
            self.filesystem.rm_file(self._full(path))

    def remove_folder(self, folder: str) -> None:
        """Remove a folder and all in it, if it exists."""
        with translated(self.address(folder), kinds=Exception), contextlib.suppress(FileNotFoundError):
            self.filesystem.rm(self._full(folder), recursive=True)

    def discard(self, folder: str) -> None:
        """Remove a folder; object by object, as an object store cannot rename one."""
        self.remove_folder(folder)

    def sweep(self, folder: str) -> None:
        """Do nothing: an object store shows no half-written object."""

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _create(self, path: str, put: Callable[[], object]) -> bytes | None:
        """Put, and return None, or what the path holds when the put was not answered with a success.

        A put whose answer was lost looks like a failure; repeated by the client library it looks like an
        object of somebody else's. Only the bytes that are there can tell, so they are read back.
        """
        try:
            put()
        except Exception as error:  # object stores raise what their client library likes
            held = self.read(path)
            if held is None:
                raise worded(error, self.address(path)) from error
            return held
        return None


def open_blobs(uri: str) -> LocalBlobs | RemoteBlobs:
    """Return the blobs under a URI; a plain path and ``file://`` are a local folder.

    Raises:
        StoreError: When the protocol is unknown or its package is missing.
    """
    try:
        filesystem, root = fsspec.url_to_fs(uri, use_listings_cache=False)
    except (ValueError, ImportError, OSError) as error:
        message = (
            f"the store must be a folder or an fsspec URI, got {uri!r} ({error}); "
            "name another with --store, e.g. --store ./artifacts or --store s3://bucket/prefix"
        )
        raise StoreError(message) from error
    protocols = {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)
    return LocalBlobs(Path(root)) if "file" in protocols else RemoteBlobs(filesystem, root)
