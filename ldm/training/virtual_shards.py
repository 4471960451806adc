"""Virtual shards: the parts of a batch whose statistics are their own, combined in a fixed order.

What a step computes is defined per shard, so it does not matter which process computes which shard: each
starts from the same buffers, and results are summed by one binary tree. One shard is the plain computation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ldm.training.ranks import ALONE, Ranks

T = TypeVar("T")


class TreeSum:
    """Sums lists of tensors by a fixed binary tree: neighbours first, an odd one out waits for the next.

    For four parts that is (a + b) + (c + d), for three (a + b) + c. Of n parts that come one after the other,
    at most log2(n) + 1 partial sums are held.
    """

    def __init__(self) -> None:
        self._partial: list[tuple[int, list[Tensor]]] = []

    def add(self, part: list[Tensor]) -> None:
        """Take the next part over; it may be overwritten."""
        count = 1
        while self._partial and self._partial[-1][0] == count:
            part = added(self._partial.pop()[1], part)
            count *= 2
        self._partial.append((count, part))

    def total(self) -> list[Tensor]:
        """The sum of all parts, once."""
        _, total = self._partial.pop()
        while self._partial:
            total = added(self._partial.pop()[1], total)
        return total


def added(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    """Left + right, in the place of left."""
    torch._foreach_add_(left, right)  # pyright: ignore[reportPrivateImportUsage]
    return left


def run_shards(
    work: Callable[[int], tuple[Mapping[str, Tensor], T]],
    num_shards: int,
    *,
    parameters: Sequence[Tensor],
    buffers: Sequence[Tensor] = (),
    ranks: Ranks = ALONE,
) -> tuple[dict[str, Tensor], list[T]]:
    """Do the work of this rank's shards, one after the other, and combine it with that of all.

    Args:
        work: called with the number of a shard; leaves gradients, and returns scalars to log, the same ones
            for every shard, and what else the caller needs of it.
        num_shards: how many there are, over all ranks.
        parameters: what the work leaves gradients on; afterwards they hold the mean over all shards.
        buffers: what the work changes in place (statistics of BatchNorm); every shard finds them as they were
            before the first, and they end as the mean. Counters (integers) are the same in every shard.
        ranks: who does the others.

    Returns:
        The means of what all shards log, and what else the work on this rank's shards returned, in order.
    """
    if num_shards == 1:
        logged, other = work(0)
        return dict(logged), [other]
    before = [buffer.clone() for buffer in buffers]
    statistics = [buffer for buffer in buffers if buffer.is_floating_point()]
    sums, others, names = TreeSum(), [], []
    for index in ranks.own(num_shards):
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        logged, other = work(index)
        others.append(other)
        names = list(logged)
        sums.add(
            [*taken(parameters), *(b.clone() for b in statistics), *(v.clone() for v in logged.values())]
        )
    means = ranks.sum(sums.total())
    torch._foreach_div_(means, num_shards)  # pyright: ignore[reportPrivateImportUsage]
    gradients, rest = means[: len(parameters)], means[len(parameters) :]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.empty_like(parameter).copy_(gradient) if ranks.world_size > 1 else gradient
    for buffer, mean in zip(statistics, rest[: len(statistics)], strict=True):
        buffer.copy_(mean)
    return dict(zip(names, rest[len(statistics) :], strict=True)), others


def taken(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of one shard, taken away from the parameters; zeros where the shard gave none."""
    gradients = []
    for parameter in parameters:
        gradients.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        parameter.grad = None
    return gradients
