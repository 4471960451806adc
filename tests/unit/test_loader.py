"""Laws of the loader: what ranks read together depends on neither their number nor that of the workers."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.errors import ConfigError, CorruptionError, LoaderError
from datasets.keys import sha256_hex
from datasets.loader import Loader
from datasets.manifest import Content
from datasets.samples import encode_latent
from datasets.shards import write_shard
from datasets.store import Store
from datasets.stream import SampleReader

STAGE, KEY = "encode-latents", sha256_hex(b"loader")
SHARD_SIZES = (7, 4, 5, 6, 3, 5)
NUM_SAMPLES = sum(SHARD_SIZES)

worlds = st.sampled_from([1, 2, 3, 4, 8])
workers = st.integers(0, 4)
positions = st.integers(0, 5 * NUM_SAMPLES)
examples = settings(deadline=None, max_examples=60)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> SampleReader:
    store, files, index = Store(tmp_path_factory.mktemp("loader")), [], 0
    for shard, size in enumerate(SHARD_SIZES):
        samples = [
            encode_latent(f"{i:09d}", np.full((1, 2, 2), i, np.float16), about={"class_label": i % 3})
            for i in range(index, index + size)
        ]
        files.append(store.put(STAGE, KEY, f"train-{shard:05d}.tar", write_shard(samples), count=size))
        index += size
    manifest = store.commit(Content(STAGE, KEY, 1, what={}, parents={}, files=tuple(files)), {})
    return SampleReader(store, manifest, split="train", cache_bytes=4 * 20 * 8)


def joined(batches: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Parts of one global batch, one after the other."""
    return {
        "key": [key for batch in batches for key in batch["key"]],
        "latent": np.concatenate([batch["latent"] for batch in batches]).tolist(),
        "class_label": np.concatenate([batch["class_label"] for batch in batches]).tolist(),
    }


def global_batches(
    reader: SampleReader,
    position: int,
    *,
    world_size: int,
    num_workers: int,
    batch_size: int = 8,
    num_batches: int = 3,
) -> list[dict[str, list[Any]]]:
    """What all ranks yield, step by step."""
    ranks = [
        Loader(
            reader,
            5,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            ahead=2,
        ).batches(position, num_batches=num_batches)
        for rank in range(world_size)
    ]
    return [joined(list(parts)) for parts in zip(*ranks, strict=True)]


@examples
@given(positions, worlds, workers, st.integers(8, 2 * NUM_SAMPLES))
def test_the_ranks_yield_the_same_global_batches_however_many_they_are(
    reader, position, world_size, num_workers, batch_size
) -> None:
    found = global_batches(
        reader, position, world_size=world_size, num_workers=num_workers, batch_size=batch_size
    )
    starts = range(position, position + 3 * batch_size, batch_size)
    assert found == [joined([reader.in_order(5, position=start, count=batch_size)]) for start in starts]


@examples
@given(st.integers(0, 9), worlds, workers)
def test_every_epoch_yields_each_sample_once(reader, epoch, world_size, num_workers) -> None:
    found = global_batches(
        reader, epoch * NUM_SAMPLES, world_size=world_size, num_workers=num_workers, batch_size=10
    )
    keys = [key for batch in found for key in batch["key"]]
    assert sorted(keys) == [f"{i:09d}" for i in range(NUM_SAMPLES)]


@examples
@given(positions, st.integers(0, 6), worlds, worlds, workers, workers)
def test_a_resumed_run_goes_on_identically_with_other_ranks_and_workers(
    reader, position, num_done, before, after, workers_before, workers_after
) -> None:
    def read(start: int, count: int, world_size: int, num_workers: int) -> list[dict[str, list[Any]]]:
        return global_batches(
            reader, start, world_size=world_size, num_workers=num_workers, num_batches=count
        )

    undisturbed = read(position, 6, before, workers_before)
    resumed = read(position + 8 * num_done, 6 - num_done, after, workers_after)
    assert read(position, num_done, before, workers_before) + resumed == undisturbed


