"""The time-conditional UNet (paper Sec. 3.2, 3.3, App. E.2; Dhariwal & Nichol 2021).

B batch, C channels, h w height and width of the latent, L tokens of the condition, D their width, K channels
of a concatenated condition, E width of the time embedding (4 * model_channels). Parameter names are those of
the published checkpoints.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.config import UNetConfig
from ldm.models.attention import AttentionBlock, SpatialTransformer, num_heads_of, zero_init
from ldm.models.autoencoder import doubling_kernel, swish, to_channels_last

MIN_POSITIONS = 256
"""Positions of a map, 16x16, from which doubling and convolving it in one is faster; see `Upsample`."""


def timestep_embedding(t: Tensor, width: int, *, max_period: float = 10_000.0) -> Tensor:
    """Cosines, then sines of t at geometric frequencies: (B,) -> (B, width), width even."""
    half = width // 2
    frequency = torch.exp(
        -math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half
    )
    angle = t[:, None].float() * frequency[None]  # (B, half)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class ResBlock(nn.Module):
    """Two 3x3 convolutions, the time embedding between: (B, C, h, w), (B, E) -> (B, out, h, w).

    Args:
        channels: C.
        embedding: E.
        out_channels: channels of the result.
        dropout: probability before the last convolution.
        groups: groups of both GroupNorms.
        scale_shift: the embedding scales and shifts the second normalisation; else it is added before it.
        resample: changes the resolution of the branch, before its first convolution, and of the shortcut; it
            has no parameters.
    """

    def __init__(
        self,
        channels: int,
        embedding: int,
        out_channels: int,
        *,
        dropout: float,
        groups: int,
        scale_shift: bool = False,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = nn.Identity() if resample is None else resample
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(embedding, 2 * out_channels if scale_shift else out_channels)
        )
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The shortcut plus the residual branch."""
        norm, _, conv = self.in_layers
        h = conv(self.resample(swish(norm(x))))
        time = self.emb_layers(embedding)[:, :, None, None]
        norm, _, dropout, conv = self.out_layers
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h.add_(time))  # the gradient of a convolution does not need its output
        return conv(dropout(swish(h))).add_(self.skip_connection(self.resample(x)))


