"""Conditioning encoders tau: what is asked for -> tokens the UNet attends to (paper Sec. 3.3, eq. 3).

B batch, L tokens, D width of a token.
"""

import torch
from torch import Tensor, nn

from ldm.config import ClassConditioning


class ClassEmbedder(nn.Module):
    """One learned token per class, and one more for "no class": (B,) int64 -> (B, 1, D).

    The null class is the last index, num_classes; guidance samples with it (Ho & Salimans 2022).
    """

    def __init__(self, num_classes: int, context_dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding = nn.Embedding(num_classes + 1, context_dim)

    def forward(self, labels: Tensor) -> Tensor:
        """One token per label, (B, 1, D)."""
        return self.embedding(labels)[:, None, :]

    def null(self, batch: int) -> Tensor:
        """Labels that ask for nothing, (B,) int64."""
        return torch.full((batch,), self.num_classes, device=self.embedding.weight.device)


def drop_labels(labels: Tensor, *, null: int, rate: float, generator: torch.Generator) -> Tensor:
    """Labels, a share `rate` replaced by the null class, and unlabelled (-1) ones always: (B,) -> (B,)."""
    dropped = torch.rand(labels.shape, generator=generator) < rate
    return torch.where(dropped.to(labels.device) | (labels < 0), null, labels)


def build_conditioner(config: ClassConditioning | None, *, num_classes: int) -> ClassEmbedder | None:
    """The conditioning encoder of a recipe; None for an unconditional one."""
    return None if config is None else ClassEmbedder(num_classes, config.context_dim)
