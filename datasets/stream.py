"""From an artifact of shards to batches, in an order that is a pure function of seed and position.

A reader's state is one integer, the position in the order: nothing else has to be saved to continue, with any
number of ranks and workers.

Legend: B batch; H W height and width in pixels; C h w channels, height and width of a latent.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from datasets.errors import ConfigError, CorruptionError
from datasets.keys import canonical_json, sha256_hex
from datasets.manifest import FileRecord, Manifest
from datasets.samples import IMAGE_MEMBER, LATENT_MEMBER, decode_image, decode_latent
from datasets.shards import KEY, read_shard
from datasets.store import Store

UNLABELLED = -1
CACHE_BYTES = 1 << 30

Decode = Callable[[Mapping[str, Any]], tuple[np.ndarray, dict[str, Any]]]
DECODERS: dict[str, tuple[str, Decode]] = {
    IMAGE_MEMBER: ("image", decode_image),
    LATENT_MEMBER: ("latent", decode_latent),
}


def sample_order(
    seed: int,
    num_samples: int,
    *,
    position: int,
    count: int,
    shard_sizes: Sequence[int],
    block_shards: int = 4,
) -> np.ndarray:
    """Return ``count`` sample indices from a position on, of an endless order of exact epochs.

    In each epoch the shards are permuted and cut into blocks, and the samples of each block are permuted: a
    shuffle that needs ``block_shards`` decoded shards at a time, give or take one block's border.

    Args:
        seed: Names the order.
        num_samples: Samples in all, the sum of ``shard_sizes``.
        position: Samples before the first one returned, 0 or more, over all epochs.
        count: How many to return; they may span epochs.
        shard_sizes: Samples in each shard; shard 0 holds the first indices, and so on.
        block_shards: Shards per block.

    Returns:
        int64 (count,) indices below ``num_samples``.

    Raises:
        ValueError: When a number is out of range or the sizes do not sum to ``num_samples``.
    """
    if num_samples < 1 or sum(shard_sizes) != num_samples or min(shard_sizes) < 0:
        raise ValueError(
            f"num_samples ({num_samples}) must be at least 1 and the sum of shard_sizes "
            f"({sum(shard_sizes)}); take both from one reader"
        )
    if position < 0 or count < 0 or block_shards < 1:
        raise ValueError(
            "position and count must be 0 or more and block_shards 1 or more, "
            f"got {position}, {count} and {block_shards}; correct the call"
        )
    parts: list[np.ndarray] = []
    while count > 0:
        epoch, start = divmod(position, num_samples)
        stop = min(start + count, num_samples)
        parts += _epoch_part(
            int(seed), epoch, start=start, stop=stop, shard_sizes=shard_sizes, block_shards=block_shards
        )
        position += stop - start
        count -= stop - start
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _permutation(size: int, **named: int | str) -> np.ndarray:
    """Return a permutation of ``range(size)`` that depends on the names alone.

    Philox's raw words are sorted, since numpy promises those for good, but not how ``permutation`` uses them.
    """
    key = int(sha256_hex(canonical_json(named))[:32], 16)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")


def _epoch_part(
    seed: int, epoch: int, *, start: int, stop: int, shard_sizes: Sequence[int], block_shards: int
) -> list[np.ndarray]:
    """Return the pieces, block by block, of one epoch's order between two offsets."""
    ends = list(accumulate(shard_sizes))
    shards = _permutation(len(ends), purpose="shards", seed=seed, epoch=epoch).tolist()
    pieces: list[np.ndarray] = []
    block_start = 0
    for block, begin in enumerate(range(0, len(shards), block_shards)):
        members = shards[begin : begin + block_shards]
        block_stop = block_start + sum(shard_sizes[shard] for shard in members)
        if block_start < stop and block_stop > start:
            runs = [np.arange(ends[shard] - shard_sizes[shard], ends[shard]) for shard in members]
            indices = np.concatenate(runs)
            order = _permutation(len(indices), purpose="samples", seed=seed, epoch=epoch, block=block)
            pieces.append(indices[order][max(start - block_start, 0) : stop - block_start])
        block_start = block_stop
    return pieces


@dataclass(frozen=True)
class DecodedShard:
    """A whole shard in memory: its field's name and values (N, ...), class labels (N,) and N keys."""

    field: str
    values: np.ndarray
    class_label: np.ndarray
    keys: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """The memory it takes, its keys left out."""
        return self.values.nbytes + self.class_label.nbytes


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


