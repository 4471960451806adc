"""The artifact store: immutable files named by their content, bound by a manifest that is written last.

Layout below the root, the same in a folder and in a bucket::

    <stage>/<first 16 digits of the key>/<stem>-<first 12 digits of the sha256><suffix>
    <stage>/<first 16 digits of the key>/manifest.json
    work/<stage>/<first 16 digits of the key>/<name>    what attempts keep to continue; not an artifact
    lineage/<stage>/<first 16 digits of the key>.json   manifest of an artifact that lies in another store

Nothing is overwritten and readers believe manifests alone: a file that no manifest names does not exist. So a
writer may be killed at any moment and started again, and two writers of one key end with one artifact.
What is removed loses its manifest first, so that a kill leaves an artifact or none (decision 0014).
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from datasets.blobs import TEMPORARY, LocalBlobs, RemoteBlobs, open_blobs
from datasets.cache import FileCache
from datasets.errors import CorruptionError, SpaceError, StoreError
from datasets.keys import sha256_file, sha256_hex
from datasets.manifest import KEY_PATTERN, STAGE_PATTERN, Content, FileRecord, Manifest
from datasets.patience import patiently
from datasets.work import WorkArea, file_name, fitting

MANIFEST = "manifest.json"
WORK = "work"
LINEAGE = "lineage"
DEFAULT_ROOT = "./artifacts"
FOLDER_PATTERN = re.compile(r"[0-9a-f]{16}")
CACHE_BYTES = 64 << 30
OUTAGE_S = 180.0

_log = logging.getLogger(__name__)


def _folder(stage: str, key: str) -> str:
    """Return an artifact's folder, relative to the root."""
    fitting(stage, STAGE_PATTERN, "a stage must be lowercase words joined by hyphens")
    fitting(key, KEY_PATTERN, "a key must be 64 lowercase hex digits")
    return f"{stage}/{key[:16]}"


def _object_name(name: str, digest: str) -> str:
    """Return the name under which content of that digest is stored."""
    plain = PurePosixPath(file_name(name))
    return f"{plain.stem}-{digest[:12]}{plain.suffix}"


