"""The loader over damaged shards, a full disk, a store that is gone: each sample once, or a typed error."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import resource
import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from datasets.errors import CorruptionError
from datasets.keys import sha256_hex
from datasets.loader import Loader
from datasets.manifest import Content, Manifest
from datasets.samples import encode_latent
from datasets.shards import write_shard
from datasets.store import Store
from datasets.stream import SampleReader

if TYPE_CHECKING:
    from conftest import S3Server

STAGE = "encode-latents"
NUM_SHARDS, SHARD_SAMPLES, BATCH = 12, 20, 16
NUM_SAMPLES = NUM_SHARDS * SHARD_SAMPLES
NUM_BATCHES = NUM_SAMPLES // BATCH

fork = multiprocessing.get_context("fork")


def make_artifact(store: Store, name: str = "a", *, first: int = 0) -> Manifest:
    """Latents that tell which they are: sample i of the artifact holds first + i everywhere."""
    key, files = sha256_hex(name.encode()), []
    for shard in range(NUM_SHARDS):
        samples = [
            encode_latent(f"{i:09d}", np.full((4, 8, 8), first + i, np.float32), about={"class_label": i % 5})
            for i in range(shard * SHARD_SAMPLES, (shard + 1) * SHARD_SAMPLES)
        ]
        files.append(
            store.put(STAGE, key, f"train-{shard:05d}.tar", write_shard(samples), count=SHARD_SAMPLES)
        )
    return store.commit(Content(STAGE, key, 1, what={}, parents={}, files=tuple(files)), {})


def read_epoch(
    store: Store, manifest: Manifest, *, num_workers: int = 2, between: Callable[[int], None] = lambda _: None
) -> list[int]:
    """The numbers of the samples of an epoch, in order; `between` is called after each batch."""
    reader = SampleReader(store, manifest, split="train", cache_bytes=1)
    loader = Loader(reader, 3, batch_size=BATCH, num_workers=num_workers, ahead=2)
    found: list[int] = []
    for number, batch in enumerate(loader.batches(num_batches=NUM_BATCHES)):
        values = batch["latent"].reshape(BATCH, -1)
        assert (values == values[:, :1]).all()
        assert (values[:, 0].astype(int) % NUM_SAMPLES).tolist() == [int(key) for key in batch["key"]]
        found += values[:, 0].astype(int).tolist()
        between(number)
    return found


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    return Store(f"memory://{uuid.uuid4().hex}")


DAMAGE: dict[str, Callable[[bytes, bytes], bytes | None]] = {
    "missing": lambda data, other: None,
    "one flipped bit of a latent": lambda data, other: data[:3000] + bytes([data[3000] ^ 1]) + data[3001:],
    "one flipped bit of a header": lambda data, other: bytes([data[0] ^ 1]) + data[1:],
    "one flipped bit of the end": lambda data, other: data[:-1] + b"\1",
    "truncated": lambda data, other: data[: len(data) // 2],
    "truncated between samples": lambda data, other: data[: len(data) // 10240 * 5120],
    "empty": lambda data, other: b"",
    "of another data set": lambda data, other: other,
}


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_damaged_shard_ends_the_epoch_with_its_name(tmp_path, remote, kind, damage, num_workers) -> None:
    store = Store(tmp_path / "store") if kind == "local" else remote
    manifest, other = make_artifact(store), make_artifact(store, "b", first=NUM_SAMPLES)
    record = manifest.file("train-00005.tar")
    path = f"{store.uri_of(manifest)}/{record.path}"
    spoilt = damage(store.read(manifest, record.name), store.read(other, record.name))
    files = MemoryFileSystem()
    if kind == "local":
        Path(path).unlink()
        if spoilt is not None:
            Path(path).write_bytes(spoilt)
    else:
        files.rm_file(path)
        if spoilt is not None:
            files.pipe_file(path, spoilt)
    seen = []
    with pytest.raises(CorruptionError, match=r"train-00005\.tar"):
        read_epoch(store, manifest, num_workers=num_workers, between=seen.append)
    assert seen == list(range(len(seen)))
    assert len(seen) < NUM_BATCHES
    assert sorted(read_epoch(store, other)) == list(range(NUM_SAMPLES, 2 * NUM_SAMPLES))


def test_data_sets_whose_shards_have_the_same_names_are_told_apart_in_the_cache(remote) -> None:
    first, second = make_artifact(remote), make_artifact(remote, "b", first=NUM_SAMPLES)
    for _ in range(2):
        assert sorted(read_epoch(remote, first)) == list(range(NUM_SAMPLES))
        assert sorted(read_epoch(remote, second)) == list(range(NUM_SAMPLES, 2 * NUM_SAMPLES))


def test_a_cache_that_holds_three_shards_of_twelve_never_holds_more(remote) -> None:
    manifest = make_artifact(remote)
    shard_bytes = max(record.bytes for record in manifest.content.files)
    store = Store(remote.uri, cache_bytes=3 * shard_bytes)
    held = []

    def measure(_: int) -> None:
        files = list((store.local_root / "cache" / "files").iterdir())
        with contextlib.suppress(FileNotFoundError):  # a worker just removed one
            held.append(sum(path.stat().st_size for path in files))

    assert sorted(read_epoch(store, manifest, num_workers=1, between=measure)) == list(range(NUM_SAMPLES))
    assert max(held) == 3 * shard_bytes


def test_processes_that_share_a_small_cache_read_the_right_samples(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    remote = Store("memory://shared")
    manifest = make_artifact(remote)  # forked processes have the memory store, each a copy
    store = Store(remote.uri, cache_bytes=3 * manifest.content.files[0].bytes)
    with fork.Pool(3) as pool:
        epochs = pool.starmap(read_epoch, [(store, manifest)] * 3)
    assert all(epoch == epochs[0] for epoch in epochs)
    assert sorted(epochs[0]) == list(range(NUM_SAMPLES))


def read_without_room(store: Store, manifest: Manifest, queue) -> None:
    """Read an epoch in a process that may write no file larger than 1,000 bytes."""
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("datasets").addHandler(handler)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    queue.put((read_epoch(store, manifest), warnings))


def test_a_full_disk_under_the_cache_is_a_warning_and_the_epoch_is_whole(remote) -> None:
    manifest, queue = make_artifact(remote), fork.SimpleQueue()
    process = fork.Process(target=read_without_room, args=(remote, manifest, queue))
    process.start()
    found, warnings = queue.get()
    process.join()
    assert sorted(found) == list(range(NUM_SAMPLES))
    assert len(warnings) == 1
    assert "nothing more is kept in" in warnings[0]
    assert not list((remote.local_root / "cache" / "files").iterdir())


def test_a_bit_that_flips_on_the_way_is_asked_for_again_and_only_once(remote, monkeypatch) -> None:
    manifest = make_artifact(remote)
    flips = []

    def read_flipped(self, path, *args, **kwargs) -> bytes:
        data = read(self, path, *args, **kwargs)
        if path.endswith(".tar") and flips.count(path) < most:
            flips.append(path)
            return data[:100] + bytes([data[100] ^ 1]) + data[101:]
        return data

    read, most = MemoryFileSystem.cat_file, 1
    monkeypatch.setattr(MemoryFileSystem, "cat_file", read_flipped)
    assert sorted(read_epoch(remote, manifest)) == list(range(NUM_SAMPLES))
    assert len(flips) == NUM_SHARDS
    shutil.rmtree(remote.local_root / "cache")
    flips, most = [], 2
    with pytest.raises(CorruptionError, match=r"train-.*must have sha256"):
        read_epoch(remote, manifest)


@pytest.mark.parametrize("outage_s", [2, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.timeout(300)
def test_a_server_killed_in_mid_epoch_is_waited_for(
    s3_server: S3Server, tmp_path, monkeypatch, caplog, outage_s: float
) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = make_artifact(Store(f"s3://{s3_server.BUCKET}/store"))
    local = make_artifact(Store(tmp_path / "local"))
    assert manifest.digest == local.digest
    store = Store(f"s3://{s3_server.BUCKET}/store", cache_bytes=0)
    restart = threading.Timer(outage_s, s3_server.start)

    def disturb(number: int) -> None:
        if number == 4:
            s3_server.kill()
            restart.start()

    found = read_epoch(store, manifest, between=disturb)
    restart.join()
    assert found == read_epoch(Store(tmp_path / "local"), local)
    if outage_s > 15:  # a shorter one may be over before the client library has given up once
        assert "asked again in" in caplog.text
