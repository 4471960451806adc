"""The processes that train together, as one of them sees them: what is its part, and how parts are joined.

S virtual shards, R ranks. What is joined does not depend on R (infra/decisions/0015).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """R processes, of which this is one; alone, it need not ask anybody.

    Attributes:
        rank: which one this is, from 0.
        world_size: R, a power of two.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that reports, looks and saves."""
        return self.rank == 0

    def own(self, num_shards: int) -> range:
        """The shards that this rank computes, S / R in a row."""
        share = num_shards // self.world_size
        return range(self.rank * share, (self.rank + 1) * share)

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum over the ranks, by the upper levels of the tree over shards; the same bits on each.

        At distance 1, 2, 4, ... partners exchange what they have and add it, so each level of the tree is
        computed by all whom it concerns. Addition commutes bit for bit, so both get the same.

        Args:
            tensors: of the same types and shapes on every rank; they may be overwritten.
        """
        if self.world_size == 1:
            return list(tensors)
        by_type: dict[torch.dtype, list[int]] = {}
        for place, tensor in enumerate(tensors):
            by_type.setdefault(tensor.dtype, []).append(place)
        summed = list(tensors)
        for places in by_type.values():
            flat = torch.cat([tensors[place].reshape(-1) for place in places])
            parts = self._sum_flat(flat).split([tensors[place].numel() for place in places])
            for place, part in zip(places, parts, strict=True):
                summed[place] = part.view(tensors[place].shape)
        return summed

    def _sum_flat(self, flat: Tensor) -> Tensor:
        distance = 1
        while distance < self.world_size:
            theirs, partner = torch.empty_like(flat), self.rank ^ distance
            exchange = [dist.P2POp(dist.isend, flat, partner), dist.P2POp(dist.irecv, theirs, partner)]
            for request in dist.batch_isend_irecv(exchange):
                request.wait()
            flat += theirs
            distance *= 2
        return flat

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all ranks along the first dimension, by rank, in the part's memory layout."""
        if self.world_size == 1:
            return part
        parts = [
            torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.world_size)
        ]
        dist.all_gather(parts, part.contiguous())
        whole = torch.cat(parts)
        is_channels_last = part.ndim == 4 and not part.is_contiguous()
        return whole.contiguous(memory_format=torch.channels_last) if is_channels_last else whole

    def any_of(self, wishes: Sequence[bool], *, device: torch.device | str = "cpu") -> list[bool]:
        """Whether any rank wishes so, for each of some wishes."""
        if self.world_size == 1:
            return list(wishes)
        votes = torch.tensor(wishes, dtype=torch.int32, device=device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    def from_first(
        self, values: Mapping[str, float], *, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """The first rank's numbers, exactly, on every rank."""
        if self.world_size == 1:
            return dict(values)
        text = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8).to(device)
        length = torch.tensor(len(text), device=device)
        dist.broadcast(length, src=0)
        data = text if self.is_first else torch.empty(int(length), dtype=torch.uint8, device=device)
        dist.broadcast(data, src=0)
        return json.loads(bytes(data.tolist()))


ALONE = Ranks()
