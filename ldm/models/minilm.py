"""A pretrained text encoder, frozen: all-MiniLM-L6-v2, a BERT of six layers (Wang et al. 2020).

B batch, L tokens of a caption, D = 384 width of a token.

Differs: the paper trains its text transformer together with the UNet. A small run has neither the captions nor
the time for that, and starts from an encoder that can read.
"""

import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor, nn

from datasets.conditions.text import PAD
from ldm.weights import MINILM, verified_bytes

NUM_LAYERS, NUM_HEADS, EPS = 6, 12, 1e-12


class MiniLM(nn.Module):
    """Features of word pieces: (B, L) int64 -> (B, L, 384); padding is not attended to.

    The weights are no parameters and in no state dict: they are not trained, averaged or stored, and come from
    their package each time.

    Raises:
        WeightsError: the package is missing, or its file is not the one expected.
    """

    def __init__(self) -> None:
        super().__init__()
        for name, value in load(verified_bytes(MINILM)).items():
            if value.is_floating_point():
                self.register_buffer(name.replace(".", "/"), value, persistent=False)

    def norm(self, x: Tensor, name: str) -> Tensor:
        """LayerNorm with the weights of that name."""
        weight, bias = self.get_buffer(f"{name}/weight"), self.get_buffer(f"{name}/bias")
        return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)

    def linear(self, x: Tensor, name: str) -> Tensor:
        """A projection with the weights of that name."""
        return F.linear(x, self.get_buffer(f"{name}/weight"), self.get_buffer(f"{name}/bias"))

    def embed(self, tokens: Tensor) -> Tensor:
        """Word, place and segment: (B, L) -> (B, L, D)."""
        words, places, segments = (
            self.get_buffer(f"embeddings/{table}_embeddings/weight")
            for table in ("word", "position", "token_type")
        )
        return self.norm(words[tokens] + places[: tokens.shape[1]] + segments[0], "embeddings/LayerNorm")

    def layer(self, x: Tensor, mask: Tensor, name: str) -> Tensor:
        """Attention, then an MLP, each added to its input and normalised behind: (B, L, D) -> (B, L, D)."""
        q, k, v = (
            self.linear(x, f"{name}/attention/self/{part}").unflatten(2, (NUM_HEADS, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        gathered = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.norm(
            x + self.linear(gathered, f"{name}/attention/output/dense"), f"{name}/attention/output/LayerNorm"
        )
        hidden = F.gelu(self.linear(x, f"{name}/intermediate/dense"))
        return self.norm(x + self.linear(hidden, f"{name}/output/dense"), f"{name}/output/LayerNorm")

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """A vector per token."""
        mask = (tokens != PAD)[:, None, None, :]  # (B, 1, 1, L)
        x = self.embed(tokens)
        for i in range(NUM_LAYERS):
            x = self.layer(x, mask, f"encoder/layer/{i}")
        return x
