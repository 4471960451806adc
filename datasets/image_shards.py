"""Stage ``download-shards``: from the list of a data set to shards of square RGB pictures.

The list is worked on in parts. A part is fetched (from the web, from a server on this machine, or from a
folder), each of its pictures is curated, and the result is kept in the work area; a killed stage goes on
with the parts that are missing. Once all parts are there, the pictures go into shards in list order: what
is in the shards depends on the list and the pictures alone, not on servers, timing or how often the stage
was killed.
"""

from __future__ import annotations

import fcntl
import io
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from datasets.cats import CatPainter, paint_folder
from datasets.config import DatasetConfig, Folder, RobohashCats
from datasets.curate import Outcome
from datasets.download import download_parts, remove_part
from datasets.errors import CorruptionError, DownloadError
from datasets.folder import read_pictures
from datasets.keys import artifact_key, canonical_json
from datasets.manifest import Content, FileRecord, Manifest, Parent
from datasets.origin import serve_folder
from datasets.parts import curate_part, read_part
from datasets.progress import Progress, no_progress
from datasets.shards import KEY, Sample, write_shard
from datasets.store import Store, WorkArea
from datasets.url_list import STAGE as LIST_STAGE
from datasets.url_list import ListPlan, Row, UrlList, origin_of, plan_list, read_url_list, spool_folder

STAGE = "download-shards"
CODE_VERSION = 1
PART_ROWS = 1000
SHARD_SAMPLES = 1000
OUTCOMES_FILE = "outcomes.parquet"
SPLITS = ("train", "held_out")
WEB_PICTURE_BYTES = (
    200_000  # what a picture of the web weighs before it is cut down, for the check of free space
)

_log = logging.getLogger(__name__)

Arrivals = Generator[tuple[int, Iterable[tuple[int, bytes | Outcome]]]]
"""Parts as they come, each with its rows: position in the list, and the file or why there is none."""


@dataclass(frozen=True)
class _Job:
    """One run of the stage: where it works, on what list, towards which key."""

    store: Store
    config: DatasetConfig
    list_manifest: Manifest
    url_list: UrlList
    key: str
    what: dict[str, Any]

    @property
    def work(self) -> WorkArea:
        return self.store.work(STAGE, self.key)

    def part_rows(self, part: int) -> range:
        return range(part * PART_ROWS, min((part + 1) * PART_ROWS, len(self.url_list.rows)))


def image_shards_what(config: DatasetConfig) -> dict[str, Any]:
    """Return the part of a data set's configuration that decides its image shards, besides the list."""
    return {"image_size_px": config.image_size_px, "crop": config.crop, "max_bad_share": config.max_bad_share}


def image_shards_key(config: DatasetConfig, list_manifest: Manifest) -> str:
    """Return the key of the image shards that a data set makes of a list."""
    identity = list_manifest.content.statistics["identity"]
    return artifact_key(STAGE, CODE_VERSION, what=image_shards_what(config), parents={"url_list": identity})


def find_image_shards(store: Store, config: DatasetConfig) -> Manifest | None:
    """Return the image shards of a data set when the store has them. Nothing is painted, served or fetched.

    Raises:
        MissingDataError: When the pictures, the list or the package they are painted from is missing.
    """
    return _find(store, plan_list(config))


def build_image_shards(
    store: Store,
    config: DatasetConfig,
    *,
    progress: Progress = no_progress,
    provenance: Callable[[], Mapping[str, Any]] = dict,
) -> Manifest:
    """Return the image shards of a data set, made if the store does not have them.

    Files ``train-00000.tar`` ... and ``held_out-00000.tar`` ... hold the pictures in list order, keyed by
    their position in the list; ``outcomes.parquet`` says how each row of the list ended. ``statistics`` has
    num_train, num_held_out, outcomes (they sum to the list's length), class_counts (of the training
    pictures), classes and image_size_px.

    Args:
        store: Where artifacts are.
        config: The data set.
        progress: Called with (rows done, rows in all).
        provenance: Asked, when the work is done, for more to record beside the result; not part of it.

    Raises:
        MissingDataError: When the pictures, the list or the package they are painted from is missing.
        ConfigError: When classes named do not fit the pictures.
        DownloadError: When no usable picture is left, or too large a share of the list has none.
        SpaceError: When the store is too full to start.
    """
    plan = plan_list(config)
    found = _find(store, plan)
    if found is not None:
        return found
    if isinstance(config.source, RobohashCats):  # the list paints its pictures, so look for room before it
        num_rows = config.source.train + config.source.held_out + config.source.dead
        store.require_free(_need_bytes(config, num_rows), purpose=STAGE)
    with _alone(store, plan.key):
        list_manifest = plan.build(store, provenance=provenance())
        key = image_shards_key(config, list_manifest)
        found = store.find(STAGE, key)
        if found is None:
            url_list = read_url_list(store, list_manifest)
            job = _Job(store, config, list_manifest, url_list, key, image_shards_what(config))
            found = _build(job, progress, provenance)
        store.work(STAGE, key).clear()
        store.work(LIST_STAGE, plan.key).clear()
    return found


