"""From an artifact of shards to batches, by index or in the order of a seed.

A reader's state is one integer, the position in the order: nothing else has to be saved to continue, with any
number of ranks and workers.

Legend: B batch; H W height and width in pixels; C h w channels, height and width of a latent.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from datasets.errors import ConfigError, CorruptionError
from datasets.manifest import FileRecord, Manifest
from datasets.order import SampleOrder
from datasets.recently_used import RecentlyUsed
from datasets.samples import BFLOAT16_BITS, IMAGE_MEMBER, LATENT_MEMBER, decode_image, decode_latent
from datasets.shards import KEY, read_shard
from datasets.store import Store

UNLABELLED = -1
CACHE_BYTES = 1 << 30

_HALF_BITS = np.int32(-0x70002000)  # the sign, and the lower 15 bits of a half 13 places further up
_HALF_BIAS = np.float32(2.0**112)
_SHARD = re.compile(r".+-\d{5,}\.tar")

Layout = tuple[str, tuple[int, ...], str]
"""Field, shape and type of a value."""

Decode = Callable[[Mapping[str, Any]], tuple[np.ndarray, dict[str, Any]]]
DECODERS: dict[str, tuple[str, Decode]] = {
    "latent": (LATENT_MEMBER, decode_latent),
    "image": (IMAGE_MEMBER, decode_image),
}
"""How each field is read, the one first that is read where a sample has both and none is asked for."""


@dataclass(frozen=True)
class DecodedShard:
    """A whole shard in memory: its field, N values of one shape and type, N class labels, N keys, N captions.

    There are no captions unless they were asked for.
    """

    field: str
    values: tuple[np.ndarray, ...]
    class_label: np.ndarray
    keys: tuple[str, ...]
    captions: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """The memory it takes, its keys left out."""
        texts = sum(map(sys.getsizeof, self.captions))
        return len(self.values) * self.values[0].nbytes + self.class_label.nbytes + texts

    @property
    def layout(self) -> Layout:
        """What the shards of a split have in common."""
        return self.field, self.values[0].shape, self.values[0].dtype.str


def _class_label(about: Mapping[str, Any], record: FileRecord) -> int:
    """Return the class of a sample, ``UNLABELLED`` when it states none."""
    label = about.get("class_label")
    if label is None or label == UNLABELLED:
        return UNLABELLED
    if not isinstance(label, int) or label < 0:
        raise CorruptionError(
            f"class labels must be whole numbers from 0, {record.name} has {label!r}; "
            "build its artifact again"
        )
    return label


def _caption(about: Mapping[str, Any], record: FileRecord) -> str:
    """Return the caption of a sample, empty when it states none."""
    caption = about.get("caption") or ""
    if not isinstance(caption, str):
        raise CorruptionError(
            f"captions must be texts, {record.name} has {caption!r}; build its artifact again"
        )
    return caption


def decode_shard(
    data: bytes, record: FileRecord, *, field: str | None = None, captions: bool = False
) -> DecodedShard:
    """Return a shard's samples as arrays.

    Args:
        data: The shard.
        record: What its manifest says of it.
        field: ``"image"`` or ``"latent"``; by default the latent where the first sample has one.
        captions: Whether to keep them.

    Raises:
        CorruptionError: When the shard is damaged, its samples differ in kind or shape, or their number is
            not the record's count.
        ConfigError: When the samples do not have the field asked for.
    """
    samples = list(read_shard(data))
    if len(samples) != record.count:
        raise CorruptionError(
            f"{record.name} must hold {record.count} samples, but holds {len(samples)}; "
            "build its artifact again"
        )
    held = [name for name, (member, _) in DECODERS.items() if samples and member in samples[0]]
    if not held:
        raise CorruptionError(
            f"samples of {record.name} must have a member of {sorted(m for m, _ in DECODERS.values())}, "
            "which its first lacks; build its artifact again"
        )
    field = held[0] if field is None else field
    if field not in held:
        raise ConfigError(
            f"samples of {record.name} must have the field {field!r} that is asked for, but have {held}; "
            "for pictures beside latents, encode with encoding.picture=true"
        )
    _, decode = DECODERS[field]
    decoded = [decode(sample) for sample in samples]
    layouts = {(value.shape, value.dtype.str) for value, _ in decoded}
    if len(layouts) > 1:
        raise CorruptionError(
            f"samples of {record.name} must have one shape and type, got {sorted(layouts)}; "
            "build its artifact again"
        )
    return DecodedShard(
        field=field,
        values=tuple(value for value, _ in decoded),
        class_label=np.array([_class_label(about, record) for _, about in decoded], np.int64),
        keys=tuple(str(sample[KEY]) for sample in samples),
        captions=tuple(_caption(about, record) for _, about in decoded) if captions else (),
    )


def copy_value(target: np.ndarray, value: np.ndarray) -> None:
    """Copy a stored value into its place in a batch; halves and bits of bfloat16 become float32 on the way.

    numpy turns halves into floats one by one. Shifting a half's exponent and fraction to where a float32
    has them leaves a number that is 2^112 times too small, since the biases are 15 and 127; the product is
    exact, also for halves below the normal ones.
    """
    if value.dtype.kind == target.dtype.kind and value.dtype != np.float16:
        target[...] = value
        return
    bits = target.view(np.int32)
    bits[...] = value.view(np.int16)
    if value.dtype == BFLOAT16_BITS:
        bits <<= 16
        return
    bits <<= 13
    bits &= _HALF_BITS
    target *= _HALF_BIAS


class SampleReader:
    """The samples of one split of an artifact of image or latent shards, by index; threads may share it.

    Shards are verified and decoded whole, each by one thread, and kept in memory, the most recently used
    first, within a bound.

    Args:
        store: Where the artifact lies.
        manifest: The artifact; its shards are named ``<split>-00000.tar`` and on, and state their counts.
        split: ``"train"`` or ``"held_out"``, or whatever else the artifact holds.
        field: ``"image"`` or ``"latent"``; by default the latent where there is one. Two readers of one
            artifact give latents and the pictures beside them under the same indices.
        captions: Whether to read captions too.
        cache_bytes: The bound on decoded shards; the one in use is kept even if it is larger.

    Raises:
        ConfigError: When the artifact has no such split, or no sample in it.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        *,
        split: str,
        field: str | None = None,
        captions: bool = False,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._field, self._captions = field, captions
        shards = [record for record in manifest.content.files if _SHARD.fullmatch(record.name)]
        wanted = [record for record in shards if record.name.rpartition("-")[0] == split]
        self._records = sorted((record for record in wanted if record.count), key=lambda record: record.name)
        if not self._records:
            splits = sorted({record.name.rpartition("-")[0] for record in shards})
            raise ConfigError(
                f"split must name samples of {manifest.stage} {manifest.short}, which has {splits}, "
                f"got {split!r}; choose one of them, or build an artifact that has it"
            )
        self.shard_sizes = tuple(record.count or 0 for record in self._records)
        self._ends = np.cumsum(self.shard_sizes)
        self._starts = self._ends - np.asarray(self.shard_sizes, np.int64)
        self._shards = RecentlyUsed(self._decoded, max_bytes=cache_bytes)
        self._order = lru_cache(maxsize=2)(lambda seed: SampleOrder(seed, self.shard_sizes))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def fetch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """Return the samples of the indices, in their order; one may come more than once.

        Returns:
            ``image`` uint8 (B, H, W, 3), or ``latent`` float32 (B, C, h, w) as it was stored, not scaled;
            ``class_label`` int64 (B,), -1 where there is none; ``key`` list of B str; ``caption`` list of B
            str, empty where there is none, for a reader of captions.

        Raises:
            IndexError: When an index is not below the number of samples.
            CorruptionError: When a shard is not what the manifest says.
        """
        wanted = np.asarray(indices, np.int64).reshape(-1)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(
                f"indices must be 0 to {len(self) - 1}, got {wanted.min()} to {wanted.max()}; "
                "draw them with sample_order and this reader's shard_sizes"
            )
        shards = np.searchsorted(self._ends, wanted, side="right")
        rows = wanted - self._starts[shards]
        needed = set(shards.tolist()) or {0}
        layout = self._shards.get(self._shards.next_of(needed)).layout
        field, shape, dtype = layout
        values = np.empty((wanted.size, *shape), np.float32 if field == "latent" else dtype)
        labels = np.empty(wanted.size, np.int64)
        keys, captions = [""] * wanted.size, [""] * wanted.size
        while needed:
            shard = self._shards.next_of(needed)
            needed.remove(shard)
            decoded = self._shards.get(shard)
            self._require_alike(layout, decoded, shard)
            places = np.flatnonzero(shards == shard)
            labels[places] = decoded.class_label[rows[places]]
            for place, row in zip(places.tolist(), rows[places].tolist(), strict=True):
                copy_value(values[place], decoded.values[row])
                keys[place] = decoded.keys[row]
                if self._captions:
                    captions[place] = decoded.captions[row]
        told = {"caption": captions} if self._captions else {}
        return {field: values, "class_label": labels, "key": keys, **told}

    def in_order(self, seed: int, *, position: int, count: int) -> dict[str, Any]:
        """Return the `count` samples from `position` on of the endless seeded order, like ``fetch``."""
        return self.fetch(self._order(seed).part(position, count))

    def _decoded(self, shard: int) -> tuple[DecodedShard, int]:
        """Return a shard, verified and decoded, and the memory it takes."""
        record = self._records[shard]
        data = self._store.read_cached(self._manifest, record.name)
        decoded = decode_shard(data, record, field=self._field, captions=self._captions)
        return decoded, decoded.num_bytes

    def _require_alike(self, layout: Layout, decoded: DecodedShard, shard: int) -> None:
        if decoded.layout != layout:
            raise CorruptionError(
                f"all shards of a split must hold one kind and shape, but {self._records[shard].name} holds "
                f"{decoded.layout} beside {layout}; build their artifact again"
            )
