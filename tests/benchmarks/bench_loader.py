"""Reading latents: against webdataset, start-up with many shards, resuming anywhere, quality of the shuffle.

Samples per CPU second on one thread, in rounds of ours, theirs, ours, theirs. LDM_BENCH_SAMPLES sets how many
samples a round reads; LDM_BENCH_STORE_FOLDER where the shards are written (a temporary folder by default).
"""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from datasets.keys import sha256_hex
from datasets.loader import Loader
from datasets.manifest import Content, Manifest
from datasets.order import SampleOrder
from datasets.samples import encode_latent
from datasets.shards import write_shard
from datasets.store import Store
from datasets.stream import SampleReader

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600)]

STAGE, KEY = "encode-latents", sha256_hex(b"bench loader")
SHARD_SAMPLES, NUM_SHARDS, BATCH = 1000, 20, 64
MANY = 40_000
STEP_S = 0.01
NUM_SAMPLES = int(os.environ.get("LDM_BENCH_SAMPLES", "40000"))
LAYOUTS = {"64x64x3 fp16": ((3, 64, 64), np.float16), "32x32x4 fp32": ((4, 32, 32), np.float32)}
LAYOUTS |= {"32x32x4 fp16": ((4, 32, 32), np.float16)}
"""name -> shape (C, h, w) and type"""


def latent_shards(store: Store, shape: tuple[int, ...], dtype: type) -> Manifest:
    """Random latents in shards, stored as encode-latents does."""
    rng, files = np.random.default_rng(0), []
    for shard in range(NUM_SHARDS):
        samples = [
            encode_latent(
                f"{index:09d}", rng.standard_normal(shape).astype(dtype), about={"class_label": index % 1000}
            )
            for index in range(shard * SHARD_SAMPLES, (shard + 1) * SHARD_SAMPLES)
        ]
        data = write_shard(samples)
        files.append(store.put(STAGE, KEY, f"train-{shard:05d}.tar", data, count=SHARD_SAMPLES))
    return store.commit(Content(STAGE, KEY, 1, what={}, parents={}, files=tuple(files)), {})


def read_ours(store: Store, manifest: Manifest) -> None:
    """Batches in shuffled order; the cache holds a block of shards and one more, so each epoch reads all."""
    shard_bytes = manifest.num_bytes // NUM_SHARDS
    reader = SampleReader(store, manifest, split="train", cache_bytes=5 * shard_bytes)
    for position in range(0, NUM_SAMPLES, BATCH):
        batch = reader.in_order(0, position=position, count=BATCH)
        assert batch["latent"].dtype == np.float32


def read_theirs(paths: list[str]) -> None:
    """Samples one by one in the order of storage, of the type stored, not verified, shuffled or batched."""
    import webdataset

    left = NUM_SAMPLES
    while left > 0:
        stream = webdataset.WebDataset(paths, shardshuffle=False).decode().to_tuple("npy", "json")
        for latent, about in stream:
            assert latent.ndim == 3
            assert about["class_label"] >= 0
            left -= 1
            if not left:
                break


def many_shards(root: Path, *, num_shards: int) -> None:
    """An artifact of many shards that share the bytes of one."""
    store, files = Store(root), []
    rng = np.random.default_rng(0)
    samples = [
        encode_latent(
            f"{index:09d}", rng.standard_normal((4, 32, 32)).astype(np.float32), about={"class_label": 0}
        )
        for index in range(SHARD_SAMPLES)
    ]
    data = write_shard(samples)
    first = store.put(STAGE, KEY, "one.tar", data, count=SHARD_SAMPLES)
    folder = root / STAGE / KEY[:16]
    for shard in range(num_shards):
        path = f"train-{shard:05d}-{first.sha256[:12]}.tar"
        (folder / path).hardlink_to(folder / first.path)
        files.append(dataclasses.replace(first, name=f"train-{shard:05d}.tar", path=path))
    store.commit(Content(STAGE, KEY, 1, what={}, parents={}, files=tuple(files)), {})


START_UP = f"""
import sys, time
from datasets.store import Store
from datasets.stream import SampleReader
import fsspec.implementations.local

def mib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024

before, started = mib("VmRSS"), time.perf_counter()
store = Store(sys.argv[1])
reader = SampleReader(store, store.find("{STAGE}", "{KEY}"), split="train")
took, above = time.perf_counter() - started, mib("VmHWM") - before
reader.in_order(0, position=0, count={BATCH})
print(took, time.perf_counter() - started, above)
"""


