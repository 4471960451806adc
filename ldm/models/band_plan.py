"""How much memory coding in bands needs, counted from shapes, and how many rows a budget allows.

H W height and width of a picture, f the first stage's factor. The walk is that of `ldm.models.bands`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ldm.errors import ContractError
from ldm.first_stage_config import FirstStageModel
from ldm.models.autoencoder import MAX_QUERIES
from ldm.models.bands import MIN_ROWS
from ldm.models.quantizer import MAX_DISTANCES

Coding = Literal["encode", "decode"]
GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """Numbers held in maps of one resolution."""

    height: int
    width: int

    def map(self, channels: int) -> int:
        """One map."""
        return channels * self.height * self.width

    def whole_block(self, narrow: int, wide: int) -> int:
        """A residual block run whole: its input, then two maps of the input's width or three of its own."""
        return self.map(narrow) + max(2 * self.map(narrow), self.map(narrow + wide), 3 * self.map(wide))

    def whole_attention(self, channels: int) -> int:
        """Attention run whole: input, normalised, q, k, v, result, projection, sum.

        In parts it is input, normalised, k, v, and the finished parts, beside what one part needs.
        """
        in_parts = self.height * self.width > MAX_QUERIES
        return 5 * self.map(channels) + 4 * channels * MAX_QUERIES if in_parts else 8 * self.map(channels)

    def band_block(self, narrow: int, wide: int, *, rows: int, upsampled: bool) -> int:
        """What a residual block holds beside its maps: strips of one band, and the band that waits.

        The first convolution reads two rows more to each side and the second one more. Of an upsampled source
        the strip is held too, with three rows more, and while it is computed the doubled strip beside it.
        """

        def strip(channels: int, beside: int) -> int:
            return channels * min(rows + 2 * beside, self.height) * self.width

        source = strip(narrow, 3) if upsampled else 0
        first = strip(narrow, 2) + strip(wide, 2)
        second = strip(wide, 2) + 2 * strip(wide, 1)
        return max(2 * source, source + first, source + second) + strip(wide, 0)

    def band_conv(self, narrow: int, wide: int, *, rows: int) -> int:
        """What a convolution holds beside its maps: a prepared strip, its result, the band that waits."""
        return min(rows + 2, self.height) * self.width * (narrow + 2 * wide)


def split_of(config: FirstStageModel) -> int:
    """The first level that runs whole: the finest with attention, or the lowest."""
    last = len(config.channel_mult) - 1
    return min([i for i in range(last) if 2**i in config.attention_factors], default=last)


def whole_level(config: FirstStageModel, sizes: Sizes, level: int, narrow: int, blocks: int) -> Iterator[int]:
    """Phases of a level's blocks run whole."""
    wide = config.channels * config.channel_mult[level]
    for i in range(blocks):
        yield sizes.whole_block(narrow if i == 0 else wide, wide)
        if 2**level in config.attention_factors:
            yield sizes.whole_attention(wide)


def middle(config: FirstStageModel, sizes: Sizes) -> Iterator[int]:
    """Phases of the middle."""
    wide = config.channels * config.channel_mult[-1]
    yield sizes.whole_block(wide, wide)
    if config.mid_attention:
        yield sizes.whole_attention(wide)


