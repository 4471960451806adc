"""What few steps cost in pictures: FID at 5, 10 and 50 steps beside the distance in the latent.

Reads a trained model from the store that LDM_BENCH_STORE names (./artifacts by default), draws as many
samples as LDM_BENCH_IMAGES says (400 by default) per sampler and count of steps, and writes its table and
plots into the folder that LDM_BENCH_OUTPUT names, if any. FID is against as many held-out pictures; its
interval is 1.96 deviations of it over resampled samples (bootstrap): it tells samplers apart, not data sets.

N samples, M pictures of the reference, D features.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from datasets.manifest import Manifest
from datasets.store import Store
from datasets.stream import SampleReader
from flows.models import recipe_of
from ldm.evaluation.features import distance, kept_features
from ldm.evaluation.sets import sample_labels
from ldm.latent_diffusion import LatentDiffusion, class_condition
from ldm.pictures import curves
from ldm.range import to_uint8
from ldm.stored_models import load_model

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(7200)]
STEPS = (5, 10, 50)
EXACT_STEPS = 999
NAMES = ("ddim", "dpmpp_2m", "unipc")
NUM_IMAGES = int(os.environ.get("LDM_BENCH_IMAGES", "400"))
NUM_COMPARED = 8
"""Samples whose latents are compared with DDIM of 999 steps."""
NUM_RESAMPLES = 200
MICRO_BATCH = 16


def fid_of_few(features: Tensor, reference: Tensor) -> float:
    """Frechet distance of (N, D) and (M, D) float64, fast where N and M are below D.

    The trace of (S S')^(1/2) is the sum of the singular values of the centred sets' (N, M) products.
    """
    means = features.mean(0), reference.mean(0)
    x, y = (
        (rows - mean) / (len(rows) - 1) ** 0.5
        for rows, mean in zip((features, reference), means, strict=True)
    )
    root = torch.linalg.svdvals(x @ y.T).sum()
    return float((means[0] - means[1]).square().sum() + x.square().sum() + y.square().sum() - 2 * root)


def half_interval(features: Tensor, reference: Tensor) -> float:
    """Half the 95% interval of the FID over resampled features."""
    draws = torch.Generator().manual_seed(0)
    found = [
        fid_of_few(features[torch.randint(len(features), (len(features),), generator=draws)], reference)
        for _ in range(NUM_RESAMPLES)
    ]
    return 1.96 * float(np.std(found, ddof=1))


def newest_model(store: Store) -> Manifest:
    """The newest trained model of the store."""
    manifests = store.manifests("train-ldm")
    if not manifests:
        pytest.skip(f"no trained model in {store.uri}; `make demo` makes one, LDM_BENCH_STORE names another")
    return manifests[-1]


def held_out_of(store: Store, model: Manifest) -> np.ndarray:
    """Held-out pictures (M, H, W, 3) uint8 of the data set a model was trained on."""
    latents = model.content.parents["latents"]
    encoded = store.find(latents.stage, latents.key)
    assert encoded is not None
    parent = encoded.content.parents["shards"]
    shards = store.find(parent.stage, parent.key)
    assert shards is not None
    reader = SampleReader(store, shards, split="held_out")
    return reader.fetch(range(min(NUM_IMAGES, len(reader))))["image"]


def drawn(model: LatentDiffusion, sampler: str, steps: int, count: int) -> Tensor:
    """Scaled latents from the same noise and labels each time; the first ones do not depend on `count`."""
    wanted = {"sampler": sampler, "steps": steps, "guidance": 1.0, "micro_batch": MICRO_BATCH}
    condition = class_condition(model, sample_labels(len(model.classes), count))
    return model.sample_latents(condition, num=count, **wanted)


def test_fid_over_steps() -> None:
    store = Store(os.environ.get("LDM_BENCH_STORE", "./artifacts"))
    manifest = newest_model(store)
    model = load_model(store, manifest, recipe_of(manifest))
    cache = store.local_root / "cache"

    def features_of(pictures: np.ndarray) -> Tensor:
        features = kept_features(pictures, cache_dir=cache, micro_batch=MICRO_BATCH, device=model.device)
        return torch.from_numpy(features).double()

    real = features_of(held_out_of(store, manifest))
    exact = drawn(model, "ddim", EXACT_STEPS, NUM_COMPARED)
    fids = {name: list[tuple[int, float]]() for name in NAMES}
    distances = {name: list[tuple[int, float]]() for name in NAMES}
    title = f"{NUM_IMAGES} samples against {len(real)} held-out pictures"
    lines = [f"{title}; RMS in the latent to DDIM with {EXACT_STEPS} steps, of {NUM_COMPARED}"]
    lines.append(f"{'sampler':<10}{'steps':>6}{'FID':>9}{'+-':>7}{'RMS':>9}")
    for name in NAMES:
        for steps in STEPS:
            latents = drawn(model, name, steps, NUM_IMAGES)
            features = features_of(
                np.concatenate(
                    [to_uint8(model.decode(part).clamp(-1.0, 1.0)) for part in latents.split(MICRO_BATCH)]
                )
            )
            fid, interval = fid_of_few(features, real), half_interval(features, real)
            if steps == STEPS[0]:
                assert fid == pytest.approx(distance(features.numpy(), real.numpy()), rel=1e-3)
            error = float((latents[:NUM_COMPARED] - exact).square().mean().sqrt())
            fids[name].append((steps, fid))
            distances[name].append((steps, error))
            lines.append(f"{name:<10}{steps:>6}{fid:>9.2f}{interval:>7.2f}{error:>9.4f}")
    table = "\n".join(lines)
    sys.stdout.write(f"\n{table}\n")
    if folder := os.environ.get("LDM_BENCH_OUTPUT"):
        plots = {"fid": (fids, f"FID, {title}", "FID"), "rms": (distances, "Latent distance", "RMS")}
        for name, (series, heading, label) in plots.items():
            png = curves(series, title=heading, ylabel=label, xlabel="steps", log_y=name == "rms")
            Path(folder, f"steps-{name}.png").write_bytes(png)
        Path(folder, "steps-fid.txt").write_text(table + "\n", "utf-8")
