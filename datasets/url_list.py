"""The list of a data set's pictures, in the manner of LAION: rows of address, caption and class.

Stage ``url-list``: its artifact is one Parquet file whose rows stay in order from here to the shards.
Addresses are relative for pictures made on this machine and for pictures in a folder, so that where they are
offered is no part of what they are; absolute for lists of the web.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from datasets.cats import (
    HELD_OUT,
    NUM_BODIES,
    TRAIN,
    CatPainter,
    Combination,
    listed_digest,
    offered_paths,
    paint_folder,
    parts_digest,
)
from datasets.config import DatasetConfig, Folder, RobohashCats, UserUrlList
from datasets.errors import ConfigError, MissingDataError
from datasets.folder import scan_folder
from datasets.keys import artifact_key, canonical_json, sha256_hex
from datasets.manifest import Content, Manifest
from datasets.store import Store

STAGE = "url-list"
CODE_VERSION = 1
FILE_NAME = "urls.parquet"
NO_CLASS = -1

Split = Literal["train", "held_out"]
SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        ("class_label", pa.int64()),
        ("split", pa.string()),
        ("sha256", pa.string()),
    ]
)


class Row(NamedTuple):
    """One picture of a list; ``class_label`` is -1 and ``sha256`` is empty where they are unknown."""

    url: str
    caption: str
    class_label: int
    split: Split
    sha256: str


@dataclass(frozen=True)
class UrlList:
    """The rows in their order, and the names of the classes their labels count."""

    rows: tuple[Row, ...]
    classes: tuple[str, ...]

    def identity(self) -> str:
        """Return the digest of everything the list says; where its pictures are served is not in it."""
        return sha256_hex(canonical_json({"classes": self.classes, "rows": self.rows}))

    def to_parquet(self) -> bytes:
        """Return the list as a Parquet file; equal lists give equal bytes."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(SCHEMA)
        table = pa.table(
            [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], SCHEMA
        )
        table = table.replace_schema_metadata({"classes": canonical_json(self.classes)})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        return buffer.getvalue()

    @classmethod
    def from_parquet(cls, data: bytes, *, classes: Sequence[str]) -> UrlList:
        """Return the list that ``to_parquet`` wrote."""
        table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
        columns = [table.column(name).to_pylist() for name in SCHEMA.names]
        return cls(tuple(Row(*values) for values in zip(*columns, strict=True)), tuple(classes))


@dataclass(frozen=True)
class ListPlan:
    """What decides the list of a data set, and how to make it; nothing is painted or fetched for it yet.

    Attributes:
        config: The data set.
        what: Everything that decides the list's rows.
        make: Returns the rows; painted pictures go into the folder it is given.
    """

    config: DatasetConfig
    what: dict[str, Any]
    make: Callable[[Path], UrlList]

    @property
    def key(self) -> str:
        """The key of the list."""
        return artifact_key(STAGE, CODE_VERSION, what=self.what, parents={})

    def find(self, store: Store) -> Manifest | None:
        """Return the list when the store has it."""
        return store.find(STAGE, self.key)

    def build(self, store: Store, *, provenance: Mapping[str, Any] | None = None) -> Manifest:
        """Return the list, made if the store does not have it.

        Raises:
            ConfigError: When the classes named do not fit the pictures, or a column is missing.
        """
        key = self.key
        found = store.find(STAGE, key)
        if found is not None:
            return found
        url_list = self.make(spool_folder(store, key))
        record = store.put(STAGE, key, FILE_NAME, url_list.to_parquet(), count=len(url_list.rows))
        splits = [row.split for row in url_list.rows]
        statistics = {
            "identity": url_list.identity(),
            "num_rows": len(splits),
            "num_train": splits.count(TRAIN),
            "num_held_out": splits.count(HELD_OUT),
            "classes": list(url_list.classes),
        }
        content = Content(STAGE, key, CODE_VERSION, self.what, {}, (record,), statistics)
        return store.commit(content, {**origin_of(self.config), **(provenance or {})})


