"""The stage encode-latents against its bare encoder: same pictures, passes, threads (goals: README.md here).

Ours reads, verifies and decodes image shards, encodes, and writes, hashes and records latent shards; the
other encodes the pictures, which it has in memory as tensors. Nothing is asserted about time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from datasets.cats import CatPainter, draw_combinations
from datasets.keys import sha256_hex
from datasets.manifest import Content, Manifest
from datasets.samples import encode_image
from datasets.shards import write_shard
from datasets.store import Store
from ldm.config import Recipe
from ldm.model import WEIGHTS, load_first_stage
from ldm.models.first_stage import build_first_stage
from ldm.range import from_uint8
from ldm.recipe import load_recipe
from ldm.stages import STAGES
from ldm.stages.stage import Job
from ldm.training.report import Silent

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1200)]

STAGE = STAGES["encode-latents"]
PART_SAMPLES = 128
RUNS = {
    "demo, 32 px": ("demo", 768, ()),
    "cats-64, 64 px": ("cats-64", 256, ()),
    "cats-64, mirrored, pictures beside": (
        "cats-64",
        128,
        ("encoding.orientations=[as_is, mirrored]", "encoding.picture=true"),
    ),
}


def artifact(store: Store, stage: str, **content: Any) -> Manifest:
    """An artifact of these files and facts."""
    files = content.pop("files")
    key = sha256_hex(stage.encode())
    records = tuple(store.put(stage, key, name, data, count=count) for name, data, count in files)
    return store.commit(Content(stage, key, 1, parents={}, files=records, **content), {})


def image_shards(store: Store, images: list[np.ndarray]) -> Manifest:
    """Pictures as training shards."""
    samples = iter(
        [encode_image(f"{i:09d}", image, about={"class_label": 0}) for i, image in enumerate(images)]
    )
    files = []
    for part in itertools.count():
        chosen = list(itertools.islice(samples, PART_SAMPLES))
        if not chosen:
            break
        files.append((f"train-{part:05d}.tar", write_shard(chosen), len(chosen)))
    facts = {"num_train": len(images), "num_held_out": 0, "classes": []}
    return artifact(store, "download-shards", files=files, what={}, statistics=facts)


def first_stage(store: Store, recipe: Recipe) -> Manifest:
    """The recipe's first stage with random weights."""
    torch.manual_seed(0)
    model = build_first_stage(recipe.first_stage.model)
    assert isinstance(model, nn.Module)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    what = {"model": recipe.first_stage.model.model_dump(mode="json")}
    return artifact(
        store, "train-first-stage", files=[(WEIGHTS, save(weights), None)], what=what, statistics={}
    )


@pytest.mark.parametrize("name", list(RUNS))
def test_encoding_a_corpus(name: str, tmp_path: Path, race: Callable[..., Any], show: Any) -> None:
    recipe_name, count, overrides = RUNS[name]
    recipe = load_recipe(recipe_name, [*overrides, "threads=2"])
    painter = CatPainter(recipe.dataset.image_size_px)
    images = [
        np.asarray(painter.paint(cat)) for cat in itertools.islice(draw_combinations(count, seed=0), count)
    ]
    store = Store(tmp_path)
    inputs = {"shards": image_shards(store, images), "first_stage": first_stage(store, recipe)}
    model = load_first_stage(store, inputs["first_stage"])
    size, copies = recipe.encoding.micro_batch, len(recipe.encoding.orientations)
    tensors = from_uint8(np.stack(images)).repeat(copies, 1, 1, 1)
    keys = (sha256_hex(b"%d" % number) for number in itertools.count())

    def ours() -> None:
        STAGE.build(Job(STAGE, store, recipe, next(keys), inputs, Silent()))

    @torch.no_grad()
    def bare() -> None:
        for part in tensors.split(PART_SAMPLES * copies):
            for x in part.split(size):
                padded = torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])])
                model.encode(padded.contiguous(memory_format=torch.channels_last))

    result = race(ours, bare, rounds=5)
    show({f"{name}, {count * copies / result.seconds[0]:.0f}/s": result})
