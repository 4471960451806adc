"""A pretrained text encoder, frozen: all-MiniLM-L6-v2, a BERT of six layers (Wang et al. 2020).

B batch, L tokens of a caption, D = 384 width of a token.

Differs: the paper trains its text transformer together with the UNet. A small run has neither the captions
nor the time for that, and starts from an encoder that can read.
"""

from collections.abc import Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor, nn

from datasets.conditions.text import PAD
from ldm.weights import MINILM, verified_bytes

NUM_LAYERS, NUM_HEADS, EPS = 6, 12, 1e-12

Weights = Mapping[str, Tensor]


class MiniLM(nn.Module):
    """Features of word pieces: (B, L) int64 -> (B, L, 384); padding is not attended to.

    Its weights are neither parameters nor state: they are not trained, averaged or stored, and are read from
    their package when they are first used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Buffer(torch.empty(0), persistent=False)
        """Empty; the device it is moved to is where captions are read."""

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """A vector per token.

        Raises:
            WeightsError: the package is missing, or its file is not the one expected.
        """
        weights = minilm_weights(str(tokens.device))
        mask = (tokens != PAD)[:, None, None, :]  # (B, 1, 1, L)
        x = embed(tokens, weights)
        for i in range(NUM_LAYERS):
            x = layer(x, mask, weights, f"encoder.layer.{i}")
        return x


@lru_cache(maxsize=1)
def minilm_weights(device: str) -> Weights:
    """The packaged weights, on a device."""
    return {name: value.to(device) for name, value in load(verified_bytes(MINILM)).items()}


def norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    """LayerNorm with the weights of that name."""
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], EPS)


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    """A projection with the weights of that name."""
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def embed(tokens: Tensor, weights: Weights) -> Tensor:
    """Word, place and segment: (B, L) -> (B, L, D)."""
    words, places, segments = (
        weights[f"embeddings.{table}_embeddings.weight"] for table in ("word", "position", "token_type")
    )
    return norm(words[tokens] + places[: tokens.shape[1]] + segments[0], weights, "embeddings.LayerNorm")


def layer(x: Tensor, mask: Tensor, weights: Weights, name: str) -> Tensor:
    """Attention, then an MLP, each added to its input and normalised behind: (B, L, D) -> (B, L, D)."""
    q, k, v = (
        linear(x, weights, f"{name}.attention.self.{part}").unflatten(2, (NUM_HEADS, -1)).transpose(1, 2)
        for part in ("query", "key", "value")
    )
    gathered = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    gathered = linear(gathered, weights, f"{name}.attention.output.dense")
    x = norm(x + gathered, weights, f"{name}.attention.output.LayerNorm")
    hidden = F.gelu(linear(x, weights, f"{name}.intermediate.dense"))
    return norm(x + linear(hidden, weights, f"{name}.output.dense"), weights, f"{name}.output.LayerNorm")
