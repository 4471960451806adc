"""The store under kills, races, full disks, damaged files and lost answers: right or absent, never wrong."""

from __future__ import annotations

import functools
import multiprocessing
import random
import resource
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from datasets.errors import CorruptionError, SpaceError, StoreError
from datasets.keys import sha256_hex
from datasets.manifest import Content, Manifest
from datasets.store import Store

STAGE = "encode-latents"
NUM_ARTIFACTS = 4
NUM_FILES = 3
NUM_KILLS = 20
STATE_BYTES = 100_000

fork = multiprocessing.get_context("fork")


def key_of(number: int) -> str:
    return sha256_hex(b"key %d" % number)


def data_of(number: int, file: int) -> bytes:
    return random.Random(f"{number} {file}").randbytes(100_000)


def content_of(number: int, *files) -> Content:
    return Content(
        stage=STAGE, key=key_of(number), code_version=1, what={}, parents={}, files=files, statistics={}
    )


def make_artifact(store: Store, number: int, *, provenance: int = 0) -> Manifest:
    files = [
        store.put(STAGE, key_of(number), f"train-{file:05d}.tar", data_of(number, file))
        for file in range(NUM_FILES)
    ]
    return store.commit(content_of(number, *files), {"attempt": provenance})


def make_all(root: Path) -> None:
    """What the killed process does: artifacts, and between them the state that lets it continue."""
    store = Store(root)
    for number in range(NUM_ARTIFACTS):
        store.work(STAGE, key_of(0)).write("state", bytes([number]) * STATE_BYTES)
        make_artifact(store, number)


def in_a_process(work: Callable[[], object]) -> object:
    """Return what the work returns in a process of its own."""
    queue = fork.SimpleQueue()
    process = fork.Process(target=lambda: queue.put(work()))
    process.start()
    answer = queue.get()
    process.join()
    return answer


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[list[str], float]:
    """The digests of all artifacts of an undisturbed run, and its time in seconds."""
    root = tmp_path_factory.mktemp("undisturbed")
    started = time.perf_counter()
    make_all(root)
    took_s = time.perf_counter() - started
    return [manifest.digest for manifest in Store(root).manifests()], took_s


@pytest.mark.parametrize("kill", range(NUM_KILLS))
def test_a_killed_writer_leaves_the_right_artifact_or_none_and_can_start_again(
    kill: int, tmp_path, undisturbed
) -> None:
    digests, took_s = undisturbed
    process = fork.Process(target=make_all, args=(tmp_path,))
    process.start()
    process.join(timeout=(kill + random.Random(kill).random()) / NUM_KILLS * took_s)
    process.kill()
    process.join()

    store = Store(tmp_path)
    for number in range(NUM_ARTIFACTS):
        manifest = store.find(STAGE, key_of(number))
        if manifest is not None:
            assert manifest.digest in digests
            for file in range(NUM_FILES):
                assert store.read(manifest, f"train-{file:05d}.tar") == data_of(number, file)
    state = store.work(STAGE, key_of(0)).read("state")
    assert state is None or state == state[:1] * STATE_BYTES
    assert store.work(STAGE, key_of(0)).names() in ([], ["state"])

    make_all(tmp_path)
    assert [manifest.digest for manifest in store.manifests()] == digests


def commit_at_the_signal(root: Path, barrier, queue, *, make: Callable[[Store], Manifest]) -> None:
    store = Store(root)
    for _ in range(10):
        barrier.wait()
    try:
        queue.put(make(store).to_json())
    except StoreError as error:
        queue.put(str(error))


def race(root: Path, *makes: Callable[[Store], Manifest]) -> list[bytes | str]:
    """Return what each of several processes got that wrote at the same time: a manifest, or a message."""
    barrier, queue = fork.Barrier(len(makes)), fork.SimpleQueue()
    processes = [
        fork.Process(target=commit_at_the_signal, args=(root, barrier, queue), kwargs={"make": make})
        for make in makes
    ]
    for process in processes:
        process.start()
    answers = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return answers


@pytest.mark.parametrize("attempt", range(5))
def test_racing_writers_of_one_artifact_end_with_one_manifest(attempt: int, tmp_path) -> None:
    answers = race(
        tmp_path, *(functools.partial(make_artifact, number=0, provenance=rank) for rank in range(4))
    )
    assert answers == [(tmp_path / STAGE / key_of(0)[:16] / "manifest.json").read_bytes()] * 4
    names = sorted(path.name for path in (tmp_path / STAGE / key_of(0)[:16]).iterdir())
    assert len(names) == NUM_FILES + 1


def make_other(store: Store, *, loss: float) -> Manifest:
    content = content_of(0)
    return store.commit(
        Content(
            stage=content.stage,
            key=content.key,
            code_version=1,
            what={},
            parents={},
            files=(),
            statistics={"loss": loss},
        ),
        {},
    )


def test_of_racing_writers_that_disagree_one_wins_and_the_other_is_told(tmp_path) -> None:
    answers = race(tmp_path, *(functools.partial(make_other, loss=loss) for loss in (1.0, 2.0)))
    (won,) = [answer for answer in answers if isinstance(answer, bytes)]
    (told,) = [answer for answer in answers if isinstance(answer, str)]
    held = Store(tmp_path).find(STAGE, key_of(0))
    assert held is not None
    assert held == Manifest.from_json(won)
    assert f"holds {held.digest}" in told