def decode_shard(data: bytes, record: FileRecord) -> DecodedShard:
    """Return a shard's samples as arrays; pictures or latents is seen from its first sample's members.

    Raises:
        CorruptionError: When the shard is damaged, its samples differ in kind or shape, or their number is
            not the record's count.
    """
    samples = list(read_shard(data))
    if len(samples) != record.count:
        raise CorruptionError(
            f"{record.name} must hold {record.count} samples, but holds {len(samples)}; "
            "build its artifact again"
        )
    member = next((member for member in DECODERS if samples and member in samples[0]), None)
    if member is None:
        raise CorruptionError(
            f"samples of {record.name} must have a member of {sorted(DECODERS)}, which its first lacks; "
            "build its artifact again"
        )
    field, decode = DECODERS[member]
    decoded = [decode(sample) for sample in samples]
    layouts = {(value.shape, value.dtype.str) for value, _ in decoded}
    if len(layouts) > 1:
        raise CorruptionError(
            f"samples of {record.name} must have one shape and type, got {sorted(layouts)}; "
            "build its artifact again"
        )
    return DecodedShard(
        field=field,
        values=np.stack([value for value, _ in decoded]),
        class_label=np.array([_class_label(about, record) for _, about in decoded], np.int64),
        keys=tuple(str(sample[KEY]) for sample in samples),
    )


class SampleReader:
    """The samples of one split of an artifact of image or latent shards, by index; one reader per thread.

    Shards are verified and decoded whole, and kept in memory, the most recently used first, within a bound.

    Args:
        store: Where the artifact lies.
        manifest: The artifact; its shards are named ``<split>-00000.tar`` and on, and state their counts.
        split: ``"train"`` or ``"held_out"``, or whatever else the artifact holds.
        cache_bytes: The bound on decoded shards; the one in use is kept even if it is larger.

    Raises:
        ConfigError: When the artifact has no such split, or no sample in it.
    """

    def __init__(
        self, store: Store, manifest: Manifest, *, split: str, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._cache_bytes = cache_bytes
        self._decoded: OrderedDict[int, DecodedShard] = OrderedDict()
        shards = [record for record in manifest.content.files if re.fullmatch(r".+-\d{5,}\.tar", record.name)]
        wanted = [record for record in shards if record.name.rpartition("-")[0] == split]
        self._records = sorted((record for record in wanted if record.count), key=lambda record: record.name)
        if not self._records:
            splits = sorted({record.name.rpartition("-")[0] for record in shards})
            raise ConfigError(
                f"split must name samples of {manifest.stage} {manifest.short}, which has {splits}, "
                f"got {split!r}; choose one of them, or build an artifact that has it"
            )
        self._ends = np.cumsum(self.shard_sizes)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples in each shard, as ``sample_order`` takes them."""
        return tuple(record.count or 0 for record in self._records)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def fetch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """Return the samples of the indices, in their order; one may come more than once.

        Returns:
            ``image`` uint8 (B, H, W, 3), or ``latent`` float32 (B, C, h, w) as it was stored, not scaled;
            ``class_label`` int64 (B,), -1 where there is none; ``key`` list of B str.

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
        rows = wanted - (self._ends[shards] - np.asarray(self.shard_sizes)[shards])
        first = self._shard(int(shards[0]) if wanted.size else 0)
        values = np.empty((wanted.size, *first.values.shape[1:]), first.values.dtype)
        labels = np.empty(wanted.size, np.int64)
        keys = [""] * wanted.size
        for shard in dict.fromkeys(shards.tolist()):
            decoded = self._shard(shard)
            self._require_alike(first, decoded, shard)
            places = np.flatnonzero(shards == shard)
            values[places] = decoded.values[rows[places]]
            labels[places] = decoded.class_label[rows[places]]
            for place in places:
                keys[place] = decoded.keys[rows[place]]
        if first.field == "latent":
            values = values.astype(np.float32, copy=False)
        return {first.field: values, "class_label": labels, "key": keys}

    def in_order(self, seed: int, *, position: int, count: int) -> dict[str, Any]:
        """Return the `count` samples from `position` on of the endless seeded order, like ``fetch``."""
        order = sample_order(seed, len(self), position=position, count=count, shard_sizes=self.shard_sizes)
        return self.fetch(order)

    def _shard(self, shard: int) -> DecodedShard:
        """Return a decoded shard, from memory if it is there."""
        if shard in self._decoded:
            self._decoded.move_to_end(shard)
            return self._decoded[shard]
        record = self._records[shard]
        if self._store.is_local:
            data = self._store.read(self._manifest, record.name)
        else:
            data = self._store.local_file(self._manifest, record.name).read_bytes()
        decoded = decode_shard(data, record)
        self._decoded[shard] = decoded
        held_bytes = sum(held.num_bytes for held in self._decoded.values())
        while held_bytes > self._cache_bytes and len(self._decoded) > 1:
            held_bytes -= self._decoded.popitem(last=False)[1].num_bytes
        return decoded

    def _require_alike(self, first: DecodedShard, other: DecodedShard, shard: int) -> None:
        if (first.field, first.values.shape[1:], first.values.dtype) != (
            other.field,
            other.values.shape[1:],
            other.values.dtype,
        ):
            raise CorruptionError(
                f"all shards of a split must hold one kind and shape, but {self._records[shard].name} holds "
                f"{other.field} {other.values.shape[1:]} beside {first.field} {first.values.shape[1:]}; "
                "build their artifact again"
            )
