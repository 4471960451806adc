"""The memory of a training step is counted as an allocator has it, and what does not fit is refused."""

import re
from collections.abc import Callable
from typing import Any, Protocol

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from datasets.manifest import Manifest
from datasets.store import Store
from datasets.stream import SampleReader
from ldm.config import Recipe
from ldm.errors import RecipeError
from ldm.recipe import load_recipe
from ldm.stages import STAGES
from ldm.stages.stage import Job, trained
from ldm.training.allocations import counted
from ldm.training.diffusion import DiffusionTrainee
from ldm.training.first_stage import FirstStageTrainee
from ldm.training.memory import (
    GIB,
    HEADROOM,
    Need,
    Way,
    available_bytes,
    largest_at_once,
    networks_of_stage,
    require_memory,
    way_of,
)
from ldm.training.report import Silent

TOLERANCE = 0.25
WIDE = ("unet.model_channels=64", "unet.norm_groups=32", "unet.head_channels=32", "training.batch_size=16")
WIDE_FIRST_STAGE = (
    "first_stage.model.channels=32",
    "first_stage.training.batch_size=8",
    "first_stage.loss.adversarial_start_images=0",
)


class Chain(Protocol):
    """What the fixtures of conftest.py give."""

    recipe: Recipe
    store: Store
    shards: Manifest
    first_stage: Manifest
    latents: Manifest

    def reader(self, *, split: str = "train") -> SampleReader: ...


def allocated_at_most(work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator for the CPU gave out while `work` ran, beyond what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events: list[Any] = profiler.profiler.kineto_results.events()
    events = [event for event in events if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def needs(recipe: Recipe, stage: Any) -> Need:
    return networks_of_stage(recipe, stage).need(way_of(recipe, stage))


def test_storages_are_counted_once_and_until_they_are_gone() -> None:
    with counted() as allocations:
        x = torch.empty(256, 4)
        assert (allocations.now, allocations.most) == (4096, 4096)
        view = x.t()
        y = x + x
        assert allocations.now == 8192
        del x
        assert allocations.now == 8192, "a view holds its storage"
        del view
        assert (allocations.now, allocations.most) == (4096, 8192)
        del y
        assert allocations.now == 0


def test_a_linear_layer_takes_what_one_can_count_by_hand() -> None:
    with torch.device("meta"):
        layer = nn.Linear(64, 32)
    with counted() as allocations:
        assert allocations.hold(layer) == 4 * (64 * 32 + 32)
        before = allocations.now
        out = layer(torch.empty(8, 64)).square()
        assert allocations.now - before == 4 * (8 * 64 + 2 * 8 * 32)
        torch.autograd.backward([out.sum()])
    assert layer.weight.grad is not None


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_unets_step_takes_what_was_counted(
    vq_chain: Chain,
    tiny_recipe: Callable[..., Recipe],
    diffusion_trainee: Callable[..., DiffusionTrainee],
    checkpointing: str,
) -> None:
    recipe = tiny_recipe(*WIDE, f"unet.checkpoint_activations={checkpointing}")
    trainee = diffusion_trainee(vq_chain, recipe)
    trainee.gradients(0)
    trainee.update(0)
    need = needs(recipe, "train-ldm")
    assert need.parameters == sum(4 * p.numel() for p in trainee.networks.parameters())
    assert need.averages == need.parameters == need.moments / 2 == need.gradients
    found = allocated_at_most(lambda: trainee.gradients(1) | trainee.update(1))
    assert need.gradients + need.activations == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        ("vq", "false"),
        ("kl", "true"),
        pytest.param("vq", "true", marks=pytest.mark.slow),
        pytest.param("kl", "false", marks=pytest.mark.slow),
    ],
)
def test_a_first_stages_step_takes_what_was_counted(
    vq_chain: Chain, tiny_recipe: Callable[..., Recipe], kind: str, checkpointing: str
) -> None:
    codes = "32" if kind == "vq" else "null"
    recipe = tiny_recipe(
        *WIDE_FIRST_STAGE,
        f"first_stage.model.kind={kind}",
        f"first_stage.model.num_codes={codes}",
        f"first_stage.gradient_checkpointing={checkpointing}",
    )
    readers = (SampleReader(vq_chain.store, vq_chain.shards, split=split) for split in ("train", "held_out"))
    trainee = FirstStageTrainee(recipe.first_stage, *readers)
    trainee.gradients(0)
    trainee.update(0)
    need = needs(recipe, "train-first-stage")
    found = allocated_at_most(lambda: trainee.gradients(1) | trainee.update(1))
    assert need.gradients + need.activations == pytest.approx(found, rel=TOLERANCE)


