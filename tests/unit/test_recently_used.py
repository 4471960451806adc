"""Laws of what is kept in memory: bounded, made once however many ask, and tried again after a failure."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from datasets.recently_used import RecentlyUsed


def test_threads_that_ask_at_once_get_one_thing_that_was_made_once() -> None:
    made = []

    def make(key: int) -> tuple[object, int]:
        made.append(key)
        time.sleep(0.01)
        return object(), 1

    kept = RecentlyUsed(make, max_bytes=10)
    with ThreadPoolExecutor(8) as pool:
        things = list(pool.map(kept.get, [0, 1] * 20))
    assert sorted(made) == [0, 1]
    assert len({id(thing) for thing in things}) == 2


def test_things_are_made_side_by_side() -> None:
    both = threading.Barrier(2, timeout=10)

    def make(key: str) -> tuple[str, int]:
        both.wait()
        return key, 1

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(RecentlyUsed(make, max_bytes=10).get, "ab")) == ["a", "b"]


def test_what_could_not_be_made_is_tried_again() -> None:
    answers = iter([None, 7])

    def make(key: str) -> tuple[int, int]:
        answer = next(answers)
        if answer is None:
            raise OSError(key)
        return answer, 1

    kept = RecentlyUsed(make, max_bytes=10)
    with pytest.raises(OSError, match="key"):
        kept.get("key")
    assert kept.get("key") == 7


def test_threads_that_need_the_same_things_make_different_ones_and_what_is_kept_comes_first() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def make(key: str) -> tuple[str, int]:
        if key == "a":
            begun.set()
            assert go_on.wait(10)
        return key, 1

    kept = RecentlyUsed(make, max_bytes=10)
    kept.get("c")
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(kept.get, "a")
        assert begun.wait(10)
        needed, order = ["a", "b", "c"], []
        while needed:
            order.append(kept.next_of(needed))
            needed.remove(order[-1])
        go_on.set()
        assert (other.result(), order) == ("a", ["c", "b", "a"])


def test_the_least_recently_used_goes_first() -> None:
    made = []

    def make(key: str) -> tuple[str, int]:
        made.append(key)
        return key, 4

    kept = RecentlyUsed(make, max_bytes=10)
    for key in "abacab":
        kept.get(key)
    assert "".join(made) == "abcb"
    assert kept.next_of("cb") == "b"
