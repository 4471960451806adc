import signal
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from datasets.claims import Claims

fork = get_context("fork")


def answer(path: Path, asked: Connection) -> None:
    """Take or release the parts that are asked for."""
    claims = Claims(path)
    while True:
        what, part = asked.recv()
        asked.send(claims.take(part) if what == "take" else claims.release(part))


class Other:
    """Another process with claims on the same parts."""

    def __init__(self, path: Path) -> None:
        self.connection, theirs = fork.Pipe()
        self.process = fork.Process(target=answer, args=(path, theirs), daemon=True)
        self.process.start()

    def ask(self, what: str, part: int) -> object:
        self.connection.send((what, part))
        return self.connection.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "claims"


@pytest.fixture
def other(path: Path) -> Iterator[Other]:
    process = Other(path)
    yield process
    process.kill()


def test_a_part_is_one_process_s_until_it_is_given_back(path: Path, other: Other) -> None:
    with Claims(path) as claims:
        assert other.ask("take", 1)
        assert not claims.take(1)
        assert claims.take(2)
        assert not other.ask("take", 2)
        other.ask("release", 1)
        assert claims.take(1)


def test_what_a_killed_process_had_is_free_again(path: Path, other: Other) -> None:
    with Claims(path) as claims:
        assert other.ask("take", 0)
        assert not claims.take(0)
        other.kill()
        assert other.process.exitcode == -signal.SIGKILL
        assert claims.take(0)


def test_closing_gives_everything_back(path: Path, other: Other) -> None:
    with Claims(path) as claims:
        assert claims.take(7)
    assert other.ask("take", 7)
