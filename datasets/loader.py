"""Batches read ahead of time by worker threads, in an order that no number of workers or ranks changes.

Workers are threads: what costs time (hashing, decoding pictures, copying) lets go of the interpreter's lock,
all share one cache of decoded shards, and there is no process that could be killed apart from the run.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Protocol

from datasets.errors import ConfigError, LoaderError

POLL_S = 1.0

Batch = dict[str, Any]


class Source(Protocol):
    """Whatever can be read at any position of an endless order, by several threads."""

    def in_order(self, seed: int, *, position: int, count: int) -> Batch:
        """Return the `count` samples from `position` on."""
        ...


class Loader:
    """One rank's contiguous part of each global batch, read ahead by threads.

    Args:
        source: A ``SampleReader`` or a ``Mixture``.
        seed: Names the order.
        batch_size: Samples of a global batch, over all ranks.
        rank: Whose part, from 0. Parts differ by one sample at most where the ranks do not divide the batch.
        world_size: Number of ranks.
        num_workers: Threads that read; 0 reads when asked.
        ahead: Batches that are read before they are asked for, at most.

    Raises:
        ConfigError: When a number is out of range, or a rank would get nothing.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 2,
        ahead: int = 8,
    ) -> None:
        if not 0 <= rank < world_size <= batch_size:
            raise ConfigError(
                "rank must be below world_size, and world_size at most batch_size, "
                f"got {rank}, {world_size} and {batch_size}; take fewer ranks or a larger batch"
            )
        if num_workers < 0 or ahead < 1:
            raise ConfigError(
                "num_workers must be 0 or more and ahead 1 or more, "
                f"got {num_workers} and {ahead}; correct them"
            )
        self._source, self._seed, self._batch_size = source, seed, batch_size
        self._first = batch_size * rank // world_size
        self._count = batch_size * (rank + 1) // world_size - self._first
        self._num_workers, self._ahead = num_workers, ahead

    def batches(self, position: int = 0, *, num_batches: int | None = None) -> Iterator[Batch]:
        """Yield this rank's parts of the global batches from a position on: as many as asked for, or raise.

        Args:
            position: Samples before the first global batch, over all epochs and ranks; the whole state.
            num_batches: How many global batches; without end when None. They run on over the ends of epochs.

        Raises:
            DatasetsError: What reading raised, with the batch that could not be read; those before it have
                been yielded.
            LoaderError: When a worker ended without an answer.
        """
        steps = itertools.count() if num_batches is None else range(num_batches)
        positions = (position + step * self._batch_size for step in steps)
        if self._num_workers == 0:
            for start in positions:  # not a map, which would take a StopIteration inside for its own end
                yield self._read(start)
            return
        with Workers(self._read, num_workers=self._num_workers) as workers:
            pending: deque[Future[Batch]] = deque()
            for start in positions:
                pending.append(workers.begin(start))
                if len(pending) > self._ahead:
                    yield workers.result(pending.popleft())
            while pending:
                yield workers.result(pending.popleft())

    def _read(self, position: int) -> Batch:
        return self._source.in_order(self._seed, position=position + self._first, count=self._count)


class Workers:
    """Threads that read; leaving the context ends them and drops what they had not begun.

    Args:
        read: Returns the batch at a position.
        num_workers: How many threads.
    """

    def __init__(self, read: Callable[[int], Batch], *, num_workers: int) -> None:
        self._read = read
        self._tasks: SimpleQueue[tuple[int, Future[Batch]] | None] = SimpleQueue()
        self._ended = False
        # daemons, for a run that ends while one of them waits for a store must not wait for it
        names = [f"loader-{number}" for number in range(num_workers)]
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]

    def __enter__(self) -> Workers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        for _ in self._threads:
            self._tasks.put(None)

    def begin(self, position: int) -> Future[Batch]:
        """Have a position read."""
        future: Future[Batch] = Future()
        self._tasks.put((position, future))
        return future

    def result(self, future: Future[Batch]) -> Batch:
        """Return what was read, or raise what reading raised.

        Raises:
            LoaderError: When a worker ended, so that nobody may be left who reads it.
        """
        while not wait((future,), timeout=POLL_S).done:
            dead = [thread.name for thread in self._threads if not thread.is_alive()]
            if dead:
                raise LoaderError(
                    f"workers must live as long as their loader, but {', '.join(dead)} ended without an "
                    "answer; resume from the last checkpoint"
                )
        error = future.exception()
        if error is not None and not isinstance(error, Exception):
            raise LoaderError(
                f"a worker must answer with a batch or an error, but was ended by {error!r}; "
                "resume from the last checkpoint"
            ) from error
        return future.result()

    def _work(self) -> None:
        """Read what is asked for until told to end."""
        while (task := self._tasks.get()) is not None and not self._ended:
            position, future = task
            try:
                future.set_result(self._read(position))
            except BaseException as error:  # whatever it is, the consumer has to know
                future.set_exception(error)
