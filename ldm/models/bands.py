"""Large pictures through a first stage in bands of rows, equal to the whole up to rounding (decision 0013).

B batch, C channels, H W height and width of a picture, h w those of its latent. Maps are (1, C, height,
width): the pictures of a batch go one by one.

The low resolutions, up to and with the last one that has attention, run whole. Beyond them a map is
computed in bands: each layer gets as many rows more as it reaches to, and the rows that its zero padding has
spoilt are cut off; at the picture's own border the padding is right. A GroupNorm's statistics are those of
the whole map, gathered over all bands first. Where they need a convolution's output, the bands are computed
once for the statistics and again for the result. `ldm.models.band_plan` says how many rows fit a budget.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.autoencoder import Decoder, Encoder, Level, ResnetBlock
from ldm.models.first_stage import FirstStage, KLModel, VQModel
from ldm.models.group_norm import Affine, affine_of, moments

REACH = 2
"""Rows to each side that a residual block looks at: one for each of its convolutions."""
MIN_ROWS = REACH
"""Rows of the smallest band: only its neighbour may still read what it is written over."""

PART_ROWS = 64
"""Rows of a small map's parts; as large as that, they go back to the system when they are let go."""

BandOf = Callable[[int, int], Tensor]
"""Rows `top` to `bottom` of a map."""


class Strip(NamedTuple):
    """Some rows of a map."""

    x: Tensor
    """(1, C, rows, width)."""
    top: int
    """Where in the map its first row lies."""
    height: int
    """Rows of the whole map."""

    def band(self, top: int, bottom: int) -> Tensor:
        """The map's rows `top` to `bottom`, which must lie in the strip."""
        return self.x[:, :, top - self.top : bottom - self.top]


@dataclass(frozen=True)
class Source:
    """A map that gives strips, whether it lies in memory or is computed strip by strip."""

    height: int
    read: Callable[[int, int], Strip]
    """Rows from and to; what lies beyond the map is left out."""
    let_go: Callable[[int], None]
    """Says that no row above this one is read again."""
    held: Tensor | None
    """The map itself, (1, C, height, width), if it lies in memory."""


def clip(top: int, bottom: int, height: int) -> tuple[int, int]:
    """The part of a range of rows that lies in a map."""
    return max(top, 0), min(bottom, height)


def held(x: Tensor) -> Source:
    """A map that lies in memory."""
    height = x.shape[2]

    def read(top: int, bottom: int) -> Strip:
        top, bottom = clip(top, bottom, height)
        return Strip(x[:, :, top:bottom], top, height)

    return Source(height, read, lambda _: None, x)


