"""Laws of mixtures: exact proportions, each data set in its own order, readable from anywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.errors import ConfigError
from datasets.loader import Loader
from datasets.mixture import CYCLE, Mixture, mixture_order

shares_ = st.lists(st.integers(1, 40), min_size=1, max_size=4)
seeds = st.integers(0, 2**63)
examples = settings(deadline=None, max_examples=60)


@examples
@given(seeds, shares_, st.integers(0, 600))
def test_a_data_sets_positions_go_up_one_by_one(seed: int, shares: list[int], count: int) -> None:
    which, own = mixture_order(seed, shares, position=0, count=count)
    assert which.dtype == own.dtype == np.int64
    assert which.shape == own.shape == (count,)
    for source in range(len(shares)):
        mine = own[which == source]
        np.testing.assert_array_equal(mine, np.arange(len(mine)))


@examples
@given(seeds, shares_, st.integers(0, 10**15), st.integers(1, 300))
def test_proportions_are_kept_everywhere_within_two_cycles(seed, shares, position, count) -> None:
    which, _ = mixture_order(seed, shares, position=position, count=count)
    length = CYCLE + sum(shares)  # at least as long as a cycle
    for source, share in enumerate(shares):
        exact = count * share / sum(shares)
        assert abs((which == source).sum() - exact) <= 2 * length * share / sum(shares)


@examples
@given(seeds, shares_, st.integers(0, 300), st.integers(0, 200))
def test_a_slice_from_any_position_is_the_uninterrupted_stream(seed, shares, position, count) -> None:
    whole = mixture_order(seed, shares, position=0, count=position + count)
    part = mixture_order(seed, shares, position=position, count=count)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[position:], b)


def test_shares_of_equal_proportion_are_the_same_mixture_and_seeds_differ() -> None:
    streams = [
        mixture_order(seed, shares, position=5, count=300)[0].tolist()
        for seed, shares in [(0, [7, 3]), (0, [70, 30]), (1, [7, 3])]
    ]
    assert streams[0] == streams[1] != streams[2]
    assert 200 <= streams[0].count(0) <= 220


def test_the_mixture_is_the_same_in_every_version() -> None:
    # python -c "from datasets.mixture import *; print(mixture_order(7, [2, 1], position=63, count=8))"
    which, own = mixture_order(7, [2, 1], position=63, count=8)
    assert which.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert own.tolist() == [41, 42, 43, 44, 45, 46, 22, 23]


@pytest.mark.parametrize("shares", [[], [1, 0], [1, -2], [0.5, 0.5]], ids=str)
def test_shares_that_are_no_whole_numbers_from_one_are_refused(shares: list[Any]) -> None:
    with pytest.raises(ConfigError, match="whole numbers from 1"):
        mixture_order(0, shares, position=0, count=1)


@pytest.mark.parametrize("wrong", [{"position": -1}, {"count": -1}])
def test_negative_numbers_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be 0 or more"):
        mixture_order(0, [1], **({"position": 0, "count": 1} | wrong))


class Numbered:
    """A data set whose samples are the positions of its order, from a first number on."""

    def __init__(self, first: int, shape: tuple[int, ...] = (2,)) -> None:
        self.first, self.shape = first, shape

    def in_order(self, seed: int, *, position: int, count: int) -> dict[str, Any]:
        numbers = np.arange(self.first + position, self.first + position + count)
        values = np.broadcast_to(numbers.reshape(-1, *[1] * len(self.shape)), (count, *self.shape))
        return {"latent": values, "class_label": numbers % 7, "key": [str(number) for number in numbers]}


def mixture() -> Mixture:
    return Mixture({"a": Numbered(0), "b": Numbered(10**6), "c": Numbered(10**9)}, {"a": 5, "b": 2, "c": 1})


@examples
@given(seeds, st.integers(0, 10**6), st.integers(0, 90))
def test_all_fields_of_a_sample_stay_together(seed: int, position: int, count: int) -> None:
    batch = mixture().in_order(seed, position=position, count=count)
    which, own = mixture_order(seed, [5, 2, 1], position=position, count=count)
    numbers = np.array([0, 10**6, 10**9])[which] + own
    if count:
        np.testing.assert_array_equal(batch["latent"], np.stack([numbers, numbers], 1))
        assert batch["class_label"].tolist() == (numbers % 7).tolist()
        assert batch["key"] == [str(number) for number in numbers]


@examples
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3, 4, 8]), st.integers(0, 3))
def test_ranks_and_workers_do_not_change_a_mixture(position: int, world_size: int, num_workers: int) -> None:
    ranks = [
        Loader(mixture(), 4, batch_size=8, rank=rank, world_size=world_size, num_workers=num_workers).batches(
            position, num_batches=3
        )
        for rank in range(world_size)
    ]
    keys = [key for parts in zip(*ranks, strict=True) for part in parts for key in part["key"]]
    assert keys == mixture().in_order(4, position=position, count=24)["key"]


def test_data_sets_that_are_not_alike_are_refused() -> None:
    unlike = Mixture({"a": Numbered(0), "b": Numbered(0, (3,))}, {"a": 1, "b": 1})
    with pytest.raises(ConfigError, match=r"but b has .*\(3,\).* beside .*\(2,\)"):
        unlike.in_order(0, position=0, count=64)
    with pytest.raises(ConfigError, match=r"data sets \['a'\] and shares of \['b'\]"):
        Mixture({"a": Numbered(0)}, {"b": 1})
    with pytest.raises(ConfigError, match="whole numbers from 1"):
        Mixture({"a": Numbered(0)}, {"a": 0})
