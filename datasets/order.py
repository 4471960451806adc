"""The order of samples: a pure function of seed and position, and the same one in every version."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from datasets.keys import canonical_json, sha256_hex

BLOCK_SHARDS = 4


def sample_order(
    seed: int,
    num_samples: int,
    *,
    position: int,
    count: int,
    shard_sizes: Sequence[int],
    block_shards: int = BLOCK_SHARDS,
) -> np.ndarray:
    """Return ``count`` sample indices from a position on, of an endless order of exact epochs.

    In each epoch the shards are permuted and cut into blocks, and the samples of each block are permuted: a
    shuffle that needs ``block_shards`` decoded shards at a time, give or take one block's border. Who asks
    more than once asks a ``SampleOrder``, which keeps what an epoch has in common.

    Args:
        seed: Names the order.
        num_samples: Samples in all, the sum of ``shard_sizes``.
        position: Samples before the first one returned, 0 or more, over all epochs.
        count: How many to return; they may span epochs.
        shard_sizes: Samples in each shard; shard 0 holds the first indices, and so on.
        block_shards: Shards per block.

    Returns:
        int64 (count,) indices below ``num_samples``.

    Raises:
        ValueError: When a number is out of range or the sizes do not sum to ``num_samples``.
    """
    if num_samples < 1 or sum(shard_sizes) != num_samples:
        raise ValueError(
            f"num_samples ({num_samples}) must be at least 1 and the sum of shard_sizes "
            f"({sum(shard_sizes)}); take both from one reader"
        )
    return SampleOrder(seed, shard_sizes, block_shards=block_shards).part(position, count)


class SampleOrder:
    """The order that ``sample_order`` gives for one seed and one set of shards, kept between calls.

    A call costs as much as the samples it returns, whatever the number of shards: the permutations of the
    last two epochs' shards and of the last eight blocks' samples are kept. Safe for threads.

    Args:
        seed: Names the order.
        shard_sizes: Samples in each shard.
        block_shards: Shards per block.

    Raises:
        ValueError: When a number is out of range or there is no sample.
    """

    def __init__(self, seed: int, shard_sizes: Sequence[int], *, block_shards: int = BLOCK_SHARDS) -> None:
        self._seed = int(seed)
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._ends = np.cumsum(self._sizes)
        self._block_shards = block_shards
        if block_shards < 1 or not self._sizes.size or self._sizes.min() < 0 or not self._ends[-1]:
            raise ValueError(
                "block_shards must be 1 or more and shard_sizes 0 or more with a sample in one of them, "
                f"got {block_shards} and {len(self._sizes)} sizes; correct the call"
            )
        self._shards = lru_cache(maxsize=2)(self._permuted_shards)
        self._block = lru_cache(maxsize=8)(self._permuted_block)

    def __len__(self) -> int:
        """Samples in an epoch."""
        return int(self._ends[-1])

    def part(self, position: int, count: int) -> np.ndarray:
        """Return the ``count`` sample indices from a position on, int64 (count,).

        Raises:
            ValueError: When one of them is negative.
        """
        if position < 0 or count < 0:
            raise ValueError(
                f"position and count must be 0 or more, got {position} and {count}; correct the call"
            )
        pieces: list[np.ndarray] = []
        while count > 0:
            epoch, start = divmod(position, len(self))
            stop = min(start + count, len(self))
            pieces += self._epoch_part(epoch, start, stop)
            position += stop - start
            count -= stop - start
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _epoch_part(self, epoch: int, start: int, stop: int) -> list[np.ndarray]:
        """Return the pieces, block by block, of one epoch's order between two offsets."""
        _, block_ends = self._shards(epoch)
        first = int(np.searchsorted(block_ends, start, side="right"))
        last = int(np.searchsorted(block_ends, stop, side="left"))
        pieces = []
        for block in range(first, last + 1):
            begin = int(block_ends[block - 1]) if block else 0
            pieces.append(self._block(epoch, block)[max(start - begin, 0) : stop - begin])
        return pieces

    def _permuted_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an epoch's shards in their order, and the offset at which each block ends."""
        shards = permutation(len(self._sizes), purpose="shards", seed=self._seed, epoch=epoch)
        starts = np.arange(0, len(shards), self._block_shards)
        return shards, np.cumsum(np.add.reduceat(self._sizes[shards], starts))

    def _permuted_block(self, epoch: int, block: int) -> np.ndarray:
        """Return the sample indices of a block in their order."""
        shards, _ = self._shards(epoch)
        begin = block * self._block_shards
        members = shards[begin : begin + self._block_shards]
        ends, sizes = self._ends[members].tolist(), self._sizes[members].tolist()
        runs = [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        indices = np.concatenate(runs)
        order = permutation(len(indices), purpose="samples", seed=self._seed, epoch=epoch, block=block)
        return indices[order]


def permutation(size: int, **named: int | str) -> np.ndarray:
    """Return a permutation of ``range(size)`` that depends on the names alone.

    Philox's raw words are sorted, since numpy promises those for good, but not how ``permutation`` uses them.
    """
    key = int(sha256_hex(canonical_json(named))[:32], 16)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")