def test_parts_of_ranks_differ_by_one_sample_at_most(reader) -> None:
    loaders = [Loader(reader, 0, batch_size=8, rank=rank, world_size=3) for rank in range(3)]
    sizes = [len(next(iter(loader.batches()))["key"]) for loader in loaders]
    assert sizes == [2, 3, 3]


class Watched:
    """A source that remembers the positions asked for and fails at one of them."""

    def __init__(self, fails_at: int | None = None, error: BaseException | None = None) -> None:
        self.asked: list[int] = []
        self.fails_at, self.error = fails_at, error

    def in_order(self, seed: int, *, position: int, count: int) -> dict[str, Any]:
        self.asked.append(position)
        if position == self.fails_at and self.error is not None:
            raise self.error
        return {"position": position}


def yielded(batches: Iterator[dict[str, Any]]) -> tuple[list[int], BaseException | None]:
    """Positions of what came, and the error that ended it."""
    found = []
    try:
        for batch in batches:
            found.append(batch["position"])  # noqa: PERF401 - what came before the error counts
    except Exception as error:
        return found, error
    return found, None


@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize(
    "error", [CorruptionError("damaged"), MemoryError(), TimeoutError(), StopIteration()]
)
def test_what_a_worker_raises_reaches_the_consumer_after_all_batches_before_it(num_workers, error) -> None:
    source = Watched(fails_at=6, error=error)
    loader = Loader(source, 0, batch_size=2, num_workers=num_workers)
    found, raised = yielded(loader.batches(num_batches=9))
    assert found == [0, 2, 4]
    assert raised is error or (isinstance(raised, RuntimeError) and raised.__cause__ is error)


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt()])
def test_what_would_end_a_worker_is_a_typed_error(error) -> None:
    found, raised = yielded(Loader(Watched(fails_at=2, error=error), 0, batch_size=2).batches())
    assert found == [0]
    assert isinstance(raised, LoaderError)
    assert repr(error) in str(raised)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_dies_between_two_batches_is_noticed(num_workers: int) -> None:
    before = threading.enumerate()
    batches = Loader(Watched(), 0, batch_size=2, num_workers=num_workers, ahead=1).batches()
    found = [next(batches)["position"]]
    [victim] = [t for t in threading.enumerate() if t not in before and t.name == "loader-0"]
    assert victim.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(victim.ident), ctypes.py_object(SystemError))
    more, raised = yielded(batches)
    found += more
    assert isinstance(raised, LoaderError)
    assert "loader-0 ended without an answer" in str(raised)
    assert found == list(range(0, 2 * len(found), 2))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("num_batches", [0, 1, 2, 9])
def test_all_that_was_planned_comes_and_no_more_is_read(num_workers, num_batches) -> None:
    source = Watched()
    loader = Loader(source, 0, batch_size=3, num_workers=num_workers, ahead=2)
    found, raised = yielded(loader.batches(6, num_batches=num_batches))
    assert raised is None
    assert found == sorted(source.asked) == [6 + 3 * step for step in range(num_batches)]


def test_no_more_than_asked_is_read_ahead_and_the_workers_end_with_the_loader() -> None:
    source = Watched()
    before = threading.active_count()
    batches = Loader(source, 0, batch_size=1, num_workers=3, ahead=5).batches()
    for step in range(4):
        assert next(batches)["position"] == step
        assert len(source.asked) <= step + 1 + 5
    workers_ = [thread for thread in threading.enumerate() if thread.name.startswith("loader-")]
    assert len(workers_) >= 3
    del batches
    for thread in workers_:
        thread.join(timeout=10)
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 2, "world_size": 2}, "got 2, 2 and 4"),
        ({"rank": -1}, "got -1, 1 and 4"),
        ({"world_size": 5}, "got 0, 5 and 4"),
        ({"num_workers": -1}, "got -1 and 8"),
        ({"ahead": 0}, "got 2 and 0"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Loader(Watched(), 0, **({"batch_size": 4} | wrong))