def test_shards_need_less_for_activations_and_more_for_gradients(tiny_recipe: Callable[..., Recipe]) -> None:
    networks = networks_of_stage(tiny_recipe(*WIDE), "train-ldm")
    whole, in_shards = (networks.need(Way(16 // n, n, checkpointing=False)) for n in (1, 8))
    assert in_shards.gradients == 4 * whole.gradients
    assert in_shards.activations < whole.activations / 4
    low = networks.need(Way(16, 1, checkpointing=False, precision="bfloat16"))
    assert low.activations < whole.activations
    assert low.parameters == whole.parameters


def test_ranks_share_out_the_shards(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("first_stage.training.batch_size=8", "first_stage.training.virtual_shards=4")
    assert way_of(recipe, "train-first-stage") == Way(2, 4, checkpointing=False)
    assert way_of(recipe, "train-first-stage", ranks=2) == Way(2, 2, checkpointing=False)
    assert way_of(recipe, "train-first-stage", ranks=8) == Way(1, 1, checkpointing=False)


def test_the_largest_batch_fits_and_one_picture_more_does_not(tiny_recipe: Callable[..., Recipe]) -> None:
    networks = networks_of_stage(tiny_recipe(), "train-ldm")
    way = Way(1, 1, checkpointing=False)
    budget = networks.need(Way(13, 1, checkpointing=False)).total
    assert largest_at_once(networks, way, budget) == 13
    assert largest_at_once(networks, way, budget - 1) == 12
    assert largest_at_once(networks, way, networks.need(way).total - 1) == 0


@pytest.mark.parametrize(
    ("stage", "switch", "shards"),
    [
        ("train-ldm", "unet.checkpoint_activations", "training.virtual_shards"),
        pytest.param(
            "train-first-stage",
            "first_stage.gradient_checkpointing",
            "first_stage.training.virtual_shards",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_what_the_message_says_fits(
    tiny_recipe: Callable[..., Recipe], stage: Any, switch: str, shards: str
) -> None:
    recipe = tiny_recipe(*WIDE, "first_stage.training.batch_size=16")
    networks = networks_of_stage(recipe, stage)
    room = networks.need(Way(16, 1, checkpointing=True)).total / (1 - HEADROOM)
    with pytest.raises(RecipeError, match=rf"16 pictures at once on each of 1 take .*set {switch}=true"):
        require_memory(recipe, stage, available_bytes=int(1.01 * room))
    fixed = tiny_recipe(*WIDE, "first_stage.training.batch_size=16", f"{switch}=true")
    assert require_memory(fixed, stage, available_bytes=int(1.01 * room)).total <= room
    room = networks.need(Way(4, 4, checkpointing=False)).total / (1 - HEADROOM)
    with pytest.raises(RecipeError, match=rf"set {shards}=\d+ \(\d+ pictures at once\)") as refused:
        require_memory(recipe, stage, available_bytes=int(1.01 * room))
    said = re.search(rf"{shards}=\d+", str(refused.value))
    assert said is not None
    shared = tiny_recipe(*WIDE, "first_stage.training.batch_size=16", said[0])
    assert require_memory(shared, stage, available_bytes=int(1.01 * room)).total <= room
    with pytest.raises(RecipeError, match=r"use a device with .* GiB, which one picture takes at the least"):
        require_memory(recipe, stage, available_bytes=1000)


def test_a_stage_refuses_what_does_not_fit_before_it_builds_anything(
    vq_chain: Chain, tiny_recipe: Callable[..., Recipe]
) -> None:
    recipe = tiny_recipe("training.batch_size=4000000", "training.num_images=4000000")
    inputs = {"latents": vq_chain.latents, "first_stage": vq_chain.first_stage}
    job = Job(STAGES["train-ldm"], vq_chain.store, recipe, "f" * 64, inputs, Silent())
    with pytest.raises(RecipeError, match=r"4000000 pictures at once on each of 1 take .*set"):
        trained(job, recipe.training, lambda job, ranks: pytest.fail("it was built"))


def test_the_memory_of_a_cpu_is_shared_by_its_ranks() -> None:
    alone, shared = (available_bytes(torch.device("cpu"), ranks=ranks) for ranks in (1, 4))
    assert 0 < shared < alone


@pytest.mark.slow
@pytest.mark.parametrize("name", ["celebahq", "lsun-churches256", "cin256-v2", "txt2img-1p4b", "rdm768"])
def test_a_step_of_a_published_model_is_counted(name: str) -> None:
    need = networks_of_stage(load_recipe(name), "train-ldm").need(Way(2, 1, checkpointing=True))
    assert need.total > 4 * need.parameters > GIB
