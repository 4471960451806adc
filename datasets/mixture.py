"""Several data sets as one endless stream, in fixed proportions, each exact within itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from datasets.errors import ConfigError
from datasets.loader import Batch, Source
from datasets.order import permutation

CYCLE = 64


def mixture_order(
    seed: int, shares: Sequence[int], *, position: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return which data set each place of a mixture is of, and the place's position in that data set's order.

    The stream is cut into cycles. Each holds every data set in exact proportion, in an order of its own that
    depends on the seed and the cycle's number; a data set's samples keep the order they have without the
    others. A mixture has no epoch; each of its data sets has its own.

    Args:
        seed: Names the order.
        shares: Parts of each data set, whole numbers from 1, e.g. 7 and 3.
        position: Places before the first one returned, 0 or more.
        count: How many to return.

    Returns:
        int64 (count,) indices into ``shares``, and int64 (count,) positions, which for each data set go up
        one by one.

    Raises:
        ConfigError: When there is no share, or one is no whole number from 1.
        ValueError: When position or count is negative.
    """
    if not shares or not all(isinstance(share, int) and share >= 1 for share in shares):
        raise ConfigError(
            f"shares of a mixture must be whole numbers from 1, got {list(shares)}; correct them"
        )
    if position < 0 or count < 0:
        raise ValueError(
            f"position and count must be 0 or more, got {position} and {count}; correct the call"
        )
    lowest = np.array(shares, np.int64) // math.gcd(*shares)
    per_cycle = lowest * -(-CYCLE // int(lowest.sum()))
    length = int(per_cycle.sum())
    cycles = range(position // length, -(-(position + count) // length))
    which = [np.empty(0, np.int64)] + [_cycle(seed, cycle, per_cycle) for cycle in cycles]
    own = [np.empty(0, np.int64)] + [
        cycle * per_cycle[places] + _ranks(places, len(shares))
        for cycle, places in zip(cycles, which[1:], strict=True)
    ]
    start = position - cycles.start * length
    return np.concatenate(which)[start : start + count], np.concatenate(own)[start : start + count]


def _cycle(seed: int, cycle: int, per_cycle: np.ndarray) -> np.ndarray:
    """Return the data sets of a cycle's places."""
    places = np.repeat(np.arange(len(per_cycle)), per_cycle)
    return places[permutation(len(places), purpose="mixture", seed=int(seed), cycle=cycle)]


def _ranks(places: np.ndarray, num_sources: int) -> np.ndarray:
    """Return how many earlier places are of the same data set."""
    ranks = np.empty(len(places), np.int64)
    for source in range(num_sources):
        mine = places == source
        ranks[mine] = np.arange(mine.sum())
    return ranks


class Mixture:
    """A source of batches that draws from others in fixed proportions, see ``mixture_order``.

    Args:
        sources: The readers by name; their batches must have the same fields and shapes.
        shares: Parts of each by name, whole numbers from 1.

    Raises:
        ConfigError: When the names differ, or a share is no whole number from 1.
    """

    def __init__(self, sources: Mapping[str, Source], shares: Mapping[str, int]) -> None:
        if sources.keys() != shares.keys():
            raise ConfigError(
                "each data set of a mixture must have a share, "
                f"got data sets {sorted(sources)} and shares of {sorted(shares)}; name the same in both"
            )
        self._names = sorted(sources)
        self._sources = [sources[name] for name in self._names]
        self._shares = [shares[name] for name in self._names]
        mixture_order(0, self._shares, position=0, count=0)

    def in_order(self, seed: int, *, position: int, count: int) -> Batch:
        """Return the `count` samples from `position` on, with the fields that the data sets share.

        Raises:
            ConfigError: When their batches have other fields or shapes.
        """
        which, own = mixture_order(seed, self._shares, position=position, count=count)
        batch: Batch = {}
        for number, source in enumerate(self._sources):
            places = np.flatnonzero(which == number)
            if places.size:
                part = source.in_order(seed, position=int(own[places[0]]), count=places.size)
                self._put(batch, part, places, count=count, name=self._names[number])
        return batch

    def _put(self, batch: Batch, part: Batch, places: np.ndarray, *, count: int, name: str) -> None:
        """Put a data set's samples at their places of the batch."""
        if not batch:
            batch.update({field: _room(values, count) for field, values in part.items()})
        found = {field: _layout(values) for field, values in part.items()}
        expected = {field: _layout(values) for field, values in batch.items()}
        if found != expected:
            raise ConfigError(
                f"data sets of a mixture must have the same fields and shapes, but {name} has {found} beside "
                f"{expected}; mix only such as are alike"
            )
        for field, values in part.items():
            if isinstance(values, np.ndarray):
                batch[field][places] = values
            else:
                for place, value in zip(places.tolist(), values, strict=True):
                    batch[field][place] = value


def _room(values: Any, count: int) -> Any:
    """Return an empty array or list for so many samples like those."""
    if isinstance(values, np.ndarray):
        return np.empty((count, *values.shape[1:]), values.dtype)
    return [None] * count


def _layout(values: Any) -> str:
    """Return what must be equal for samples to stand in one batch."""
    if isinstance(values, np.ndarray):
        return f"{values.dtype} {values.shape[1:]}"
    return type(values).__name__
