"""Attention blocks of the UNet (paper Sec. 3.3, App. E.2.1).

B batch, C channels, h w height and width of the feature map, T = h * w positions, L tokens of the condition,
D their width. Parameter names are those of the published checkpoints.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def zero_init(module: nn.Module) -> nn.Module:
    """The module with all parameters zero: a residual branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, T, C); no copy when x is channels-last."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, T, C) -> (B, C, h, w), channels-last, with the height and width of `like`."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with the channels cut into heads: (B, T, C), (B, L, C) -> (B, T, C)."""
    q, k, v = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, T or L, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class AttentionBlock(nn.Module):
    """Self-attention over positions, added to its input: (B, C, h, w) -> (B, C, h, w).

    The projection gives query, key and value head by head, as in the published models. Both projections are
    computed as 1x1 convolutions of the map, which take half the time of a matrix product where MKL has no
    AVX-512 path, and the same elsewhere.
    """

    def __init__(self, channels: int, *, num_heads: int, groups: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The input plus its attention."""
        del context
        qkv = to_tokens(F.conv2d(self.norm(x), self.qkv.weight.unsqueeze(3), self.qkv.bias))  # (B, T, 3C)
        q, k, v = qkv.unflatten(2, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)  # 3 of (B, heads, T, d)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, T, C)
        weight, bias = self.proj_out.weight, self.proj_out.bias
        return F.conv2d(to_map(out, x), weight.unsqueeze(3), bias).add_(x)  # pyright: ignore


class CrossAttention(nn.Module):
    """Attention of T queries to L context tokens; without a context, to the queries themselves."""

    def __init__(self, channels: int, *, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Identity())

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, T, C), (B, L, D) -> (B, T, C)."""
        context = x if context is None else context
        out = multi_head_attention(self.to_q(x), self.to_k(context), self.to_v(context), self.num_heads)
        return self.to_out(out)


class GEGLU(nn.Module):
    """x W1 * gelu(x W2) (Shazeer 2020): (B, T, C) -> (B, T, 4C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 8 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """The gated projection."""
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU then a projection back: (B, T, C) -> (B, T, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """The projection there and back."""
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after LayerNorm and added to its input."""

    def __init__(self, channels: int, *, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels, context_dim=channels, num_heads=num_heads)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context_dim=context_dim, num_heads=num_heads)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, T, C), (B, L, D) -> (B, T, C)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks that also attend to the condition: (B, C, h, w), (B, L, D) -> (B, C, h, w)."""

    def __init__(self, channels: int, *, context_dim: int, num_heads: int, depth: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_dim=context_dim, num_heads=num_heads) for _ in range(depth)
        )
        self.proj_out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The input plus what its tokens gathered; ValueError without a context."""
        if context is None:
            raise ValueError(
                "a UNet with cross-attention needs a context of shape (B, L, context_dim), got None"
            )
        tokens = to_tokens(self.proj_in(self.norm(x)))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(to_map(tokens, x))


def num_heads_of(channels: int, *, head_channels: int | None, num_heads: int | None) -> int:
    """Heads of a block: fixed, or one per `head_channels` channels.

    Raises:
        ValueError: when the channels do not divide into heads.
    """
    heads = num_heads if num_heads is not None else channels // (head_channels or channels)
    if heads < 1 or channels % heads:
        raise ValueError(
            f"channels ({channels}) must be divisible into heads, got {head_channels=}, {num_heads=}; "
            "choose model_channels and channel_mult so that every level divides"
        )
    return heads
