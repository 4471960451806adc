"""What many tests share: a few real cats in a store, a recipe small enough for a test, a tiny trained chain.

Torch is imported inside the fixtures: the tests of `datasets` do not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from datasets.cats import CatPainter, draw_combinations
from datasets.keys import artifact_key
from datasets.manifest import Content, Manifest
from datasets.samples import encode_image
from datasets.shards import write_shard
from datasets.store import Store
from datasets.stream import SampleReader

if TYPE_CHECKING:
    from ldm.config import Recipe
    from ldm.training.diffusion import DiffusionTrainee

SIZE_PX = 32
SHARDS = {"train-00000": 24, "train-00001": 16, "held_out-00000": 12}
CLASSES = [f"colour {label}" for label in range(15)]
TINY = (
    "dataset.source.train=40",
    "dataset.source.held_out=12",
    "dataset.source.dead=0",
    "first_stage.model.channels=8",
    "first_stage.model.norm_groups=4",
    "first_stage.model.num_codes=32",
    "first_stage.loss.perceptual_weight=0",
    "first_stage.loss.discriminator_channels=8",
    "first_stage.loss.adversarial_start_images=16",
    "first_stage.loss.revive_after_images=12",
    "first_stage.training.num_images=48",
    "first_stage.training.batch_size=4",
    "first_stage.training.warmup_images=0",
    "first_stage.training.lr=0.001",
    "first_stage.training.ema_decay=0.9",
    "first_stage.validation.every_images=0",
    "encoding.micro_batch=8",
    "unet.model_channels=16",
    "unet.norm_groups=8",
    "unet.head_channels=8",
    "unet.context_dim=16",
    "conditioning.context_dim=16",
    "diffusion.objective=eps",
    "training.num_images=48",
    "training.batch_size=4",
    "training.warmup_images=0",
    "training.lr=0.001",
    "training.ema_decay=0.9",
    "sampling.steps=3",
    "sampling.micro_batch=4",
    "threads=1",
)


@dataclass(frozen=True)
class Chain:
    """A recipe with the artifacts of its first stages of work."""

    recipe: Recipe
    store: Store
    shards: Manifest
    first_stage: Manifest
    latents: Manifest

    def reader(self, *, split: str = "train") -> SampleReader:
        """The latents of a split."""
        return SampleReader(self.store, self.latents, split=split)


@pytest.fixture(scope="session")
def cat_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A local store that the whole session shares."""
    return Store(tmp_path_factory.mktemp("cats"))


@pytest.fixture(scope="session")
def cat_shards(cat_store: Store) -> Manifest:
    """Image shards of 40 training and 12 held-out cats at 32 px."""
    painter = CatPainter(SIZE_PX)
    cats = iter(draw_combinations(sum(SHARDS.values()), seed=0))
    what, stage = {"cats": SHARDS}, "download-shards"
    key = artifact_key(stage, 1, what=what, parents={})
    files, number = [], 0
    for name, count in SHARDS.items():
        samples = []
        for cat in (next(cats) for _ in range(count)):
            about = {"class_label": cat.body}
            samples.append(encode_image(f"{number:09d}", np.asarray(painter.paint(cat)), about=about))
            number += 1
        files.append(cat_store.put(stage, key, f"{name}.tar", write_shard(samples), count=count))
    statistics = {"num_train": 40, "num_held_out": 12, "classes": CLASSES}
    content = Content(stage, key, 1, what=what, parents={}, files=tuple(files), statistics=statistics)
    return cat_store.commit(content, {})


@pytest.fixture(scope="session")
def cats(cat_store: Store, cat_shards: Manifest) -> Callable[[str], SampleReader]:
    """Readers of the cats, by split."""
    return lambda split: SampleReader(cat_store, cat_shards, split=split)


@pytest.fixture(scope="session")
def tiny_recipe() -> Callable[..., Recipe]:
    """The demo, shrunk; arguments are further overrides."""
    from ldm.recipe import load_recipe

    return lambda *overrides: load_recipe("demo", [*TINY, *overrides])


def build_chain(store: Store, shards: Manifest, recipe: Recipe) -> Chain:
    """Train a recipe's first stage and encode the cats, by the real stages."""
    from ldm.stages import STAGES
    from ldm.stages.stage import Job
    from ldm.training.report import Silent

    made: dict[str, Manifest] = {"download-shards": shards}
    for name in ("train-first-stage", "encode-latents"):
        stage = STAGES[name]
        inputs: Mapping[str, Manifest] = {role: made[of] for role, of in stage.inputs.items()}
        job = Job(stage, store, recipe, stage.key(recipe, inputs), inputs, Silent())
        made[name] = stage.run(job, dict)
    return Chain(recipe, store, shards, made["train-first-stage"], made["encode-latents"])


@pytest.fixture(scope="session")
def vq_chain(cat_store: Store, cat_shards: Manifest, tiny_recipe: Callable[..., Recipe]) -> Chain:
    """The chain up to latents before quantisation."""
    return build_chain(cat_store, cat_shards, tiny_recipe())


@pytest.fixture(scope="session")
def kl_chain(cat_store: Store, cat_shards: Manifest, tiny_recipe: Callable[..., Recipe]) -> Chain:
    """The chain up to latents that are moments."""
    recipe = tiny_recipe("first_stage.model.kind=kl", "first_stage.model.num_codes=null")
    return build_chain(cat_store, cat_shards, recipe)


@pytest.fixture(scope="session")
def diffusion_trainee() -> Callable[..., DiffusionTrainee]:
    """`diffusion_trainee(chain, recipe, device=...)`: training on a chain's latents, looked at by nobody."""
    from ldm.latents import contract_of
    from ldm.model import load_first_stage
    from ldm.training.diffusion import DiffusionTrainee

    def build(chain: Chain, recipe: Recipe | None = None, *, device: str = "cpu") -> DiffusionTrainee:
        return DiffusionTrainee(
            recipe or chain.recipe,
            chain.reader(),
            contract_of(chain.latents),
            load_first_stage(chain.store, chain.first_stage),
            num_classes=15,
            look=lambda networks: {},
            device=device,
        )

    return build


@pytest.fixture(scope="session")
def with_contract() -> Callable[..., Manifest]:
    """`with_contract(latents, factor=8)` is the artifact with other values in its contract."""

    def altered(latents: Manifest, **changes: object) -> Manifest:
        stated = latents.content.statistics["contract"] | changes
        statistics = dict(latents.content.statistics) | {"contract": stated}
        return Manifest(replace(latents.content, statistics=statistics), latents.provenance)

    return altered
