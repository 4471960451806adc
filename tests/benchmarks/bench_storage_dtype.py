"""What the type of stored latents costs: bytes of a picture against PSNR and rFID of its reconstruction.

Reads the first stage of a recipe (BENCH_RECIPE) from the store that BENCH_STORE names, else a tiny one of
the tests. Pictures are the first held-out ones (BENCH_IMAGES of them, 400 by default). Each is encoded once,
stored in every type, read back and decoded; rFID is between reconstructions and their own originals.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets.samples import decode_latent, encode_latent
from datasets.shards import KEY, read_shard, write_shard
from datasets.store import Store
from datasets.stream import SampleReader, copy_value
from flows.preflight import find_shards
from ldm.device import home
from ldm.encoding import as_stored, encode
from ldm.evaluation import reconstruction
from ldm.evaluation.features import distance, kept_features
from ldm.evaluation.sets import nchw
from ldm.model import load_first_stage
from ldm.models.first_stage import FirstStage, decode_in_micro_batches
from ldm.range import to_uint8
from ldm.recipe import load_recipe
from ldm.stages import STAGES

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600)]

DTYPES = ("float32", "float16", "bfloat16")
MICRO_BATCH = 25


@pytest.fixture
def trained(request: pytest.FixtureRequest) -> tuple[FirstStage, np.ndarray, str]:
    """A first stage, pictures (N, H, W, 3) that it has not seen, and its name."""
    if "BENCH_STORE" in os.environ:
        store, recipe = (
            Store(os.environ["BENCH_STORE"]),
            load_recipe(os.environ.get("BENCH_RECIPE", "demo"), []),
        )
        shards = find_shards(store, recipe.dataset)
        assert shards is not None, f"{store.uri} has no pictures of recipe {recipe.name}"
        first_stage = STAGES["train-first-stage"].find(store, recipe, {"shards": shards})
        assert first_stage is not None, f"{store.uri} has no first stage of recipe {recipe.name}"
    else:
        chain = request.getfixturevalue("vq_chain")
        store, recipe, shards, first_stage = chain.store, chain.recipe, chain.shards, chain.first_stage
    held_out = SampleReader(store, shards, split="held_out")
    count = min(int(os.environ.get("BENCH_IMAGES", "400")), len(held_out))
    images = held_out.fetch(range(count))["image"]
    return load_first_stage(store, first_stage), images, recipe.first_stage.name


def through_a_shard(latents: torch.Tensor, dtype: str) -> tuple[torch.Tensor, int]:
    """Latents (N, C', h, w) as they come back from a shard of that type, and the shard's size in bytes."""
    stored = as_stored(latents, dtype)
    tar = write_shard(encode_latent(f"{i:09d}", latent, about={}) for i, latent in enumerate(stored))
    back = np.empty(latents.shape, np.float32)
    for sample in read_shard(tar):
        copy_value(back[int(sample[KEY])], decode_latent(sample)[0])
    return torch.from_numpy(back), len(tar)


@torch.no_grad()
def test_storage_types(
    trained: tuple[FirstStage, np.ndarray, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first_stage, images, name = trained
    latents = encode(first_stage, images, micro_batch=MICRO_BATCH)
    features: Callable[[np.ndarray], np.ndarray] = lambda of: kept_features(  # noqa: E731
        of, cache_dir=tmp_path, micro_batch=MICRO_BATCH, device=home(first_stage)
    )
    originals, rows = features(images), {}
    exact: Any = None
    for dtype in DTYPES:
        back, num_bytes = through_a_shard(latents, dtype)
        z = first_stage.latent(back, None).contiguous(memory_format=torch.channels_last)
        pictures = to_uint8(decode_in_micro_batches(first_stage, z, micro_batch=MICRO_BATCH))
        exact = pictures if exact is None else exact
        rows[dtype] = (
            back[0].numel() * (4 if dtype == "float32" else 2),
            num_bytes / len(images),
            float((back - latents).abs().max()),
            float((pictures != exact).mean()),
            float(reconstruction.psnr(nchw(pictures), nchw(images)).mean()),
            distance(features(pictures), originals),
        )
    assert rows["float32"][2] == 0
    with capsys.disabled():
        print(
            f"\n{name}: {len(images)} held-out pictures of {images.shape[1]} px, "
            f"latents {tuple(latents.shape[1:])}"
        )
        print(
            f"  {'type':<10} {'latent B':>9} {'in shard B':>11} {'max error':>10} {'bytes moved':>11} "
            f"{'PSNR dB':>9} {'change':>9} {'rFID':>9} {'change':>9}"
        )
        base = rows["float32"]
        for dtype, (size, in_shard, error, moved, psnr, rfid) in rows.items():
            print(
                f"  {dtype:<10} {size:>9} {in_shard:>11.0f} {error:>10.2g} {moved:>11.3%} "
                f"{psnr:>9.4f} {psnr - base[4]:>+9.4f} {rfid:>9.4f} {rfid - base[5]:>+9.4f}"
            )
