"""Exponential moving average of weights (paper App. E; the published models sample with it)."""

from collections.abc import Mapping

import torch
from torch import Tensor


def ema_decay(limit: float, step: int) -> float:
    """Decay of the step-th update (from 0): min(limit, (1 + n) / (10 + n)), n = step + 1.

    So early weights are soon forgotten.
    """
    return min(limit, (2 + step) / (11 + step))


class Ema:
    """Averaged copies of named parameters.

    Args:
        parameters: the parameters to follow, by name; the copies start equal to them.
        decay: the limit of the decay per step.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, decay: float) -> None:
        self.decay = decay
        self.parameters = list(parameters.values())
        self.averages = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average <- decay * average + (1 - decay) * parameter, after the step-th (from 0) optimiser step."""
        weight = 1.0 - ema_decay(self.decay, step)
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            list(self.averages.values()), self.parameters, weight
        )