def write_with_too_little_room(root: Path, source: Path) -> list[str]:
    """Return the messages of writing more than the system lets this process write to one file."""
    store, messages = Store(root), []
    attempts = (
        lambda: store.put(STAGE, key_of(0), "big.bin", source.read_bytes()),
        lambda: store.put_file(STAGE, key_of(0), "big.bin", source),
        lambda: store.work(STAGE, key_of(0)).write("state", source.read_bytes()),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    for attempt in attempts:
        try:
            attempt()
        except SpaceError as error:
            messages.append(str(error))
    return messages


def test_a_full_disk_leaves_nothing_half_and_what_was_there(tmp_path) -> None:
    source = tmp_path / "source"
    source.write_bytes(data_of(0, 0))
    store = Store(tmp_path / "store")
    work = store.work(STAGE, key_of(0))
    work.write("state", b"before")
    messages = in_a_process(functools.partial(write_with_too_little_room, store.root, source))
    assert isinstance(messages, list)
    assert len(messages) == 3
    assert all("needs more room than there is" in message and "--store" in message for message in messages)
    assert work.read("state") == b"before"
    assert store.find(STAGE, key_of(0)) is None
    left = [path for path in store.root.rglob("*") if path.is_file()]
    assert left == [work.path("state")]


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]


DAMAGE = {
    "first bit": lambda data: flip(data, 0),
    "last bit": lambda data: flip(data, len(data) - 1),
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "empty": lambda data: b"",
    "a page of zeros": lambda data: data[:4096] + bytes(4096) + data[8192:],
} | {f"bit in byte {place}": functools.partial(flip, place=place) for place in range(1000, 100_000, 9001)}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_to_a_file_is_seen_by_every_reader_and_by_who_writes_it_again(tmp_path, damage) -> None:
    store = Store(tmp_path)
    manifest = make_artifact(store, 0)
    record = manifest.file("train-00001.tar")
    path = tmp_path / STAGE / key_of(0)[:16] / record.path
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    expected = f"{record.path} must have sha256 {record.sha256}, but has {sha256_hex(damaged)}"
    for attempt in (
        lambda: store.read(manifest, record.name),
        lambda: store.read_cached(manifest, record.name),
        lambda: store.put(STAGE, key_of(0), record.name, data_of(0, 1)),
    ):
        with pytest.raises(CorruptionError, match=expected):
            attempt()
    assert path.read_bytes() == damaged
    assert store.read(manifest, "train-00000.tar") == data_of(0, 0)


def test_a_file_that_is_gone_is_told_by_name(tmp_path) -> None:
    store = Store(tmp_path)
    manifest = make_artifact(store, 0)
    record = manifest.file("train-00001.tar")
    (tmp_path / STAGE / key_of(0)[:16] / record.path).unlink()
    for read in (store.read, store.read_cached):
        with pytest.raises(CorruptionError, match=rf"promises train-00001\.tar at .*{record.path}.*nothing"):
            read(manifest, record.name)


@pytest.fixture
def remote(tmp_path, monkeypatch) -> Store:
    monkeypatch.chdir(tmp_path)
    return Store(f"memory://{uuid.uuid4().hex}")


@pytest.mark.parametrize(
    "answer", [ConnectionResetError("reset"), FileExistsError("412"), RuntimeError("cut")]
)
def test_a_put_whose_answer_is_lost_is_recognised_as_our_own(remote, monkeypatch, answer) -> None:
    stored = MemoryFileSystem.pipe_file

    def store_and_fail(self, path, value, mode="overwrite", **kwargs) -> None:
        stored(self, path, value, mode=mode, **kwargs)
        raise answer

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "pipe_file", store_and_fail)
        manifest = make_artifact(remote, 0)
    assert remote.find(STAGE, key_of(0)) == manifest
    assert remote.read(manifest, "train-00000.tar") == data_of(0, 0)


def test_a_put_that_failed_is_an_error_and_leaves_no_artifact(remote, monkeypatch) -> None:
    def fail(self, path, value, mode="overwrite", **kwargs) -> None:
        raise ConnectionResetError("reset")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "pipe_file", fail)
        with pytest.raises(StoreError, match=r"memory://.* is not \(ConnectionResetError: reset\)"):
            make_artifact(remote, 0)
    assert remote.find(STAGE, key_of(0)) is None


def test_a_store_that_cannot_be_asked_is_not_taken_for_an_empty_one(remote, monkeypatch) -> None:
    make_artifact(remote, 0)

    def fail(self, path, *args, **kwargs) -> bytes:
        raise ConnectionResetError("reset")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cat_file", fail)
        with pytest.raises(StoreError, match="must be readable"):
            remote.find(STAGE, key_of(0))


def test_a_remote_manifest_written_by_somebody_else_first_is_believed_or_refused(remote) -> None:
    first = make_artifact(remote, 0, provenance=1)
    assert make_artifact(Store(remote.uri), 0, provenance=2) == first
    with pytest.raises(StoreError, match=f"holds {first.digest}"):
        make_other(remote, loss=1.0)