class Downsample(nn.Module):
    """Stride-2 3x3 convolution: (B, C, h, w) -> (B, C, h/2, w/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Half the height and width."""
        return self.op(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution: (B, C, h, w) -> (B, C, 2h, 2w).

    On larger maps both are one transposed convolution: equal up to rounding, with four products where the
    plain form has nine. On small ones it would not pay for summing the weights.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Twice the height and width."""
        if x.shape[2] * x.shape[3] < MIN_POSITIONS:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        kernel = doubling_kernel(self.conv.weight)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


class Stage(nn.Sequential):
    """Layers of one UNet position, each given what it takes of features, time embedding and condition."""

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:  # pyright: ignore
        """The features after all layers."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, embedding)
            elif isinstance(layer, AttentionBlock | SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """Noise in a noisy latent: (B, C, h, w), (B,) time steps and the condition -> (B, out, h, w).

    A condition enters as tokens that are attended to, as maps concatenated to the latent, as a class vector
    added to the time embedding, or several of them. h and w must be divisible by 2 ** (levels - 1). Last
    layers of residual branches and the output convolution start at zero.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width, embedding = config.model_channels, 4 * config.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, embedding)
        widths = [width * m for m in config.channel_mult]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(config.in_channels, width, 3, padding=1))])
        skips, channels = [width], width
        for i, out in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(Stage(*self.block(channels, out, factor=2**i)))
                channels = out
                skips.append(channels)
            if i < len(widths) - 1:
                self.input_blocks.append(Stage(self.downsample(channels)))
                skips.append(channels)
        self.middle_block = Stage(
            self.residual(channels, channels), self.attention(channels), self.residual(channels, channels)
        )
        self.output_blocks = nn.ModuleList()
        for i, out in reversed(list(enumerate(widths))):
            for j in range(config.num_res_blocks + 1):
                layers = self.block(channels + skips.pop(), out, factor=2**i)
                channels = out
                if i > 0 and j == config.num_res_blocks:
                    layers.append(self.upsample(channels))
                self.output_blocks.append(Stage(*layers))
        self.out = nn.Sequential(
            nn.GroupNorm(config.norm_groups, channels),
            nn.SiLU(),
            zero_init(nn.Conv2d(channels, config.out_channels, 3, padding=1)),
        )

    def residual(self, channels: int, out: int, *, resample: nn.Module | None = None) -> ResBlock:
        """A residual block of this UNet."""
        config = self.config
        return ResBlock(
            channels,
            4 * config.model_channels,
            out,
            dropout=config.dropout,
            groups=config.norm_groups,
            scale_shift=config.scale_shift_norm,
            resample=resample,
        )

    def downsample(self, channels: int) -> nn.Module:
        """Halves height and width: inside a residual block, or by a convolution."""
        if self.config.resblock_updown:
            return self.residual(channels, channels, resample=nn.AvgPool2d(2))
        return Downsample(channels)

    def upsample(self, channels: int) -> nn.Module:
        """Doubles height and width: inside a residual block, or with a convolution behind it."""
        if self.config.resblock_updown:
            return self.residual(channels, channels, resample=nn.Upsample(scale_factor=2.0, mode="nearest"))
        return Upsample(channels)

    def attention(self, channels: int) -> nn.Module:
        """Self-attention, or a transformer that also attends to the condition when there is one."""
        config = self.config
        heads = num_heads_of(channels, head_channels=config.head_channels, num_heads=config.num_heads)
        if config.context_dim is None:
            return AttentionBlock(channels, num_heads=heads, groups=config.norm_groups)
        return SpatialTransformer(
            channels,
            context_dim=config.context_dim,
            num_heads=1 if config.one_head_transformers else heads,
            depth=config.transformer_depth,
            groups=config.norm_groups,
        )

    def block(self, channels: int, out: int, *, factor: int) -> list[nn.Module]:
        """A residual block, and attention behind it at the downsampling factors that ask for it."""
        layers: list[nn.Module] = [self.residual(channels, out)]
        if factor in self.config.attention_factors:
            layers.append(self.attention(out))
        return layers

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        *,
        concat: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        """The prediction, shaped like `x` but for its channels.

        Args:
            x: noisy latents, (B, C, h, w).
            t: time steps, (B,).
            context: tokens of the condition, (B, L, D), for a UNet with transformers.
            concat: maps of the condition, (B, K, h, w), put behind the channels of `x`.
            label: rows of the table of class vectors, (B,) int64, for a UNet with one.

        Raises:
            ValueError: a condition the UNet needs is missing, or the channels are not `in_channels`.
        """
        x = x if concat is None else torch.cat([x, concat], dim=1)
        if x.shape[1] != self.config.in_channels:
            raise ValueError(
                f"latent and concatenated condition must have {self.config.in_channels} channels together, "
                f"got {x.shape[1]}; give the condition as `concat`, (B, K, h, w)"
            )
        embedding = self.embed(t, label)
        skips = []
        for stage in self.input_blocks:
            x = self.run(stage, x, embedding, context)
            skips.append(x)
        x = self.run(self.middle_block, x, embedding, context)
        for stage in self.output_blocks:
            x = self.run(stage, torch.cat([x, skips.pop()], dim=1), embedding, context)
        norm, _, conv = self.out
        return conv(swish(norm(x)))

    def embed(self, t: Tensor, label: Tensor | None) -> Tensor:
        """The time embedding, with the vector of the class where there is a table: (B, E)."""
        embedding = self.time_embed(timestep_embedding(t, self.config.model_channels))
        if self.config.num_classes is None:
            return embedding
        if label is None:
            raise ValueError("a UNet with class vectors needs a label of shape (B,), got None")
        return embedding + self.label_emb(label)

    def run(self, stage: nn.Module, x: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:
        """The features after a stage; its activations are kept, or made again in the backward pass."""
        if self.config.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(stage, x, embedding, context, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return stage(x, embedding, context)


def build_unet(config: UNetConfig) -> UNet:
    """The UNet of a config, channels-last."""
    unet = UNet(config)
    to_channels_last(unet)
    return unet