def plan_list(config: DatasetConfig) -> ListPlan:
    """Return the plan of a data set's list; a folder's pictures are read for it, as their digests decide.

    Raises:
        MissingDataError: When the pictures, the list or the package they are painted from is missing.
        ConfigError: When the classes named do not fit the pictures.
    """
    source = config.source
    if isinstance(source, RobohashCats):
        return _plan_cats(config, source)
    if isinstance(source, Folder):
        return _plan_folder(config, source)
    return _plan_user_list(config, source)


def origin_of(config: DatasetConfig) -> dict[str, Any]:
    """Return where a data set's pictures are from and whose they are, to be recorded as provenance."""
    about: dict[str, Any] = {
        "dataset": config.name,
        "licence": config.licence,
        "attribution": config.attribution,
    }
    if isinstance(config.source, Folder):
        about |= {"root": config.folder, "expected_count": config.source.expected_count}
    return about


def read_url_list(store: Store, manifest: Manifest) -> UrlList:
    """Return the rows of a committed list, verified."""
    return UrlList.from_parquet(
        store.read(manifest, FILE_NAME), classes=manifest.content.statistics["classes"]
    )


def spool_folder(store: Store, list_key: str) -> Path:
    """Return the folder on this machine in which painted pictures wait to be offered."""
    return store.work(STAGE, list_key).path("spool")


# Cats


def _plan_cats(config: DatasetConfig, source: RobohashCats) -> ListPlan:
    if len(config.classes) != NUM_BODIES:
        raise ConfigError(
            f"classes of the cats must name their {NUM_BODIES} body colours, got {len(config.classes)}; "
            "see catalog/cats.yaml"
        )
    what = {
        "source": source.model_dump(mode="json"),
        "classes": list(config.classes),
        "image_size_px": config.image_size_px,
        "parts": parts_digest(),
    }
    return ListPlan(config, what, lambda spool: _cats(spool, config, source))


def _cats(spool: Path, config: DatasetConfig, source: RobohashCats) -> UrlList:
    """Return the list of the cats, painted into the spool so that the next stage finds them there."""
    painter = CatPainter(config.image_size_px)
    paths = offered_paths(train=source.train, held_out=source.held_out, dead=source.dead, seed=source.seed)
    paint_folder(spool, dict.fromkeys(paths, ""), painter=painter)
    rows = []
    for path in paths:
        folder, name = path.split("/")
        cat = Combination.from_file_name(name)
        split: Split = "held_out" if folder == HELD_OUT else "train"
        rows.append(
            Row(
                path,
                cat.caption(config.classes),
                cat.body,
                split,
                listed_digest(spool, path, painter=painter),
            )
        )
    return UrlList(tuple(rows), config.classes)


# A folder of one's own


def _plan_folder(config: DatasetConfig, source: Folder) -> ListPlan:
    files = scan_folder(config)
    names = sorted({file.class_name for file in files} - {""})
    classes = _class_names(names, config.classes, where=f"the folders of {config.folder}")
    held_out = _held_out([file.path for file in files], share=source.held_out_share, seed=source.seed)
    rows = tuple(
        Row(
            file.path,
            file.caption,
            classes.index(file.class_name) if file.class_name else NO_CLASS,
            "held_out" if file.path in held_out else "train",
            file.sha256,
        )
        for file in files
    )
    url_list = UrlList(rows, classes)
    return ListPlan(config, {"kind": source.kind, "rows": url_list.identity()}, lambda _spool: url_list)


def _class_names(found: Sequence[str], named: Sequence[str], *, where: str) -> tuple[str, ...]:
    """Return the names of the classes: those of the configuration when it names any, else those found."""
    if not named:
        return tuple(found)
    unknown = sorted(set(found) - set(named))
    if unknown:
        raise ConfigError(
            f"every class in {where} must be one of classes, got {unknown}; add them, or leave classes empty"
        )
    return tuple(named)


