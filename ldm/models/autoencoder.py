"""Encoder and decoder of the first stage (paper Sec. 3.1, App. G).

B batch, C channels, H W height and width of the picture, h w those of the latent (h = H / f), T = h * w.
Parameter names are those of the published checkpoints, so that a released state dict loads key for key.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.models.group_norm import GroupNorm

MAX_QUERIES = 2**14
"""Positions whose attention is computed at once; a latent of more than 128x128 takes it in parts."""


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """GroupNorm with the epsilon of the published first stages."""
    return GroupNorm(groups, channels, eps=1e-6, affine=True)


def swish(x: Tensor) -> Tensor:
    """Swish, x * sigmoid(x), in the memory of `x` where no gradient will ask for `x` again."""
    return F.silu(x, inplace=not x.requires_grad)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions after GroupNorm and swish, beside a shortcut: (B, C, h, w) -> (B, out, h, w)."""

    checkpointing = False
    """Compute the inside again in the backward pass instead of keeping it: the same bits, less memory."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The shortcut plus the residual branch."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, x, use_reentrant=False)
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """What `forward` gives, without checkpointing."""
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        # A convolution's gradient does not need its output, so the sum may take its memory.
        return h.add_(self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, added to its input: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The input plus its attention."""
        h = self.norm(x)
        if x.shape[2] * x.shape[3] <= MAX_QUERIES:
            return x + self.attend(self.q(h), self.k(h), self.v(h))
        k, v, rows = self.k(h), self.v(h), max(1, MAX_QUERIES // x.shape[3])
        parts = [
            x_part + self.attend(self.q(h_part), k, v)
            for x_part, h_part in zip(x.split(rows, 2), h.split(rows, 2), strict=True)
        ]
        del h, k, v  # as large as the result each
        return torch.cat(parts, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the positions of q (B, C, r, w) take from those of k and v (B, C, h, w): (B, C, r, w)."""
        queries, keys, values = (a.flatten(2).transpose(1, 2).unsqueeze(1) for a in (q, k, v))  # (B, 1, T, C)
        out = F.scaled_dot_product_attention(queries, keys, values).squeeze(1)  # (B, T, C)
        return self.proj_out(out.transpose(1, 2).reshape(q.shape))


class Downsample(nn.Module):
    """Stride-2 3x3 convolution, padded at the right and the bottom: (B, C, h, w) -> (B, C, h/2, w/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Half the height and width."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def doubling_kernel(weight: Tensor) -> Tensor:
    """The kernel whose transposed stride-2 convolution doubles a map, then convolves it with `weight`.

    Each value of the small map is met four times in the doubled one, so its weights are summed beforehand:
    (out, in, 3, 3) -> (in, out, 4, 4).
    """
    return F.avg_pool2d(weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1).transpose(0, 1)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution: (B, C, h, w) -> (B, C, 2h, 2w).

    Both are one transposed convolution: equal up to rounding, with four products where the plain form has
    nine, and the doubled map is never held.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Twice the height and width."""
        kernel = doubling_kernel(self.conv.weight)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


class Level(nn.Module):
    """One resolution: residual blocks, attention behind each where asked, a change of resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_blocks: int,
        attention: bool,
        groups: int,
        dropout: float,
        resample: dict[str, nn.Module],
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups=groups, dropout=dropout)
            for i in range(num_blocks)
        )
        self.attn = nn.ModuleList(
            AttnBlock(out_channels, groups=groups) for _ in range(num_blocks if attention else 0)
        )
        for name, module in resample.items():
            self.add_module(name, module)
        self.resample = list(resample.values())

    def layers(self) -> Iterator[nn.Module]:
        """Blocks and attention in their order, without the change of resolution."""
        for i, block in enumerate(self.block):
            yield block
            if len(self.attn) > 0:
                yield self.attn[i]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, out, h', w')."""
        for layer in (*self.layers(), *self.resample):
            x = layer(x)
        return x


class Middle(nn.Module):
    """The lowest resolution's two residual blocks with attention between them."""

    def __init__(self, channels: int, *, attention: bool, groups: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups=groups, dropout=dropout)
        self.attn_1 = AttnBlock(channels, groups=groups) if attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, groups=groups, dropout=dropout)

    def layers(self) -> Iterator[nn.Module]:
        """Blocks and attention in their order."""
        yield from (self.block_1, self.attn_1, self.block_2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        for layer in self.layers():
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Picture -> features of the latent's size: (B, in_channels, H, W) -> (B, out_channels, H/f, W/f).

    f = 2 ** (len(channel_mult) - 1).

    Args:
        in_channels: channels of the picture, in [-1, 1].
        out_channels: channels of the result (twice the latent's for KL).
        channels: width of the first level.
        channel_mult: width of each level as a multiple of `channels`; one halving between neighbours.
        num_res_blocks: residual blocks per level.
        attention_factors: downsampling factors at which each block is followed by attention.
        mid_attention: attention in the middle.
        groups: groups of every GroupNorm.
        dropout: probability inside the residual blocks.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_factors: Sequence[int],
        mid_attention: bool,
        groups: int,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [channels * m for m in channel_mult]
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            self.down.append(
                Level(
                    channels if i == 0 else widths[i - 1],
                    width,
                    num_blocks=num_res_blocks,
                    attention=2**i in attention_factors,
                    groups=groups,
                    dropout=dropout,
                    resample={"downsample": Downsample(width)} if i < len(widths) - 1 else {},
                )
            )
        self.mid = Middle(widths[-1], attention=mid_attention, groups=groups, dropout=dropout)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Features of a picture in [-1, 1]."""
        h = self.conv_in(x)
        for stage in self.down:
            h = stage(h)
        return self.conv_out(swish(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latent features -> picture: (B, z_channels, h, w) -> (B, out_channels, h*f, w*f).

    Arguments as `Encoder`; each level has one residual block more than the encoder's.
    """

    def __init__(
        self,
        *,
        z_channels: int,
        out_channels: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_factors: Sequence[int],
        mid_attention: bool,
        groups: int,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [channels * m for m in channel_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], attention=mid_attention, groups=groups, dropout=dropout)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            self.up.append(
                Level(
                    widths[min(i + 1, len(widths) - 1)],
                    width,
                    num_blocks=num_res_blocks + 1,
                    attention=2**i in attention_factors,
                    groups=groups,
                    dropout=dropout,
                    resample={"upsample": Upsample(width)} if i > 0 else {},
                )
            )
        self.norm_out = group_norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adversarial term is balanced (paper App. G)."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        """The picture, nominally in [-1, 1], not clamped."""
        h = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            h = stage(h)
        return self.conv_out(swish(self.norm_out(h)))


def to_channels_last(module: nn.Module) -> nn.Module:
    """Store 4-d weights channels-last, in which convolutions and GroupNorm are fastest on CPU and GPU."""
    return module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
