"""Pictures in a folder of one's own: which there are, what they are called, what is written beside them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

from fsspec.core import url_to_fs

from datasets.config import DatasetConfig, Folder
from datasets.curate import Outcome
from datasets.errors import MissingDataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
CAPTION_SUFFIX = ".txt"

_log = logging.getLogger(__name__)


class PictureFile(NamedTuple):
    """One picture: path below the root, caption, the folder that is its class ("" for none), digest."""

    path: str
    caption: str
    class_name: str
    sha256: str


class _Files(Protocol):
    """The part of an fsspec file system used here."""

    def find(self, path: str) -> list[str]: ...
    def cat_file(self, path: str) -> bytes: ...


def scan_folder(config: DatasetConfig) -> list[PictureFile]:
    """Return the pictures of a ``folder`` data set, sorted by path.

    Every file is read once for its digest, so that the list changes exactly when the pictures do. Hidden
    files and files of other kinds are passed over.

    Raises:
        MissingDataError: When no folder is named, it does not exist, or holds no picture.
    """
    source = config.source
    if not isinstance(source, Folder):
        raise TypeError(f"only a source of kind folder can be scanned, got {source.kind}")
    if config.folder is None:
        raise _missing(config, source, "its folder is not set")
    files, base = _open(config.folder)
    names = _names(files, base)
    pictures = [name for name in names if _is_picture(name)]
    if not pictures:
        state = "holds no picture" if names else "does not exist or is empty"
        raise _missing(config, source, f"{config.folder} {state}")
    _log.info("reading the digests of %d pictures in %s", len(pictures), config.folder)
    texts = {name for name in names if name.endswith(CAPTION_SUFFIX)}
    found = [_picture(files, base, name, texts, source) for name in pictures]
    if source.expected_count is not None and len(found) != source.expected_count:
        _log.warning(
            "%s: a complete copy has %d pictures, %s holds %d; going on with those",
            config.name, source.expected_count, config.folder, len(found),
        )  # fmt: skip
    return found


def read_pictures(root: str, paths: list[str]) -> Iterator[bytes | Outcome]:
    """Yield the bytes of each picture below a root, in order, or that it could not be read."""
    files, base = _open(root)
    for path in paths:
        try:
            yield files.cat_file(f"{base}/{path}")
        except OSError as error:
            _log.warning("%s/%s could not be read: %s", root, path, error)
            yield Outcome.UNREADABLE


def find_pictures(places: Sequence[Path]) -> list[Path]:
    """Return the picture files that places name: files as they are, of folders those below, sorted.

    Raises:
        MissingDataError: When a place does not exist, or a folder holds no picture.
    """
    found: list[Path] = []
    for place in places:
        if not place.exists():
            raise MissingDataError(
                f"pictures must be files or folders, but {place} does not exist; name another"
            )
        names = _names(*_open(str(place))) if place.is_dir() else [""]
        pictures = [place / name for name in names if not name or _is_picture(name)]
        if not pictures:
            raise MissingDataError(
                f"a folder must hold pictures ({', '.join(sorted(SUFFIXES))}), {place} holds none; "
                "name another"
            )
        found += pictures
    return found


def _is_picture(name: str) -> bool:
    """Return whether a file's name ends as that of a picture."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _open(root: str) -> tuple[_Files, str]:
    """Return the file system of a root, and the root's path in it."""
    address = root if "://" in root else str(Path(root).expanduser().absolute())
    files, base = url_to_fs(address)
    return files, base.rstrip("/")


def _names(files: _Files, base: str) -> list[str]:
    """Return the paths of all files below a base that are not hidden, relative to it and sorted."""
    try:
        found = files.find(base)
    except OSError:
        return []
    relative = sorted(name.removeprefix(base).lstrip("/") for name in found)
    return [name for name in relative if name and not any(part.startswith(".") for part in name.split("/"))]


def _picture(files: _Files, base: str, name: str, texts: set[str], source: Folder) -> PictureFile:
    """Return one picture with its digest, and its caption when a text lies beside it."""
    text = str(PurePosixPath(name).with_suffix(CAPTION_SUFFIX))
    caption = ""
    if text in texts:
        caption = " ".join(files.cat_file(f"{base}/{text}").decode("utf-8", "replace").split())
    folders = name.split("/")[:-1]
    class_name = folders[0] if folders and source.classes_from_folders else ""
    digest = hashlib.sha256(files.cat_file(f"{base}/{name}")).hexdigest()
    return PictureFile(name, caption, class_name, digest)


def _missing(config: DatasetConfig, source: Folder, state: str) -> MissingDataError:
    """Return the error for pictures that are not where they should be, and what is expected there."""
    return MissingDataError(
        f"the pictures of the data set {config.name} must be in a folder, but {state}; name the folder with "
        f"`--set dataset.root=/path/to/pictures`. Expected there: {source.layout}"
    )