def _held_out(names: Sequence[str], *, share: float, seed: int) -> set[str]:
    """Return the names that are kept apart: the share that comes first in the order of a seeded hash.

    Raises:
        ConfigError: When a share above 0 keeps all or none of them apart.
    """
    distinct = sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    count = round(share * len(distinct))
    if share > 0 and not 0 < count < len(distinct):
        count = 1
        if len(distinct) < 2:
            raise ConfigError(
                f"held_out_share ({share}) of {len(distinct)} pictures leaves a split empty; "
                "bring more pictures or use 0"
            )
    return set(distinct[:count])


# A list of one's own


def _plan_user_list(config: DatasetConfig, source: UserUrlList) -> ListPlan:
    data = _read_file(config, source)
    what = {
        "source": source.model_dump(mode="json", exclude={"uri"}),
        "classes": list(config.classes),
        "parquet_sha256": sha256_hex(data),
    }
    return ListPlan(config, what, lambda _spool: _user_list(data, config, source))


def _read_file(config: DatasetConfig, source: UserUrlList) -> bytes:
    try:
        with cast("Any", fsspec.open(source.uri, "rb")) as stream:
            return stream.read()
    except OSError as error:
        raise MissingDataError(
            f"the list of the data set {config.name} must be at source.uri, "
            f"but {source.uri} cannot be read ({error}); "
            "correct source.uri or put the Parquet file there"
        ) from error


def _user_list(data: bytes, config: DatasetConfig, source: UserUrlList) -> UrlList:
    """Return a user's Parquet as our list; an address that comes twice is in one split only."""
    wanted = [source.url_column, source.caption_column, source.class_column, source.sha256_column]
    columns = [name for name in wanted if name is not None]
    try:
        known = pq.read_schema(io.BytesIO(data)).names
        missing = [name for name in columns if name not in known]
        if missing:
            raise ConfigError(
                f"{source.uri} must have the columns {columns}, but lacks {missing}; it has {known}"
            )
        table = pq.read_table(io.BytesIO(data), columns=columns)
    except pa.ArrowException as error:
        raise ConfigError(f"{source.uri} must be a Parquet file ({error}); convert it first") from error
    urls = [str(url or "") for url in table.column(source.url_column).to_pylist()]
    empty: list[Any] = [None] * len(urls)
    captions = table.column(source.caption_column).to_pylist() if source.caption_column else empty
    digests = table.column(source.sha256_column).to_pylist() if source.sha256_column else empty
    values = table.column(source.class_column).to_pylist() if source.class_column else empty
    labels, classes = _labels(values, config, source)
    held_out = _held_out(urls, share=source.held_out_share, seed=source.seed)
    rows = tuple(
        Row(
            url,
            str(caption or ""),
            label,
            "held_out" if url in held_out else "train",
            str(digest or "").lower(),
        )
        for url, caption, label, digest in zip(urls, captions, labels, digests, strict=True)
    )
    return UrlList(rows, classes)


def _labels(
    values: Sequence[Any], config: DatasetConfig, source: UserUrlList
) -> tuple[list[int], tuple[str, ...]]:
    """Return the label of each value of a class column, and the names of the classes."""
    present = [value for value in values if value is not None]
    where = f"column {source.class_column} of {source.uri}"
    if all(isinstance(value, str) for value in present):
        classes = _class_names(sorted(set(present)), config.classes, where=where)
        return [NO_CLASS if value is None else classes.index(value) for value in values], classes
    if not all(isinstance(value, int) for value in present):
        raise ConfigError(
            f"{where} must hold names or whole numbers, got {type(present[0]).__name__}; convert it first"
        )
    classes = config.classes or tuple(str(number) for number in range(max(present) + 1))
    wrong = sorted({value for value in present if not NO_CLASS <= value < len(classes)})
    if wrong:
        raise ConfigError(
            f"numbers in {where} must be from {NO_CLASS} to {len(classes) - 1}, got {wrong[:5]}; "
            f"correct them or name more than {len(classes)} classes"
        )
    return [NO_CLASS if value is None else value for value in values], classes