def test_start_up_and_resume_with_many_shards(tmp_path: Path) -> None:
    many_shards(tmp_path, num_shards=MANY)
    command = [sys.executable, "-c", START_UP, str(tmp_path)]
    runs = [
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() for _ in range(5)
    ]
    start_s, batch_s, above_mib = (median(float(run[i]) for run in runs) for i in range(3))
    store = Store(tmp_path)
    manifest = store.find(STAGE, KEY)
    assert manifest is not None
    rng, resumes = np.random.default_rng(0), []
    num_samples = MANY * SHARD_SAMPLES
    for _ in range(15):
        position = int(rng.integers(100 * num_samples))
        started = time.perf_counter()
        reader = SampleReader(store, manifest, split="train")
        reader.in_order(0, position=position, count=BATCH)
        resumes.append(time.perf_counter() - started)
    order = SampleOrder(0, (SHARD_SAMPLES,) * MANY)
    order.part(0, 1)
    started = time.perf_counter()
    for step in range(200):
        order.part(step * BATCH, BATCH)
    step_us = (time.perf_counter() - started) / 200 * 1e6
    print(
        f"\n{MANY} shards: start {start_s:.2f} s and {above_mib:.0f} MiB above the imports, first batch "
        f"after {batch_s:.2f} s; resume anywhere {median(resumes):.2f} s (max {max(resumes):.2f}); "
        f"order {step_us:.0f} us a step"
    )
    assert start_s < 2
    assert above_mib < 300
    assert median(resumes) < 1


def cpu_s(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.filterwarnings("ignore")
def test_samples_per_second_against_webdataset(name: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    manifest = latent_shards(store, *LAYOUTS[name])
    folder = tmp_path / STAGE / KEY[:16]
    paths = [str(folder / record.path) for record in manifest.content.files]
    works = (lambda: read_ours(store, manifest), lambda: read_theirs(paths))
    for work in works:
        work()
    rounds = [[NUM_SAMPLES / cpu_s(work) for work in works] for _ in range(5)]
    ours, theirs = (median(rates) for rates in zip(*rounds, strict=True))
    ratios = [a / b for a, b in rounds]
    print(
        f"\n{name}: {ours:,.0f} samples/s of a core, webdataset {theirs:,.0f}, "
        f"ratio {median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f}), {NUM_SAMPLES} samples a round"
    )
    assert median(ratios) >= 3


def test_reading_ahead_hides_reading(tmp_path: Path) -> None:
    manifest, num_batches = latent_shards(Store(tmp_path), *LAYOUTS["64x64x3 fp16"]), 200
    waits = {}
    for num_workers in (0, 1, 2):
        reader = SampleReader(Store(tmp_path), manifest, split="train")
        loader = Loader(reader, 0, batch_size=BATCH, num_workers=num_workers)
        batches, waited = loader.batches(num_batches=num_batches), 0.0
        for _ in range(num_batches):
            started = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - started
            time.sleep(STEP_S)
        waits[num_workers] = waited / num_batches * 1e3
    print(f"\nms a step of {STEP_S * 1e3:g} ms waits for its batch of {BATCH}, by workers:", end="")
    print("".join(f"  {num_workers}: {wait:.2f}" for num_workers, wait in waits.items()))


def entropy_bits(labels: np.ndarray) -> float:
    """Entropy of the classes of a batch."""
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(shares * np.log2(shares)).sum())


def test_quality_of_the_shuffle() -> None:
    num_shards, num_classes, batch = 200, 100, 256
    num_samples = num_shards * SHARD_SAMPLES
    rng, sizes = np.random.default_rng(0), (SHARD_SAMPLES,) * num_shards
    ours = [SampleOrder(seed, sizes).part(0, num_samples) for seed in range(9)]
    ideal = [rng.permutation(num_samples) for _ in ours]
    print(f"\n{num_samples} samples in {num_shards} shards, {num_classes} classes, batches of {batch}")
    correlations = [
        median(abs(float(np.corrcoef(np.arange(num_samples), order)[0, 1])) for order in orders)
        for orders in (ours, ideal)
    ]
    print("  rank correlation of storage and training order, median of 9 seeds: ", end="")
    print("{:.4f}, perfect shuffle {:.4f}".format(*correlations))
    stored = {"in any order": rng.integers(num_classes, size=num_samples)}
    stored["sorted by class"] = np.arange(num_samples) * num_classes // num_samples
    for name, labels in stored.items():
        bits = [
            float(
                np.mean([entropy_bits(part) for part in np.array_split(labels[order], num_samples // batch)])
            )
            for order in (ours[0], ideal[0])
        ]
        print(f"  stored {name}: class entropy of a batch {bits[0]:.3f} bits, perfect shuffle {bits[1]:.3f}")
        if name == "in any order":
            assert bits[0] > 0.99 * bits[1]
    assert correlations[0] < 0.2
