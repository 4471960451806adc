"""The batches of a run by step, read ahead; each rank reads its own part alone."""

from collections.abc import Iterator
from typing import Any

from datasets.loader import Loader, Source
from ldm.training.ranks import Ranks
from ldm.training_config import Training

NUM_WORKERS = 1
AHEAD = 2


class Batches:
    """This rank's part of each step's batch, in the order of the run's seed.

    Args:
        source: where samples come from.
        training: how many to a step, and the seed of their order.
        ranks: who reads the other parts.
    """

    def __init__(self, source: Source, training: Training, ranks: Ranks) -> None:
        self._batch_size = training.batch_size
        self._loader = Loader(
            source,
            training.seed,
            batch_size=training.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            num_workers=NUM_WORKERS,
            ahead=AHEAD,
        )
        self._next_step = -1
        self._stream: Iterator[dict[str, Any]] = iter(())

    def at(self, step: int) -> dict[str, Any]:
        """The samples of the step-th batch; steps in a row are read before they are asked for."""
        if step != self._next_step:
            self._stream = self._loader.batches(step * self._batch_size)
        self._next_step = step + 1
        return next(self._stream)
