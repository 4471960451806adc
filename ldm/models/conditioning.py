"""Conditioning encoders tau: what is asked for, as the UNet is given it (paper Sec. 3.3, eq. 3).

B batch, L tokens, D width of a token, C channels, H W height and width of a map, h w those of the latent.

    kind            condition                               the UNet gets            asks for nothing
    class_label     (B,) int64                              tokens (B, 1, D)         the last class
    class_vector    (B,) int64                              label (B,)               the last class
    caption         (B, 77) int64 word pieces               tokens (B, 77, D)        the empty caption
    layout          (B, 92) int64 layout tokens             tokens (B, 92, D)        all slots empty
    embeddings      (B, L, D) vectors                       tokens (B, L, D)         zeros
    segmentation    (B, H, W) int64, -1 for no class        maps (B, 3, h, w)        -1 everywhere
    low_res         (B, 3, h, w) in [-1, 1]                 maps (B, 3, h, w)        zeros, mid grey
    masked_image    (B, C + 1, h, w), see masked_condition  maps (B, C + 1, h, w)    zeros, all masked

An encoder turns the second column into the third, and `ldm.conditions.null_condition` what is in the fourth.
Differs: the published code has null conditions for captions and (one model) classes alone.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.conditions.layout import empty_layout
from datasets.conditions.text import empty_caption
from ldm.models.minilm import MiniLM
from ldm.models.text_transformer import Transformer
from ldm.network_config import (
    CaptionConditioning,
    ClassConditioning,
    ClassVectorConditioning,
    Conditioning,
    EmbeddingsConditioning,
    HybridConditioning,
    LayoutConditioning,
    LowResConditioning,
    MaskedImageConditioning,
    SegmentationConditioning,
)


class ClassEmbedder(nn.Module):
    """One learned token per class, and with `null_class` one more for "no class": (B,) int64 -> (B, 1, D).

    The null class is the last index, num_classes; guidance samples with it (Ho & Salimans 2022).
    """

    def __init__(self, num_classes: int, context_dim: int, *, null_class: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + null_class, context_dim)

    def forward(self, labels: Tensor) -> Tensor:
        """One token per label, (B, 1, D)."""
        return self.embedding(labels)[:, None, :]


class AsGiven(nn.Module):
    """The condition itself; the null condition has one value, or another one in the last channel."""

    def __init__(self, null_value: float = 0, *, last_channel: float | None = None) -> None:
        super().__init__()
        self.null_value, self.last_channel = null_value, last_channel

    def forward(self, condition: Tensor) -> Tensor:
        """The condition."""
        return condition

    def null(self, like: Tensor) -> Tensor:
        """The fixed values, shaped like `like`."""
        null = torch.full_like(like, self.null_value)
        if self.last_channel is not None:
            null[:, -1] = self.last_channel
        return null


class TokenEncoder(nn.Module):
    """A transformer over tokens of a fixed number: (B, L) int64 -> (B, L, D).

    Args:
        transformer: (B, L) -> (B, L, D).
        empty: the tokens that ask for nothing, int64 (L,).
    """

    def __init__(self, transformer: nn.Module, *, empty: np.ndarray) -> None:
        super().__init__()
        self.transformer = transformer
        self.empty = empty

    def forward(self, tokens: Tensor) -> Tensor:
        """A vector per token."""
        return self.transformer(tokens)


class SpatialRescaler(nn.Module):
    """Classes of pixels, halved and mapped to few channels: (B, H, W) int64 -> (B, C, h, w).

    h = H / 2 ** num_stages. The map goes through one-hot channels that are averaged, so a border between
    classes becomes a mixture of them; -1 is no class, zero in all of them.
    """

    def __init__(self, num_classes: int, channels: int, *, num_stages: int) -> None:
        super().__init__()
        self.num_classes, self.num_stages = num_classes, num_stages
        self.channel_mapper = nn.Conv2d(num_classes, channels, 1, bias=False)

    def forward(self, labels: Tensor) -> Tensor:
        """Maps of a class per pixel."""
        known = F.one_hot(labels.clamp(min=0), self.num_classes) * (labels >= 0)[..., None]
        return self.rescale(known.movedim(3, 1).to(self.channel_mapper.weight.dtype))

    def rescale(self, shares: Tensor) -> Tensor:
        """Maps of the shares of classes, (B, num_classes, H, W) -> (B, C, h, w)."""
        for _ in range(self.num_stages):
            shares = F.interpolate(shares, scale_factor=0.5, mode="bilinear")
        return self.channel_mapper(shares)


class Hybrid(nn.Module):
    """Two encoders side by side: of what becomes tokens, and of what becomes maps."""

    def __init__(self, tokens: "Conditioner", maps: "Conditioner") -> None:
        super().__init__()
        self.tokens, self.maps = tokens, maps


def masked_condition(encoded: Tensor, mask: Tensor) -> Tensor:
    """The condition of inpainting: what is left of a picture, encoded, and where it is to be painted.

    Args:
        encoded: (B, C, h, w) latents of the picture whose masked pixels were made black, -1; not scaled, as
            published.
        mask: (B, 1, H, W), 1 where the picture is to be painted, 0 where it is known.

    Returns:
        (B, C + 1, h, w); the mask comes last, in {-1, 1}, the nearest pixel's.
    """
    small = F.interpolate(mask.to(encoded), size=encoded.shape[2:], mode="nearest")
    return torch.cat([encoded, 2 * small - 1], dim=1)


Conditioner = ClassEmbedder | AsGiven | TokenEncoder | SpatialRescaler
"""An encoder of any kind: called with conditions, it gives what the UNet gets."""


def build_transformer(config: CaptionConditioning | LayoutConditioning) -> Transformer:
    """The transformer of a config."""
    return Transformer(
        vocab_size=config.vocab_size,
        num_tokens=config.num_tokens,
        width=config.context_dim,
        depth=config.depth,
    )


def build_conditioner(
    config: Conditioning | HybridConditioning | None, *, num_classes: int
) -> Conditioner | Hybrid | None:
    """The conditioning encoder of a recipe; None for an unconditional one.

    Args:
        config: the kind, and its sizes.
        num_classes: classes of the data set, without the null class; for the two kinds of class labels.
    """
    match config:
        case None:
            return None
        case ClassConditioning():
            return ClassEmbedder(num_classes, config.context_dim, null_class=config.null_class)
        case ClassVectorConditioning():
            return AsGiven(num_classes)
        case CaptionConditioning():
            transformer = MiniLM() if config.encoder == "minilm" else build_transformer(config)
            return TokenEncoder(transformer, empty=empty_caption(config.num_tokens))
        case LayoutConditioning():
            empty = empty_layout(config.num_tokens, vocabulary=config.vocab_size)
            return TokenEncoder(build_transformer(config), empty=empty)
        case SegmentationConditioning():
            return SpatialRescaler(config.num_classes, config.channels, num_stages=config.num_stages)
        case EmbeddingsConditioning() | LowResConditioning():
            return AsGiven()
        case MaskedImageConditioning():
            return AsGiven(last_channel=1.0)
        case HybridConditioning():
            tokens = build_conditioner(config.tokens, num_classes=num_classes)
            maps = build_conditioner(config.maps, num_classes=num_classes)
            assert not isinstance(tokens, Hybrid | None)
            assert not isinstance(maps, Hybrid | None)
            return Hybrid(tokens, maps)