def _find(store: Store, plan: ListPlan) -> Manifest | None:
    """Return the image shards of a plan when the store has both list and shards."""
    list_manifest = plan.find(store)
    if list_manifest is None:
        return None
    return store.find(STAGE, image_shards_key(plan.config, list_manifest))


@contextmanager
def _alone(store: Store, list_key: str) -> Iterator[None]:
    """Wait until no other process of this machine works on the same list; the lock of a dead one is free."""
    path = store.local_root / "locks" / f"{STAGE}-{list_key[:16]}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("waiting for another run that makes the same shards")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(job: _Job, progress: Progress, provenance: Callable[[], Mapping[str, Any]]) -> Manifest:
    """Fetch and curate what is missing, then write shards and manifest."""
    num_rows = len(job.url_list.rows)
    job.store.require_free(_need_bytes(job.config, num_rows), purpose=STAGE)
    parts = range(-(-num_rows // PART_ROWS))
    kept = [part for part in parts if _curated_name(part) in job.work.names("curated-")]
    done = sum(len(job.part_rows(part)) for part in kept)
    if kept:
        _log.info("going on after %d of %d rows", done, num_rows)
    missing = [part for part in parts if part not in kept]
    with _arrivals(job, missing) as arrivals:
        for part, rows in arrivals:
            kept_part = curate_part(
                rows,
                listed=job.url_list.rows,
                size_px=job.config.image_size_px,
                crop=job.config.crop,
            )
            job.work.write(_curated_name(part), kept_part)
            remove_part(job.work.path(_downloads_name()), part)
            done += len(job.part_rows(part))
            progress(done, num_rows)
    ends = [end for part in parts for end in _ends(job, part)]
    _require_usable(job, ends)
    return _commit(job, ends, {**origin_of(job.config), "parts_kept": len(kept), **provenance()})


def _need_bytes(config: DatasetConfig, num_rows: int) -> int:
    """Return the room for pictures as they come, as they are curated and as they are stored."""
    picture_bytes = 3 * config.image_size_px**2
    fetched_bytes = {"robohash_cats": 2 * picture_bytes, "folder": 0, "url_list": WEB_PICTURE_BYTES}
    return num_rows * (2 * picture_bytes + fetched_bytes[config.source.kind]) + 2**20


def _downloads_name() -> str:
    return f"downloads-{PART_ROWS}"


def _curated_name(part: int) -> str:
    return f"curated-{PART_ROWS}-{part:05d}.parquet"


# From the list to files


@contextmanager
def _arrivals(job: _Job, parts: list[int]) -> Iterator[Arrivals]:
    """Give the wanted parts with their files, from wherever the data set's pictures are."""
    source = job.config.source
    urls = [row.url for row in job.url_list.rows]
    if isinstance(source, Folder):
        yield _read_parts(job, parts)
    elif isinstance(source, RobohashCats):
        spool = spool_folder(job.store, job.list_manifest.key)
        wanted = [job.url_list.rows[position] for part in parts for position in job.part_rows(part)]
        paint_folder(
            spool, {row.url: row.sha256 for row in wanted}, painter=CatPainter(job.config.image_size_px)
        )
        with serve_folder(spool) as origin:
            offered = [f"{origin}/{quote(url)}" for url in urls]
            with closing(_download(job, offered, parts)) as arrivals:
                yield arrivals
    else:
        with closing(_download(job, urls, parts)) as arrivals:
            yield arrivals


def _read_parts(job: _Job, parts: list[int]) -> Arrivals:
    """Yield parts from the folder of the data set."""
    assert job.config.folder is not None  # the list could not have been made without
    for part in parts:
        positions = job.part_rows(part)
        paths = [job.url_list.rows[position].url for position in positions]
        yield part, zip(positions, read_pictures(job.config.folder, paths), strict=True)


def _download(job: _Job, urls: list[str], parts: list[int]) -> Arrivals:
    """Yield parts from the web."""
    return download_parts(
        urls,
        job.work.path(_downloads_name()),
        parts=parts,
        rows_per_part=PART_ROWS,
        allow_private_addresses=job.config.allow_private_addresses,
    )


# What is kept of a part


def _kept(job: _Job, part: int, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    """Yield columns of a kept part's rows."""
    name = _curated_name(part)
    try:
        yield from read_part(job.work.read(name) or b"", columns, num_rows=len(job.part_rows(part)))
    except CorruptionError:
        job.work.remove(name)
        raise


def _ends(job: _Job, part: int) -> Iterator[tuple[str, str]]:
    """Yield outcome and digest of each row of a kept part."""
    yield from _kept(job, part, ["outcome", "sha256"])


def _require_usable(job: _Job, ends: list[tuple[str, str]]) -> None:
    """Refuse a list that left too little, and forget what was fetched, so that the next run asks again.

    Raises:
        DownloadError: With the number of rows by reason.
    """
    name, limit, num_rows = job.config.name, job.config.max_bad_share, len(ends)
    outcomes = Counter(outcome for outcome, _ in ends)
    num_bad = num_rows - outcomes[Outcome.SUCCESS]
    listed = Counter(row.split for row in job.url_list.rows)
    usable = Counter(row.split for row in _usable(job, ends))
    empty = [split for split in SPLITS if listed[split] and not usable[split]]
    if num_rows == 0 or empty:
        rows = ", ".join(f"{listed[split]} {split}" for split in empty) or "0"
        problem = f"the list of {name} must lead to usable pictures, but of its {rows} rows none does"
    elif num_bad > limit * num_rows:
        problem = (
            f"at most {limit:.1%} of the rows of {name} may have no usable picture (max_bad_share), "
            f"but {num_bad} of {num_rows} ({num_bad / num_rows:.1%}) have none"
        )
    else:
        return
    job.work.clear()
    reasons = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    raise DownloadError(
        f"{problem}; outcomes: {reasons or 'none'}. Correct the list or its pictures (datasets/README.md "
        "explains them), or raise max_bad_share"
    )


def _usable(job: _Job, ends: list[tuple[str, str]]) -> list[Row]:
    """Return the rows that ended in a picture."""
    pairs = zip(job.url_list.rows, ends, strict=True)
    return [row for row, (outcome, _) in pairs if outcome == Outcome.SUCCESS]


# From curated pictures to shards


def _commit(job: _Job, ends: list[tuple[str, str]], provenance: Mapping[str, Any]) -> Manifest:
    """Write shards, outcomes and manifest."""
    records = {split: list(_shards(job, split)) for split in SPLITS}
    outcomes_file = job.store.put(
        STAGE, job.key, OUTCOMES_FILE, _outcomes_parquet(job, ends), count=len(ends)
    )
    content = Content(
        stage=STAGE,
        key=job.key,
        code_version=CODE_VERSION,
        what=job.what,
        parents={"url_list": Parent(LIST_STAGE, job.list_manifest.key, job.list_manifest.digest)},
        files=(*records["train"], *records["held_out"], outcomes_file),
        statistics=_statistics(job, ends),
    )
    return job.store.commit(content, provenance)


def _shards(job: _Job, split: str) -> Iterator[FileRecord]:
    """Store the shards of one split and yield their records."""
    samples: list[Sample] = []
    num_shards = 0
    for sample in _samples(job, split):
        samples.append(sample)
        if len(samples) == SHARD_SAMPLES:
            yield _put_shard(job, f"{split}-{num_shards:05d}.tar", samples)
            samples, num_shards = [], num_shards + 1
    if samples:
        yield _put_shard(job, f"{split}-{num_shards:05d}.tar", samples)


def _put_shard(job: _Job, name: str, samples: list[Sample]) -> FileRecord:
    return job.store.put(STAGE, job.key, name, write_shard(samples), count=len(samples))


def _samples(job: _Job, split: str) -> Iterator[Sample]:
    """Yield the samples of one split in list order."""
    num_parts = -(-len(job.url_list.rows) // PART_ROWS)
    for part in range(num_parts):
        for position, digest, png in _kept(job, part, ["position", "sha256", "png"]):
            row = job.url_list.rows[position]
            if png is None or row.split != split:
                continue
            about = {"caption": row.caption, "class_label": row.class_label, "url": row.url, "sha256": digest}
            yield {KEY: f"{position:09d}", "json": canonical_json(about), "png": png}


def _outcomes_parquet(job: _Job, ends: list[tuple[str, str]]) -> bytes:
    """Return how each row ended, one row per row of the list."""
    rows = job.url_list.rows
    table = pa.table(
        {
            "position": pa.array(range(len(rows)), pa.int64()),
            "url": pa.array([row.url for row in rows], pa.string()),
            "split": pa.array([row.split for row in rows], pa.string()),
            "outcome": pa.array([outcome for outcome, _ in ends], pa.string()),
            "sha256": pa.array([digest for _, digest in ends], pa.string()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def _statistics(job: _Job, ends: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the facts about the shards."""
    usable = _usable(job, ends)
    labels = Counter(row.class_label for row in usable if row.split == "train")
    classes = job.url_list.classes
    return {
        "num_train": sum(row.split == "train" for row in usable),
        "num_held_out": sum(row.split == "held_out" for row in usable),
        "outcomes": dict(sorted(Counter(outcome for outcome, _ in ends).items())),
        "class_counts": {name: labels[label] for label, name in enumerate(classes)},
        "classes": list(classes),
        "image_size_px": job.config.image_size_px,
    }