def encode_phases(config: FirstStageModel, height: int, width: int, rows: int) -> Iterator[int]:
    """Numbers held in each phase of encoding one picture, the picture left out."""
    widths, split = [config.channels * m for m in config.channel_mult], split_of(config)
    sizes, narrow = Sizes(height, width), config.channels
    yield sizes.map(narrow) + sizes.band_conv(0, narrow, rows=rows)
    for level in range(split):
        wide = widths[level]
        own = sizes.map(wide) if narrow != wide else 0
        yield sizes.map(narrow) + own + sizes.band_block(narrow, wide, rows=rows, upsampled=False)
        yield sizes.map(wide) + sizes.band_block(wide, wide, rows=rows, upsampled=False)
        half = Sizes(sizes.height // 2, sizes.width // 2)
        padded = min(2 * rows + 1, sizes.height + 1) * (sizes.width + 1) * wide
        yield sizes.map(wide) + half.map(wide) + padded + half.band_conv(0, wide, rows=rows)
        sizes, narrow = half, wide
    for level in range(split, len(widths)):
        yield from whole_level(config, sizes, level, narrow, config.num_res_blocks)
        narrow = widths[level]
        if level < len(widths) - 1:
            half = Sizes(sizes.height // 2, sizes.width // 2)
            yield sizes.map(narrow) + (sizes.height + 1) * (sizes.width + 1) * narrow + half.map(narrow)
            sizes = half
    yield from middle(config, sizes)


def decode_phases(config: FirstStageModel, height: int, width: int, rows: int) -> Iterator[int]:
    """Numbers held in each phase of decoding one latent."""
    widths, split = [config.channels * m for m in config.channel_mult], split_of(config)
    sizes, narrow = Sizes(height // config.factor, width // config.factor), widths[-1]
    if config.kind == "vq" and config.num_codes is not None:
        yield min(sizes.map(config.num_codes), max(MAX_DISTANCES, config.num_codes))
    yield from middle(config, sizes)
    for level in reversed(range(split, len(widths))):
        yield from whole_level(config, sizes, level, narrow, config.num_res_blocks + 1)
        narrow = widths[level]
        if level > split:
            twice = Sizes(2 * sizes.height, 2 * sizes.width)
            yield sizes.map(narrow) + 2 * twice.map(narrow)
            sizes = twice
    for level in reversed(range(split)):
        wide, small = widths[level], sizes.map(narrow)
        sizes = Sizes(2 * sizes.height, 2 * sizes.width)
        yield 2 * small  # cut into parts
        yield small + sizes.map(wide) + sizes.band_block(narrow, wide, rows=rows, upsampled=True)
        yield sizes.map(wide) + sizes.band_block(wide, wide, rows=rows, upsampled=False)
        narrow = wide
    yield sizes.map(narrow) + sizes.map(3) + sizes.band_conv(narrow, 3, rows=rows)


PHASES = {"encode": encode_phases, "decode": decode_phases}


def peak_bytes(
    config: FirstStageModel,
    height: int,
    width: int,
    *,
    rows: int,
    coding: Coding,
    batch: int = 1,
    itemsize: int = 4,
) -> int:
    """The most memory that tensors hold at a time while pictures are coded in bands.

    It is the largest sum, over the phases of the work, of the maps that are held and the strips of one band,
    and the pictures of the batch on top. Weights are not counted, nor what libraries allocate inside a layer.

    Args:
        config: the first stage.
        height: H of the pictures.
        width: W of the pictures.
        rows: rows of a band.
        coding: which way.
        batch: how many pictures.
        itemsize: bytes of a number.
    """
    if config.kind == "identity":
        return 0
    pictures = 2 * batch * Sizes(height, width).map(3)  # one by one, then put together
    return itemsize * (max(PHASES[coding](config, height, width, rows)) + pictures)


def plan_rows(
    config: FirstStageModel,
    height: int,
    width: int,
    *,
    budget_bytes: float,
    coding: Coding,
    batch: int = 1,
    itemsize: int = 4,
) -> int:
    """The most rows of a band with which coding stays within a budget; see `peak_bytes` for the arguments.

    Raises:
        ContractError: not even the smallest bands do; the message names the smallest budget that works.
    """

    def need(rows: int) -> int:
        return peak_bytes(config, height, width, rows=rows, coding=coding, batch=batch, itemsize=itemsize)

    least = need(MIN_ROWS)
    if least > budget_bytes:
        raise ContractError(
            f"to {coding} {batch} x {width}x{height} px in bands of {MIN_ROWS} rows, the smallest, needs "
            f"{least / GIB:.4g} GiB of memory beside the weights, got a budget of "
            f"{budget_bytes / GIB:.4g} GiB; give at least {math.ceil(least / GIB * 1000) / 1000:g} GiB"
        )
    low, high = MIN_ROWS, max(height, MIN_ROWS)
    while low < high:  # what is needed grows with the rows
        rows = (low + high + 1) // 2
        low, high = (rows, high) if need(rows) <= budget_bytes else (low, rows - 1)
    return low
