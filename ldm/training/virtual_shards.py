"""Virtual shards: the parts of a batch whose statistics are their own, combined in a fixed order.

What a step computes is defined per shard, so it does not matter which process computes which shard: each
starts from the same buffers, and results are summed by one binary tree. One shard is the plain computation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """Sum of tensors by a fixed binary tree: neighbours first, an odd one out waits for the next level.

    For four parts that is (a + b) + (c + d), for three (a + b) + c.
    """
    level = list(parts)
    while len(level) > 1:
        paired = [a + b for a, b in zip(level[::2], level[1::2], strict=False)]
        level = paired + level[2 * len(paired) :]
    return level[0]


def tree_mean(parts: Sequence[Tensor]) -> Tensor:
    """`tree_sum` divided by the number of parts; of one part, that part itself."""
    return tree_sum(parts) / len(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class ShardResult:
    """What the work on one shard leaves: gradients, buffers (statistics of BatchNorm), scalars to log."""

    gradients: list[Tensor]
    buffers: list[Tensor]
    logged: Mapping[str, Tensor]


def compute_shard(
    work: Callable[[], Mapping[str, Tensor]], *, parameters: Sequence[Tensor], buffers: Sequence[Tensor]
) -> ShardResult:
    """Do the work of one shard and take its gradients away from the parameters.

    Args:
        work: forward and backward pass of one shard; returns scalars to log.
        parameters: what the work leaves gradients on; it finds them without.
        buffers: what the work changes in place.
    """
    logged = work()
    gradients = []
    for parameter in parameters:
        assert parameter.grad is not None
        gradients.append(parameter.grad)
        parameter.grad = None
    return ShardResult(gradients, [buffer.clone() for buffer in buffers], logged)


def combine(
    results: Sequence[ShardResult], *, parameters: Sequence[Tensor], buffers: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Leave the mean gradients and buffers of all shards, in shard order; return the means of what they log.

    Counters (integer buffers) are the same in every shard and stay as they are.
    """
    for parameter, gradients in zip(
        parameters, zip(*(r.gradients for r in results), strict=True), strict=True
    ):
        parameter.grad = tree_mean(gradients)
    for buffer, values in zip(buffers, zip(*(r.buffers for r in results), strict=True), strict=True):
        buffer.copy_(tree_mean(values) if buffer.is_floating_point() else values[0])
    return {name: tree_mean([r.logged[name] for r in results]) for name in results[0].logged}


def run_shards(
    work: Callable[[int], tuple[Mapping[str, Tensor], T]],
    num_shards: int,
    *,
    parameters: Sequence[Tensor],
    buffers: Sequence[Tensor],
) -> tuple[dict[str, Tensor], list[T]]:
    """Do the work of every shard here, one after the other, and combine it.

    Args:
        work: called with the number of a shard; returns scalars to log, and what else the caller needs of it.
        num_shards: how many there are.
        parameters: what the work leaves gradients on; afterwards they hold the mean over the shards.
        buffers: what the work changes in place; every shard finds them as they were before the first.

    Returns:
        The means of what the shards log, and the rest of what they returned, in order.
    """
    before = [buffer.clone() for buffer in buffers]
    results: list[ShardResult] = []
    others: list[T] = []
    for index in range(num_shards):
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)

        def one(index: int = index) -> Mapping[str, Tensor]:
            logged, other = work(index)
            others.append(other)
            return logged

        results.append(compute_shard(one, parameters=parameters, buffers=buffers))
    return combine(results, parameters=parameters, buffers=buffers), others
