"""A transformer over tokens, the conditioning encoder of text and layouts (paper Sec. 4.3, Tab. 17).

B batch, L tokens of a condition, D width of a token. Parameter names are those of the published checkpoints,
whose encoders came out of the package x-transformers.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.attention import multi_head_attention

NUM_HEADS, HEAD_CHANNELS = 8, 64
"""The same at every width, as published."""
INIT_STD = 0.02


class SelfAttention(nn.Module):
    """Eight heads of 64 channels, over all tokens, padding too: (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = NUM_HEADS * HEAD_CHANNELS
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """What each token gathered."""
        return self.to_out(multi_head_attention(self.to_q(x), self.to_k(x), self.to_v(x), NUM_HEADS))


class MLP(nn.Module):
    """To four times the width and back, with GELU between: (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU()),
            nn.Identity(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The projection there and back."""
        return self.net(x)


class Layers(nn.Module):
    """Attention and MLP in turn, each after LayerNorm and added to its input: (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(width), kind(width)])
            for _ in range(depth)
            for kind in (SelfAttention, MLP)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The tokens after all layers."""
        for norm, layer in self.layers:  # pyright: ignore[reportGeneralTypeIssues]
            x = x + layer(norm(x))
        return x


class Positions(nn.Module):
    """A learned vector per place, (L, D)."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(num_tokens, width)
        nn.init.normal_(self.emb.weight, std=INIT_STD)


class Transformer(nn.Module):
    """Embedding of tokens and places, layers, a last LayerNorm: (B, L) int64 -> (B, L, D).

    `to_logits` predicts nothing here: the published weights hold it, no gradient reaches it, and keeping it
    lets them load key for key.
    """

    def __init__(self, *, vocab_size: int, num_tokens: int, width: int, depth: int) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.token_emb.weight, std=INIT_STD)
        self.pos_emb = Positions(num_tokens, width)
        self.attn_layers = Layers(width, depth)
        self.norm = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """A vector per token."""
        places = self.pos_emb.emb.weight[: tokens.shape[1]]
        return self.norm(self.attn_layers(F.embedding(tokens, self.token_emb.weight) + places))
