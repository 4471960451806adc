"""Laws of the cache of remote files: right bytes or none, within its bound, never a reason to fail."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from datasets.cache import FileCache
from datasets.errors import CorruptionError, SpaceError, StoreError
from datasets.keys import sha256_hex
from datasets.patience import patiently

FILES = {sha256_hex(bytes([i]) * 10): bytes([i]) * 10 for i in range(5)}
DIGESTS = list(FILES)


def used(cache: FileCache, folder: Path, *numbers: int) -> None:
    """Read files through a cache, a second of file time between each two."""
    for number in numbers:
        digest = DIGESTS[number]
        if cache.read(digest) is None:
            cache.keep(digest, FILES[digest])
        for path in folder.iterdir():
            about = path.stat()
            os.utime(path, ns=(about.st_atime_ns - 10**9, about.st_mtime_ns - 10**9))


@pytest.mark.parametrize(
    ("reads", "kept"), [((0, 1, 2, 3), {1, 2, 3}), ((0, 1, 2, 0, 3), {0, 2, 3}), ((0, 0, 1), {0, 1})]
)
def test_the_least_recently_used_files_go_first(tmp_path: Path, reads, kept: set[int]) -> None:
    used(FileCache(tmp_path, max_bytes=35), tmp_path, *reads)
    assert {path.name for path in tmp_path.iterdir()} == {DIGESTS[number] for number in kept}


def test_a_file_larger_than_the_bound_pushes_nothing_out(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, max_bytes=15)
    used(cache, tmp_path, 0)
    cache.keep(sha256_hex(bytes(99)), bytes(99))
    assert cache.read(sha256_hex(bytes(99))) is None
    assert cache.read(DIGESTS[0]) == FILES[DIGESTS[0]]


def test_a_damaged_file_is_not_returned_and_is_removed(tmp_path: Path, caplog) -> None:
    cache = FileCache(tmp_path, max_bytes=100)
    used(cache, tmp_path, 0)
    (tmp_path / DIGESTS[0]).write_bytes(b"x" * 10)
    assert cache.read(DIGESTS[0]) is None
    assert not list(tmp_path.iterdir())
    assert "is damaged and will be fetched again" in caplog.text


def test_a_folder_that_cannot_be_written_is_told_once_and_does_without(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").touch()
    cache = FileCache(tmp_path / "file" / "cache", max_bytes=100)
    for digest, data in FILES.items():
        cache.keep(digest, data)
        assert cache.read(digest) is None
    assert caplog.text.count("nothing more is kept in") == 1


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits, which take no time here."""
    now, waited = [0.0], []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("datasets.patience.time.sleep", sleep)
    monkeypatch.setattr("datasets.patience.time.monotonic", lambda: now[0])
    return waited


def failing(*errors: Exception):
    left = iter(errors)

    def read() -> str:
        for error in left:
            raise error
        return "answer"

    return read


def test_a_store_that_comes_back_is_waited_for(waits: list[float]) -> None:
    assert patiently(failing(*[StoreError("gone")] * 8), for_s=60) == "answer"
    assert waits == [0.5, 1, 2, 4, 8, 10, 10, 10]


@pytest.mark.parametrize("error", [StoreError("gone"), SpaceError("full")])
def test_a_store_that_stays_away_is_waited_for_so_long_and_no_longer(waits: list[float], error) -> None:
    with pytest.raises(StoreError) as raised:
        patiently(failing(*[error] * 1000), for_s=60)
    assert raised.value is error
    assert 50 <= sum(waits) <= 60


def test_wrong_bytes_are_asked_for_once_more_at_once(waits: list[float]) -> None:
    assert patiently(failing(CorruptionError("flipped")), for_s=60) == "answer"
    with pytest.raises(CorruptionError, match="again"):
        patiently(failing(CorruptionError("flipped"), CorruptionError("again")), for_s=60)
    assert waits == []


def test_other_errors_are_not_waited_for(waits: list[float]) -> None:
    with pytest.raises(KeyError):
        patiently(failing(KeyError("name")), for_s=60)
    assert waits == []