def doubled(x: Tensor, conv: nn.Module) -> Source:
    """What an `Upsample` with this convolution makes of a map, without ever holding it: (1, C, 2h, 2w).

    The small map is kept in parts, which are let go one after the other.
    """
    height = 2 * x.shape[2]
    parts = [part.clone(memory_format=torch.channels_last) for part in x.split(PART_ROWS, 2)]

    def small(top: int, bottom: int) -> Tensor:
        covering = range(top // PART_ROWS, (bottom - 1) // PART_ROWS + 1)
        return torch.cat(
            [parts[i][:, :, max(top - i * PART_ROWS, 0) : bottom - i * PART_ROWS] for i in covering], 2
        )

    def read(top: int, bottom: int) -> Strip:
        top, bottom = clip(top, bottom, height)
        first, last = clip((top - 1) // 2, (bottom + 2) // 2, height // 2)
        large = F.interpolate(small(first, last), scale_factor=2.0, mode="nearest")
        return Strip(convolved(conv, Strip(large, 2 * first, height)).band(top, bottom), top, height)

    def let_go(row: int) -> None:
        for i in range((row - 1) // 2 // PART_ROWS):
            parts[i] = parts[i][:, :, :0].clone()

    return Source(height, read, let_go, None)


def convolved(conv: nn.Module, strip: Strip) -> Strip:
    """A strip through a padded 3x3 convolution, without the rows that the padding has spoilt."""
    at_top, at_bottom = strip.top == 0, strip.top + strip.x.shape[2] == strip.height
    x = conv(strip.x)
    return Strip(
        x[:, :, 0 if at_top else 1 : None if at_bottom else -1], strip.top + (not at_top), strip.height
    )


def bands(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """First and last row (excluded) of each band; the last band may be smaller."""
    return ((top, min(top + rows, height)) for top in range(0, height, rows))


def in_bands(height: int, rows: int, band_of: BandOf, *, into: Tensor | None = None) -> Tensor:
    """The map (1, C, height, width) of these bands, in a new tensor or `into` the one they are read from.

    Each band is written only when the next one is known, which still reads the rows beside it.
    """
    waiting: list[tuple[int, Tensor]] = []

    def write() -> None:
        top, band = waiting.pop(0)
        assert into is not None
        into[:, :, top : top + band.shape[2]] = band

    for top, bottom in bands(height, rows):
        band = band_of(top, bottom)
        if into is None:
            shape = (1, band.shape[1], height, band.shape[3])
            into = torch.empty(shape, dtype=band.dtype, device=band.device, memory_format=torch.channels_last)
        waiting.append((top, band))
        if len(waiting) > 1:
            write()
    write()
    assert into is not None
    return into


def normalisation(norm: nn.GroupNorm, height: int, rows: int, band_of: BandOf) -> Affine:
    """A GroupNorm with the statistics of the whole map that has these bands."""
    means, variances, shares = [], [], []
    for top, bottom in bands(height, rows):
        mean, variance = moments(band_of(top, bottom))
        means.append(mean)
        variances.append(variance)
        shares.append((bottom - top) / height)
    return affine_of(norm, torch.stack(means), torch.stack(variances), torch.tensor(shares))


def activated(strip: Strip, affine: Affine) -> Strip:
    """A strip normalised, then swish of it."""
    return strip._replace(x=F.silu(affine(strip.x), inplace=True))


def apply_block(block: ResnetBlock, source: Source, rows: int) -> Tensor:
    """What a residual block in evaluation mode makes of a map, written over it where that lies in memory.

    A block that changes the number of channels, or whose source is computed, gets a map of its own.
    """
    height = source.height
    first = normalisation(block.norm1, height, rows, lambda top, bottom: source.read(top, bottom).x)

    def hidden(top: int, bottom: int) -> Tensor:
        strip = source.read(top - 1, bottom + 1)
        return convolved(block.conv1, activated(strip, first)).band(top, bottom)

    second = normalisation(block.norm2, height, rows, hidden)
    shortcut = getattr(block, "nin_shortcut", None)

    def result(top: int, bottom: int) -> Tensor:
        source.let_go(top - REACH)
        strip = source.read(top - REACH, bottom + REACH)
        h = convolved(block.conv1, activated(strip, first))
        h = convolved(block.conv2, activated(h, second))
        x = strip.band(top, bottom)
        return h.band(top, bottom) + (x if shortcut is None else shortcut(x))

    return in_bands(height, rows, result, into=source.held if shortcut is None else None)


def halved(x: Tensor, conv: nn.Module, rows: int) -> Tensor:
    """What a `Downsample` with this convolution makes of a map: (1, C, h, w) -> (1, C, h / 2, w / 2)."""
    source = held(x)

    def result(top: int, bottom: int) -> Tensor:
        part = source.read(2 * top, 2 * bottom + 1).x
        return conv(F.pad(part, (0, 1, 0, 2 * (bottom - top) + 1 - part.shape[2])))

    return in_bands(x.shape[2] // 2, rows, result)


def levels_of(coder: Encoder | Decoder) -> tuple[list[Level], list[Level]]:
    """The levels that run in bands and those that run whole, finest first."""
    levels = cast(list[Level], list(coder.down if isinstance(coder, Encoder) else coder.up))
    with_attention = [i for i, level in enumerate(levels) if len(level.attn) > 0]
    split = min([*with_attention, len(levels) - 1])
    return levels[:split], levels[split:]


def encode_map(encoder: Encoder, x: Tensor, rows: int) -> Tensor:
    """What an encoder makes of one picture: (1, 3, H, W) -> (1, out_channels, h, w)."""
    banded, whole = levels_of(encoder)
    picture = held(x)
    h = in_bands(
        picture.height,
        rows,
        lambda top, bottom: convolved(encoder.conv_in, picture.read(top - 1, bottom + 1)).band(top, bottom),
    )
    for level in banded:
        for block in cast(list[ResnetBlock], list(level.block)):
            h = apply_block(block, held(h), rows)
        h = halved(h, level.get_submodule("downsample.conv"), rows)
    for level in whole:
        for layer in (*level.layers(), *level.resample):
            h = layer(h)
    for layer in encoder.mid.layers():
        h = layer(h)
    return encoder.conv_out(F.silu(encoder.norm_out(h)))


def decode_map(decoder: Decoder, z: Tensor, rows: int) -> Tensor:
    """What a decoder makes of one latent: (1, z_channels, h, w) -> (1, 3, H, W)."""
    banded, whole = levels_of(decoder)
    h = decoder.conv_in(z)
    for layer in decoder.mid.layers():
        h = layer(h)
    for level in reversed(whole):
        for layer in level.layers():
            h = layer(h)
        if level is not whole[0]:
            h = level.get_submodule("upsample")(h)
    below = whole[0]
    for level in reversed(banded):
        source = doubled(h, below.get_submodule("upsample.conv"))
        h = z  # lets the small map go: the source has its own parts of it
        for block in cast(list[ResnetBlock], list(level.block)):
            h = apply_block(block, source, rows)
            source = held(h)
        below = level
    picture = held(h)
    out = normalisation(
        decoder.norm_out, picture.height, rows, lambda top, bottom: picture.read(top, bottom).x
    )

    def result(top: int, bottom: int) -> Tensor:
        strip = activated(picture.read(top - 1, bottom + 1), out)
        return convolved(decoder.conv_out, strip).band(top, bottom)

    return in_bands(picture.height, rows, result)


def require_rows(rows: int) -> None:
    """Refuse bands that a residual block would look beyond."""
    if rows < MIN_ROWS:
        raise ValueError(f"a band must have at least {MIN_ROWS} rows, got {rows}; give more rows")


@torch.no_grad()
def encode_in_bands(model: FirstStage, x: Tensor, *, rows: int) -> Tensor:
    """The stored latents that `model.encode` gives, up to rounding, in less memory.

    Args:
        model: a first stage in evaluation mode; the identity has nothing to do.
        x: (B, 3, H, W) pictures in [-1, 1]; H and W divisible by f.
        rows: rows of each map that are computed at once, at least 2.

    Returns:
        (B, stored channels, h, w).

    Raises:
        ValueError: fewer rows.
    """
    require_rows(rows)
    if not isinstance(model, VQModel | KLModel):
        return model.encode(x)
    return torch.cat([model.quant_conv(encode_map(model.encoder, one, rows)) for one in x.split(1)])


@torch.no_grad()
def decode_in_bands(model: FirstStage, z: Tensor, *, rows: int) -> Tensor:
    """The pictures that `model.decode` gives, up to rounding, in less memory; VQ quantises all of z first.

    Args:
        model: a first stage in evaluation mode; the identity has nothing to do.
        z: (B, C, h, w) unscaled latents.
        rows: rows of each map that are computed at once, at least 2.

    Returns:
        (B, 3, H, W).

    Raises:
        ValueError: fewer rows.
    """
    require_rows(rows)
    if not isinstance(model, VQModel | KLModel):
        return model.decode(z)
    return torch.cat([decode_map(model.decoder, model.decoder_input(one), rows) for one in z.split(1)])


class Seam(NamedTuple):
    """How far a banded picture is from the whole one, in 8-bit levels (0 ... 255, before rounding)."""

    largest: float
    """Largest absolute difference anywhere."""
    at_borders: float
    """The same over the two rows at each border between bands."""


def seam_levels(banded: Tensor, whole: Tensor, *, rows: int) -> Seam:
    """The seam metric: absolute differences of pictures in [-1, 1] in 8-bit levels, so times 127.5.

    Args:
        banded: (B, 3, H, W) made in bands.
        whole: the same made whole.
        rows: rows of a band.
    """
    levels = (banded.double() - whole.double()).abs() * 127.5
    borders = range(rows, levels.shape[2], rows)
    beside = [row for border in borders for row in (border - 1, border)]
    return Seam(float(levels.max()), float(levels[:, :, beside].max()) if beside else 0.0)