def _size(num_bytes: int) -> str:
    """Return a size for people, e.g. ``3.0 GiB``."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def is_artifact_folder(path: str) -> bool:
    """Return whether a path is one that artifacts have, or one that a removal gave such a folder."""
    stage, _, name = path.partition("/")
    is_named = bool(FOLDER_PATTERN.fullmatch(name)) or name.startswith(TEMPORARY)
    return is_named and bool(STAGE_PATTERN.fullmatch(stage)) and stage not in {WORK, LINEAGE}


class Store:
    """The root that holds artifacts, at any fsspec URI; a local folder is created.

    Args:
        uri: A local path, or an fsspec URI such as ``file:///data``, ``memory://name``, ``s3://bucket/prefix``.
        cache_bytes: The bound on what ``read_cached`` keeps on this machine of a remote store.

    Raises:
        StoreError: When nothing can be written there.
    """

    def __init__(self, uri: str | Path = DEFAULT_ROOT, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._blobs = open_blobs(str(uri))
        try:
            self._blobs.probe()
        except Exception as error:  # object stores raise what their client library likes
            raise StoreError(
                f"the store must be writable, but {self.uri} is not ({type(error).__name__}: {error}); "
                "make it writable or name another with --store"
            ) from error
        folder = self.local_root / "cache" / "files"
        self._cache = None if self.is_local else FileCache(folder, max_bytes=cache_bytes)

    @property
    def uri(self) -> str:
        """The store's address: an absolute path when local, else a URI."""
        return self._blobs.address("").rstrip("/")

    @property
    def is_local(self) -> bool:
        """Whether the store is a folder on this machine."""
        return isinstance(self._blobs, LocalBlobs)

    @property
    def root(self) -> Path:
        """The store's folder.

        Raises:
            StoreError: When the store is not local.
        """
        if isinstance(self._blobs, RemoteBlobs):
            raise StoreError(
                f"only a local store has a folder, got {self.uri}; "
                "use local_root for what must lie on this machine, or name a path with --store"
            )
        return self._blobs.root

    @property
    def local_root(self) -> Path:
        """The folder for databases, caches and logs: the root when local, else ./artifacts."""
        return self.root if self.is_local else Path(DEFAULT_ROOT).absolute()

    def find(self, stage: str, key: str) -> Manifest | None:
        """Return the artifact of that key, or None when it has not been committed.

        Raises:
            CorruptionError: When its manifest is damaged or belongs to another artifact.
        """
        path = f"{_folder(stage, key)}/{MANIFEST}"
        data = self._blobs.read(path)
        return None if data is None else self._parsed(data, path, stage=stage, key=key)

    def put(self, stage: str, key: str, name: str, data: bytes, *, count: int | None = None) -> FileRecord:
        """Store bytes as a file of an artifact to be and return its record; doing it again changes nothing.

        Args:
            stage: The artifact's stage.
            key: The artifact's key.
            name: What the artifact calls the file, e.g. ``train-00000.tar``.
            data: The bytes.
            count: Samples or rows in it, where that means something.

        Raises:
            CorruptionError: When a file of that content's name exists and holds something else.
            SpaceError: When the store is full.
        """
        digest = sha256_hex(data)
        record = FileRecord(name, _object_name(name, digest), len(data), digest, count)
        path = f"{_folder(stage, key)}/{record.path}"
        held = self._blobs.create(path, data)
        self._require_digest(path, record, digest if held is data else sha256_hex(held))
        return record

    def put_file(
        self, stage: str, key: str, name: str, source: Path, *, count: int | None = None
    ) -> FileRecord:
        """Store a copy of a local file like ``put``, without holding it in memory."""
        digest, num_bytes = sha256_file(source), source.stat().st_size
        record = FileRecord(name, _object_name(name, digest), num_bytes, digest, count)
        path = f"{_folder(stage, key)}/{record.path}"
        self._require_digest(path, record, self._blobs.create_from(path, source))
        return record

    def commit(self, content: Content, provenance: Mapping[str, Any]) -> Manifest:
        """Make an artifact exist by writing its manifest, and return it.

        When another attempt was first, its manifest is returned: equal content, the first one's provenance.

        Raises:
            StoreError: When a file of the content is not stored, or the key already names other content.
        """
        folder = _folder(content.stage, content.key)
        self._require_stored(content, folder)
        manifest = Manifest(content, dict(provenance))
        path = f"{folder}/{MANIFEST}"
        data = self._blobs.create(path, manifest.to_json())
        held = self._parsed(data, path, stage=content.stage, key=content.key)
        if held.digest != manifest.digest:
            raise StoreError(
                f"one key must name one content, but {self._blobs.address(path)} holds {held.digest} and "
                f"this attempt made {manifest.digest}; raise the stage's CODE_VERSION if its output changed, "
                "or delete that folder"
            )
        self._blobs.sweep(folder)
        return held

    def has(self, manifest: Manifest, name: str) -> bool:
        """Return whether a file of an artifact, committed or not, is stored; its content is verified there.

        Raises:
            CorruptionError: When it does not have the digest its manifest records.
        """
        record = manifest.file(name)
        path = f"{_folder(manifest.stage, manifest.key)}/{record.path}"
        digest = self._blobs.digest(path)
        if digest is not None:
            self._require_digest(path, record, digest)
        return digest is not None

    def read(self, manifest: Manifest, name: str) -> bytes:
        """Return the bytes of an artifact's file, verified.

        Raises:
            CorruptionError: When the file is missing or does not have the digest its manifest records.
            KeyError: When the artifact has no such file.
        """
        record = manifest.file(name)
        path = f"{_folder(manifest.stage, manifest.key)}/{record.path}"
        data = self._blobs.read(path)
        if data is None:
            raise self._missing(path, record)
        self._require_digest(path, record, sha256_hex(data))
        return data

    def read_cached(self, manifest: Manifest, name: str) -> bytes:
        """Return the bytes of an artifact's file, verified, from this machine's cache when they are there.

        For files that are read again and again. Those of a remote store are kept in ``local_root/cache``, by
        digest; a store that does not answer is asked again for ``OUTAGE_S``.

        Raises:
            CorruptionError: When the file is missing or does not have the digest its manifest records.
            StoreError: When the store cannot be read for that long.
            KeyError: When the artifact has no such file.
        """
        if self._cache is None:
            return self.read(manifest, name)
        record = manifest.file(name)
        data = self._cache.read(record.sha256)
        if data is None:
            data = patiently(lambda: self.read(manifest, name), for_s=OUTAGE_S)
            self._cache.keep(record.sha256, data)
        return data

    def manifests(self, stage: str | None = None, *, strict: bool = False) -> list[Manifest]:
        """Return all committed artifacts, of one stage or of all, sorted by stage and key.

        For listings only: whether one exists is decided by ``find``. Damaged manifests are left out with a
        logged warning, unless ``strict``.

        Raises:
            CorruptionError: With ``strict``, when a manifest is damaged or belongs to another folder.
        """
        found: list[Manifest] = []
        for path in self._blobs.match(f"{stage or '*'}/*/{MANIFEST}"):
            try:
                data = self._blobs.read(path)
                if data is not None:
                    found.append(self._placed(data, path))
            except StoreError as error:
                if strict:
                    raise
                _log.warning("left out of the listing: %s", error)
        return sorted(found, key=lambda manifest: (manifest.stage, manifest.key))

    def remember(self, manifest: Manifest) -> None:
        """Keep the manifest of an artifact that lies in another store, to tell what was made of it."""
        path = f"{LINEAGE}/{_folder(manifest.stage, manifest.key)}.json"
        held = self._blobs.create(path, manifest.to_json())
        if Manifest.from_json(held, source=self._blobs.address(path)).digest != manifest.digest:
            raise StoreError(
                f"one key must name one content, but {self._blobs.address(path)} is of another; delete it"
            )

    def remembered(self) -> list[Manifest]:
        """Return the manifests kept by ``remember``.

        Raises:
            CorruptionError: When one is damaged.
        """
        paths = self._blobs.match(f"{LINEAGE}/*/*.json")
        read = ((path, self._blobs.read(path)) for path in paths)
        return [
            Manifest.from_json(data, source=self._blobs.address(p)) for p, data in read if data is not None
        ]

    def withdraw(self, manifest: Manifest) -> None:
        """Make an artifact not exist; its files stay, and ``commit`` with the same content brings it back."""
        self._blobs.remove(f"{_folder(manifest.stage, manifest.key)}/{MANIFEST}")

    def folders(self) -> list[str]:
        """Return the folders that hold or once held artifacts, relative to the root.

        Among them are those without a manifest: of attempts that run or were cut off, and of removals that
        were cut off.
        """
        folders = {path.rpartition("/")[0] for path in self._blobs.match("*/*/*")}
        return sorted(folder for folder in folders if is_artifact_folder(folder))

    def num_bytes(self, folder: str) -> int:
        """Return the size of all files in a folder of ``folders``."""
        return self._blobs.num_bytes(folder)

    def discard(self, folder: str) -> None:
        """Remove a folder of ``folders``, unless it has a manifest: what exists is withdrawn first."""
        if not is_artifact_folder(folder):
            raise ValueError(f"only the folder of an artifact can be discarded, got {folder!r}")
        if self._blobs.size(f"{folder}/{MANIFEST}") is None:
            self._blobs.discard(folder)

    def work_areas(self) -> dict[str, WorkArea]:
        """Return what attempts have left in the store, by ``<stage>/<first 16 digits of the key>``."""
        parts = (path.split("/") for path in self._blobs.match(f"{WORK}/*/*/*"))
        folders = sorted({f"{stage}/{digits}" for _, stage, digits, _ in parts})
        return {folder: self._work_area(folder) for folder in folders}

    def work(self, stage: str, key: str) -> WorkArea:
        """Return the place where attempts at an artifact keep what they need to continue after a kill."""
        return self._work_area(_folder(stage, key))

    def uri_of(self, manifest: Manifest) -> str:
        """Return the address of an artifact's folder."""
        return self._blobs.address(_folder(manifest.stage, manifest.key))

    def require_free(self, need_bytes: int, *, purpose: str) -> None:
        """Check that a local store has room; an object store is taken to have it.

        Args:
            need_bytes: The room needed.
            purpose: What it is for, the subject of the message, e.g. ``"encode-latents"``.

        Raises:
            SpaceError: When there is less.
        """
        if not self.is_local:
            return
        have_bytes = shutil.disk_usage(self.root).free
        if have_bytes < need_bytes:
            raise SpaceError(
                f"{purpose} needs {_size(need_bytes)} free in the store, {self.root} has "
                f"{_size(have_bytes)}; "
                "free space there or name another place with --store"
            )

    def _work_area(self, folder: str) -> WorkArea:
        path = f"{WORK}/{folder}"
        return WorkArea(self._blobs, path, scratch=self.local_root / path)

    def _placed(self, data: bytes, path: str) -> Manifest:
        manifest = Manifest.from_json(data, source=self._blobs.address(path))
        if path == f"{_folder(manifest.stage, manifest.key)}/{MANIFEST}":
            return manifest
        raise CorruptionError(
            f"{self._blobs.address(path)} must lie in the folder of its stage and key, but is that of "
            f"{manifest.stage} {manifest.short}; delete its folder"
        )

    def _parsed(self, data: bytes, path: str, *, stage: str, key: str) -> Manifest:
        address = self._blobs.address(path)
        manifest = Manifest.from_json(data, source=address)
        if (manifest.stage, manifest.key) != (stage, key):
            raise CorruptionError(
                f"{address} must be the manifest of {stage} {key}, but is that of {manifest.stage} "
                f"{manifest.key}; delete its folder and run the stage again"
            )
        return manifest

    def _require_stored(self, content: Content, folder: str) -> None:
        for record in content.files:
            path = f"{folder}/{record.path}"
            num_bytes = self._blobs.size(path)
            if num_bytes != record.bytes:
                found = "nothing" if num_bytes is None else f"{num_bytes} bytes"
                raise StoreError(
                    f"every file must be stored before its manifest, but {self._blobs.address(path)} holds "
                    f"{found} instead of {record.bytes} bytes; put it first"
                )

    def _require_digest(self, path: str, record: FileRecord, found: str) -> None:
        if found != record.sha256:
            raise CorruptionError(
                f"{record.name} at {self._blobs.address(path)} must have sha256 {record.sha256}, but has "
                f"{found}; delete its folder and run the stage again"
            )

    def _missing(self, path: str, record: FileRecord) -> CorruptionError:
        return CorruptionError(
            f"the manifest promises {record.name} at {self._blobs.address(path)}, but nothing is there; "
            "delete its folder and run the stage again"
        )
