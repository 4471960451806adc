"""Laws of the order of samples and of reading them by index."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import datasets.order
from datasets.errors import ConfigError, CorruptionError
from datasets.keys import sha256_hex
from datasets.manifest import Content, FileRecord, Manifest
from datasets.order import SampleOrder, sample_order
from datasets.samples import encode_image, encode_latent, encode_png, from_bfloat16_bits
from datasets.shards import write_shard
from datasets.store import Store
from datasets.stream import SampleReader, copy_value

STAGE = "download-shards"
KEY = sha256_hex(b"key")

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any)
seeds = st.integers(0, 2**63)
blocks = st.integers(1, 5)


def order(seed: int, shard_sizes, *, position: int, count: int, block_shards: int = 4) -> list[int]:
    found = sample_order(
        seed,
        sum(shard_sizes),
        position=position,
        count=count,
        shard_sizes=shard_sizes,
        block_shards=block_shards,
    )
    assert found.dtype == np.int64
    assert found.shape == (count,)
    return found.tolist()


@settings(deadline=None, max_examples=50)
@given(seeds, sizes, blocks, st.integers(0, 10**12))
def test_every_epoch_is_an_exact_permutation(seed, shard_sizes, block_shards, epoch) -> None:
    total = sum(shard_sizes)
    found = order(seed, shard_sizes, position=epoch * total, count=total, block_shards=block_shards)
    assert sorted(found) == list(range(total))


@settings(deadline=None, max_examples=50)
@given(seeds, sizes, blocks, st.integers(0, 60), st.integers(0, 60))
def test_a_slice_from_any_position_is_the_uninterrupted_order(
    seed, shard_sizes, block_shards, position, count
) -> None:
    whole = order(seed, shard_sizes, position=0, count=120, block_shards=block_shards)
    part = order(seed, shard_sizes, position=position, count=count, block_shards=block_shards)
    assert part == whole[position : position + count]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 30), max_size=9))
def test_any_cutting_into_batches_gives_one_order(batches: list[int]) -> None:
    shard_sizes, position, found = (5, 4, 6, 3), 7, []
    for count in batches:
        found += order(1, shard_sizes, position=position, count=count)
        position += count
    assert found == order(1, shard_sizes, position=7, count=sum(batches))


@settings(deadline=None, max_examples=50)
@given(seeds, sizes, blocks, st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), max_size=9))
def test_an_order_that_is_kept_answers_like_one_that_is_not(seed, shard_sizes, block_shards, calls) -> None:
    kept = SampleOrder(seed, shard_sizes, block_shards=block_shards)
    for position, count in calls:
        found = kept.part(position, count).tolist()
        assert found == order(seed, shard_sizes, position=position, count=count, block_shards=block_shards)


def test_an_order_that_is_kept_draws_nothing_twice(monkeypatch) -> None:
    drawn = []

    def draw(size: int, **named) -> np.ndarray:
        drawn.append((size, *named.values()))
        return drawn_by(size, **named)

    drawn_by = datasets.order.permutation
    monkeypatch.setattr(datasets.order, "permutation", draw)
    kept = SampleOrder(0, (5,) * 12)
    for position in range(0, 120, 3):  # two epochs of three blocks
        kept.part(position, 3)
    assert len(drawn) == len(set(drawn)) == 2 * (1 + 3)


def test_seeds_and_epochs_differ() -> None:
    shard_sizes = (50,) * 6
    epochs = [order(seed, shard_sizes, position=300 * e, count=300) for seed in (0, 1) for e in (0, 1)]
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_block_of_the_order_reads_no_more_shards_than_it_says() -> None:
    found = np.array(order(3, (50,) * 12, position=0, count=600, block_shards=3))
    for block in found.reshape(4, 150):
        assert len(set((block // 50).tolist())) == 3


def test_samples_of_a_block_are_mixed_evenly() -> None:
    # The mean rank of 100 samples in a block of n = 400 is that of the uniform, sigma = n / sqrt(12 * 100).
    found = np.array(order(0, (100,) * 4, position=0, count=400))
    for shard in range(4):
        ranks = np.flatnonzero(found // 100 == shard)
        assert abs(ranks.mean() - 199.5) < 4 * 400 / np.sqrt(1200)


def test_the_order_is_the_same_in_every_version() -> None:
    # python -c "from datasets.order import *;
    #   print(sample_order(7, 12, position=10, count=8, shard_sizes=(5, 4, 3), block_shards=2))"
    assert order(7, (5, 4, 3), position=10, count=8, block_shards=2) == [10, 9, 5, 10, 7, 9, 11, 8]


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_samples": 11},
        {"num_samples": 0, "shard_sizes": ()},
        {"num_samples": 2, "shard_sizes": (3, -1)},
        {"position": -1},
        {"count": -1},
        {"block_shards": 0},
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(wrong: dict) -> None:
    named = {
        "num_samples": 12,
        "position": 0,
        "count": 1,
        "shard_sizes": (5, 4, 3),
        "block_shards": 4,
    } | wrong
    with pytest.raises(ValueError, match="must be"):
        sample_order(0, named.pop("num_samples"), **named)


def picture(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (6, 5, 3), np.uint8)


def latent(index: int) -> np.ndarray:
    return np.random.default_rng(index).standard_normal((8, 3, 2)).astype(np.float32)


def image_sample(index: int):
    about = {"class_label": index % 15 if index % 4 else (None, -1)[index // 4 % 2]}
    return encode_image(f"{index:09d}", picture(index), about=about)


def latent_sample(index: int):
    return encode_latent(f"{index:09d}", latent(index), about={"class_label": index % 15})


def artifact(store: Store, shards: dict[str, list], *, miscounted: int = 0) -> Manifest:
    files = tuple(
        store.put(STAGE, KEY, f"{name}.tar", write_shard(samples), count=len(samples) + miscounted)
        for name, samples in shards.items()
    )
    return store.commit(
        Content(stage=STAGE, key=KEY, code_version=1, what={}, parents={}, files=files, statistics={}), {}
    )


def split_of(make, split: str = "train", counts: tuple[int, ...] = (4, 3, 5)) -> dict[str, list]:
    shards, index = {}, 0
    for number, count in enumerate(counts):
        shards[f"{split}-{number:05d}"] = [make(i) for i in range(index, index + count)]
        index += count
    return shards


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 11), max_size=20), st.sampled_from([0, 600, 1 << 30]))
def test_pictures_come_in_the_order_asked_whatever_is_cached(tmp_path_factory, indices, cache_bytes) -> None:
    store = Store(tmp_path_factory.getbasetemp() / "pictures")
    manifest = store.find(STAGE, KEY) or artifact(store, split_of(image_sample))
    batch = SampleReader(store, manifest, split="train", cache_bytes=cache_bytes).fetch(indices)
    assert batch.keys() == {"image", "class_label", "key"}
    assert (batch["image"].dtype, batch["image"].shape) == (np.uint8, (len(indices), 6, 5, 3))
    assert batch["key"] == [f"{i:09d}" for i in indices]
    assert batch["class_label"].dtype == np.int64
    assert batch["class_label"].tolist() == [i % 15 if i % 4 else -1 for i in indices]
    for row, index in enumerate(indices):
        np.testing.assert_array_equal(batch["image"][row], picture(index))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_latents_come_as_stored_in_float32(store, dtype) -> None:
    samples = [encode_latent(f"{i:09d}", latent(i).astype(dtype), about={"class_label": i}) for i in range(4)]
    batch = SampleReader(store, artifact(store, {"train-00000": samples}), split="train").fetch([3, 1])
    assert batch.keys() == {"latent", "class_label", "key"}
    assert batch["latent"].dtype == np.float32
    np.testing.assert_array_equal(batch["latent"], np.stack([latent(3), latent(1)]).astype(dtype))


def test_every_finite_half_becomes_the_same_number() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    found = np.empty(len(halves), np.float32)
    copy_value(found, halves)
    assert len(halves) == 2 * 31 * 1024
    np.testing.assert_array_equal(found.view(np.int32), halves.astype(np.float32).view(np.int32))


def test_every_bfloat16_becomes_the_number_it_stands_for(store) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    finite = bits[np.isfinite(from_bfloat16_bits(bits))]
    sample = encode_latent("a", finite.reshape(1, 2, -1), about={})
    batch = SampleReader(store, artifact(store, {"train-00000": [sample]}), split="train").fetch([0])
    assert batch["latent"].dtype == np.float32
    found = batch["latent"].reshape(-1).view(np.uint32)
    np.testing.assert_array_equal(found, finite.astype(np.uint32) << 16)


def test_of_latents_with_pictures_either_is_read_by_one_index(store) -> None:
    samples = [
        encode_latent(f"{i:09d}", latent(i), about={"class_label": i}, picture=encode_png(picture(i)))
        for i in range(4)
    ]
    manifest = artifact(store, {"train-00000": samples})
    latents = SampleReader(store, manifest, split="train").in_order(7, position=1, count=3)
    pictures = SampleReader(store, manifest, split="train", field="image").in_order(7, position=1, count=3)
    assert latents["key"] == pictures["key"]
    for row, key in enumerate(latents["key"]):
        np.testing.assert_array_equal(latents["latent"][row], latent(int(key)))
        np.testing.assert_array_equal(pictures["image"][row], picture(int(key)))


def test_a_field_that_samples_lack_is_told(store) -> None:
    manifest = artifact(store, {"train-00000": [encode_latent("a", latent(0), about={})]})
    with pytest.raises(ConfigError, match=r"have the field 'image' that is asked for, but have \['latent'\]"):
        SampleReader(store, manifest, split="train", field="image").fetch([0])


def test_an_epoch_through_the_reader_holds_every_sample_once(store) -> None:
    reader = SampleReader(store, artifact(store, split_of(latent_sample)), split="train", cache_bytes=0)
    assert (len(reader), reader.shard_sizes) == (12, (4, 3, 5))
    indices = sample_order(5, len(reader), position=12, count=12, shard_sizes=reader.shard_sizes)
    keys = [key for start in range(0, 12, 5) for key in reader.fetch(indices[start : start + 5])["key"]]
    assert sorted(keys) == [f"{i:09d}" for i in range(12)]


def test_a_split_is_read_alone_and_an_unknown_one_is_told_with_those_there_are(store) -> None:
    shards = split_of(image_sample) | {"held_out-00000": [image_sample(99)], "empty-00000": []}
    manifest = artifact(store, shards)
    held_out = SampleReader(store, manifest, split="held_out")
    assert len(held_out) == 1
    assert held_out.fetch([0])["key"] == ["000000099"]
    for split in ("validation", "empty"):
        with pytest.raises(ConfigError, match=rf"\['empty', 'held_out', 'train'\], got '{split}'"):
            SampleReader(store, manifest, split=split)


@pytest.mark.parametrize("index", [-1, 12])
def test_an_index_out_of_range_is_refused(store, index: int) -> None:
    reader = SampleReader(store, artifact(store, split_of(image_sample)), split="train")
    with pytest.raises(IndexError, match="must be 0 to 11"):
        reader.fetch([0, index])


class CountingStore(Store):
    """A store that keeps the names of what was read."""

    def __init__(self, uri) -> None:
        super().__init__(uri)
        self.names: list[str] = []

    def read(self, manifest: Manifest, name: str) -> bytes:
        self.names.append(name)
        return super().read(manifest, name)


@pytest.mark.parametrize(("num_kept", "read"), [(3, "012"), (2, "01210"), (1, "010210"), (0, "010210")])
def test_the_shards_kept_decoded_are_the_last_used_within_the_bound(tmp_path, num_kept, read) -> None:
    store = CountingStore(tmp_path)
    manifest = artifact(store, split_of(image_sample, counts=(4, 4, 4)))
    shard_bytes = 4 * (6 * 5 * 3 + 8)
    reader = SampleReader(store, manifest, split="train", cache_bytes=num_kept * shard_bytes)
    for index in (0, 4, 1, 8, 5, 2):  # of shards 0, 1, 0, 2, 1, 0
        reader.fetch([index])
    assert store.names == [f"train-0000{shard}.tar" for shard in read]


def test_a_remote_artifact_is_read_alike(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("memory://stream")
    reader = SampleReader(store, artifact(store, split_of(image_sample)), split="train")
    assert reader.fetch([11, 0])["key"] == ["000000011", "000000000"]


def test_a_count_that_is_not_the_shards_is_refused(store) -> None:
    reader = SampleReader(store, artifact(store, split_of(image_sample), miscounted=1), split="train")
    with pytest.raises(CorruptionError, match=r"train-00000\.tar must hold 5 samples, but holds 4"):
        reader.fetch([0])


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ({"train-00000": [image_sample(0), latent_sample(1)]}, "must have a member 'png'"),
        ({"train-00000": [image_sample(0)], "train-00001": [latent_sample(1)]}, "hold one kind and shape"),
        (
            {"train-00000": [image_sample(0), encode_image("b", picture(0)[:3], about={})]},
            "must have one shape and type",
        ),
        ({"train-00000": [{"__key__": "a", "txt": b"text"}]}, r"must have a member of \['npy', 'png'\]"),
        (
            {"train-00000": [encode_image("a", picture(0), about={"class_label": "x"})]},
            "whole numbers from 0",
        ),
        (
            {"train-00000": [encode_image("a", picture(0), about={"class_label": 1.5})]},
            "whole numbers from 0",
        ),
    ],
)
def test_shards_that_do_not_fit_together_are_refused(store, shards: dict, message: str) -> None:
    reader = SampleReader(store, artifact(store, shards), split="train")
    with pytest.raises(CorruptionError, match=message):
        reader.fetch(range(len(reader)))


def test_a_record_without_a_count_is_no_shard_of_a_split(store) -> None:
    record = store.put(STAGE, KEY, "train-00000.tar", write_shard([image_sample(0)]))
    assert record == FileRecord(record.name, record.path, record.bytes, record.sha256)
    manifest = store.commit(
        Content(stage=STAGE, key=KEY, code_version=1, what={}, parents={}, files=(record,), statistics={}), {}
    )
    with pytest.raises(ConfigError, match="got 'train'"):
        SampleReader(store, manifest, split="train")
