import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest
import torch
from torch import Tensor

from datasets.manifest import Manifest
from datasets.store import Store, WorkArea
from datasets.stream import SampleReader
from ldm.config import Recipe
from ldm.errors import TrainingError
from ldm.recipe import merge, parse_override, parse_recipe
from ldm.training.checkpoint import Checkpoints, name_of, saved
from ldm.training.diffusion import DiffusionTrainee
from ldm.training.first_stage import FirstStageTrainee
from ldm.training.learning_rate import learning_rate
from ldm.training.loop import History, Trainee, images_seen, train
from ldm.training.report import Silent

KEY = "0" * 64
NUM_STEPS = 12


class Chain(Protocol):
    """What the fixtures of conftest.py give."""

    recipe: Recipe
    store: Store
    first_stage: Manifest
    latents: Manifest

    def reader(self, *, split: str = "train") -> SampleReader: ...


MakeTrainee = Callable[..., DiffusionTrainee]


class PowerCutError(Exception):
    """Ends a run between two steps."""


class CutShort:
    """A trainee that does so many steps and no more."""

    def __init__(self, trainee: Trainee, num_steps: int) -> None:
        self.trainee, self.num_steps = trainee, num_steps
        self.training, self.device = trainee.training, trainee.device
        self.tensors, self.load, self.look = trainee.tensors, trainee.load, trainee.look
        self.validates, self.validate, self.heed = trainee.validates, trainee.validate, trainee.heed
        self.update, self.forget, self.stops = trainee.update, trainee.forget, trainee.stops

    def gradients(self, step: int) -> dict[str, Tensor]:
        if step >= self.num_steps:
            raise PowerCutError
        return self.trainee.gradients(step)


@dataclass(frozen=True)
class Case:
    """A way to make a trainee, and where an undisturbed run of it ends."""

    make: Callable[[], Trainee]
    tensors: dict[str, Tensor]
    history: History


VALIDATED = (
    "first_stage.validation.every_images=8",
    "first_stage.validation.num_images=6",
    "first_stage.validation.keep_best=true",
    "first_stage.training.lr_schedule=constant",
)
"""Validation after every second step, from step 4 on by the scores of all terms."""
VARIANTS = {
    "validated vq": (*VALIDATED, "first_stage.training.virtual_shards=2"),
    "impatient vq": (*VALIDATED, "first_stage.validation.patience=1", "first_stage.training.lr=0.02"),
}


@pytest.fixture(scope="module", params=["vq", "kl", "diffusion vq", "diffusion kl", *VARIANTS])
def case(
    request: pytest.FixtureRequest,
    cats: Callable[[str], SampleReader],
    tiny_recipe: Callable[..., Recipe],
    diffusion_trainee: MakeTrainee,
) -> Case:
    chain = request.getfixturevalue(f"{request.param.split()[-1]}_chain")
    recipe = tiny_recipe(*VARIANTS[request.param]) if request.param in VARIANTS else chain.recipe

    def make() -> Trainee:
        if "diffusion" in request.param:
            return diffusion_trainee(chain)
        return FirstStageTrainee(recipe.first_stage, cats("train"), cats("held_out"))

    return Case(make, *undisturbed(make))


def work_area(store: Store) -> WorkArea:
    return store.work("train", KEY)


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def undisturbed(make: Callable[[], Trainee]) -> tuple[dict[str, Tensor], History]:
    trainee = make()
    history = train(trainee, work_area(Store("memory://undisturbed")), report=Silent())
    work_area(Store("memory://undisturbed")).clear()
    return trainee.tensors(), history


@pytest.mark.parametrize("cut_after", [1, 7])
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(
    case: Case, cut_after: int, tmp_path: Path
) -> None:
    work = work_area(Store(tmp_path))
    with pytest.raises(PowerCutError):
        train(CutShort(case.make(), cut_after), work, report=Silent(), checkpoint_every_s=-1)
    kept = Checkpoints(work).load()
    assert kept is not None
    assert kept.step == cut_after
    trainee = case.make()
    assert train(trainee, work, report=Silent(), checkpoint_every_s=-1) == case.history
    assert_same(trainee.tensors(), case.tensors)
    assert len(saved(work)) == 2


def test_a_checkpoint_holds_all_that_the_next_step_depends_on(case: Case) -> None:
    prefixes = {name.split(".")[0] for name in case.tensors}
    assert {"ema", "optimizer"} < prefixes
    trainee = case.make()
    if isinstance(trainee, FirstStageTrainee):
        assert {"model", "discriminator", "discriminator_optimizer", "used_at"} < prefixes
        assert ("best" in prefixes) == trainee.validation.keep_best
    else:
        assert "networks" in prefixes


@pytest.fixture(scope="module")
def whole_run(vq_chain: Chain, diffusion_trainee: MakeTrainee) -> tuple[dict[str, Tensor], History]:
    return undisturbed(lambda: diffusion_trainee(vq_chain))


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "unreadable record"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    vq_chain: Chain,
    diffusion_trainee: MakeTrainee,
    whole_run: tuple[dict[str, Tensor], History],
    damage: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    work = work_area(Store(tmp_path))
    with pytest.raises(PowerCutError):
        train(CutShort(diffusion_trainee(vq_chain), 7), work, report=Silent(), checkpoint_every_s=-1)
    newest = name_of(saved(work)[-1])
    data = work.read(f"{newest}.safetensors")
    assert data is not None
    match damage:
        case "flipped":
            work.write(f"{newest}.safetensors", data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        case "cut":
            work.write(f"{newest}.safetensors", data[: len(data) // 2])
        case "gone":
            work.remove(f"{newest}.safetensors")
        case _:
            work.write(f"{newest}.json", b"{")
    with caplog.at_level(logging.WARNING):
        kept = Checkpoints(work).load()
    assert kept is not None
    assert kept.step == 6
    assert "a damaged checkpoint is passed over" in caplog.text
    assert newest in caplog.text
    trainee = diffusion_trainee(vq_chain)
    history = train(trainee, work, report=Silent())
    tensors, expected = whole_run
    assert history == expected
    assert_same(trainee.tensors(), tensors)


def test_a_run_that_ended_early_stays_ended_when_it_is_resumed(
    tiny_recipe: Callable[..., Recipe], cats: Callable[[str], SampleReader], tmp_path: Path
) -> None:
    recipe = tiny_recipe(*VARIANTS["impatient vq"]).first_stage
    first, again = (FirstStageTrainee(recipe, cats("train"), cats("held_out")) for _ in range(2))
    work = work_area(Store(tmp_path))
    history = train(first, work, report=Silent())
    assert images_seen(history) < recipe.training.num_images  # pyright: ignore[reportOptionalMemberAccess]
    assert train(again, work, report=Silent()) == history
    assert_same(again.tensors(), first.tensors())


def test_another_seed_gives_other_weights(
    tiny_recipe: Callable[..., Recipe], cats: Callable[[str], SampleReader]
) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        recipe = tiny_recipe(f"first_stage.training.seed={seed}").first_stage
        return undisturbed(lambda: FirstStageTrainee(recipe, cats("train"), cats("held_out")))[0]

    first, second = weights(0), weights(1)
    assert not torch.equal(first["model.encoder.conv_in.weight"], second["model.encoder.conv_in.weight"])


def test_a_loss_that_is_no_number_stops_the_run(vq_chain: Chain, diffusion_trainee: MakeTrainee) -> None:
    trainee = diffusion_trainee(vq_chain)
    with torch.no_grad():
        dict(trainee.networks.named_parameters())["unet.out.2.bias"].fill_(torch.nan)
    with pytest.raises(
        TrainingError, match=r"loss and gradient must be finite, got loss nan.* at step 4 .* lower"
    ):
        train(trainee, work_area(Store("memory://not-finite")), report=Silent())


def test_the_learning_rate_rises_then_falls_to_a_hundredth(tiny_recipe: Callable[..., Recipe]) -> None:
    training = tiny_recipe("training.lr=0.5", "training.warmup_images=16").training
    rates = [learning_rate(training, step) for step in range(training.num_steps)]
    assert rates[0] < rates[1] < rates[2] < rates[3]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(training, training.num_steps) == pytest.approx(0.005)
    constant = training.model_copy(update={"lr_schedule": "constant"})
    assert [learning_rate(constant, step) for step in (0, 1, 3, 11)] == [0.125, 0.25, 0.5, 0.5]


def test_the_published_warm_up_starts_at_its_share(tiny_recipe: Callable[..., Recipe]) -> None:
    training = tiny_recipe(
        "training.lr=0.5", "training.warmup_images=16", "training.warmup_start=0.2"
    ).training
    constant = training.model_copy(update={"lr_schedule": "constant"})
    assert [learning_rate(constant, step) for step in (0, 2, 4, 11)] == pytest.approx([0.1, 0.3, 0.5, 0.5])


def test_a_cosine_after_the_warm_up_ends_at_its_floor_and_stays(tiny_recipe: Callable[..., Recipe]) -> None:
    training = tiny_recipe(
        "training.lr=0.5",
        "training.lr_schedule=warmup_cosine",
        "training.warmup_images=16",
        "training.decay_images=32",
        "training.lr_floor=0.1",
    ).training
    rates = [learning_rate(training, step) for step in range(12)]
    assert rates[3] == rates[4] == 0.5
    assert rates[6] == pytest.approx(0.275)
    assert rates[8:] == pytest.approx([0.05] * 4)


@pytest.mark.parametrize(
    "override",
    [
        "diffusion.loss=l1",
        "diffusion.weighting=min_snr",
        "diffusion.learn_log_variance=true",
        "diffusion.schedule=flow",
    ],
)
def test_each_way_to_weigh_the_error_trains_another_network(
    override: str,
    vq_chain: Chain,
    diffusion_trainee: MakeTrainee,
    whole_run: tuple[dict[str, Tensor], History],
) -> None:
    raw = merge(vq_chain.recipe.model_dump(), parse_override(override))
    recipe = parse_recipe(raw, source="test")
    tensors, history = undisturbed(lambda: diffusion_trainee(vq_chain, recipe))
    name = "networks.unet.out.2.weight"
    assert not torch.equal(tensors[name], whole_run[0][name])
    assert history["loss"][-1][1] < 10
    work = work_area(Store("memory://another"))
    with pytest.raises(PowerCutError):
        train(CutShort(diffusion_trainee(vq_chain, recipe), 7), work, report=Silent(), checkpoint_every_s=-1)
    resumed = diffusion_trainee(vq_chain, recipe)
    train(resumed, work, report=Silent())
    work.clear()
    assert_same(resumed.tensors(), tensors)
    if "log_variance" in override:
        assert tensors["log_variance"].any()


def test_pictures_and_progress_are_told(vq_chain: Chain, diffusion_trainee: MakeTrainee) -> None:
    seen: list[tuple[int, int]] = []

    class Telling(Silent):
        def progress(self, done: int, total: int) -> None:
            seen.append((done, total))

    train(diffusion_trainee(vq_chain), work_area(Store("memory://told")), report=Telling())
    assert seen == [(4 * (step + 1), 48) for step in range(NUM_STEPS)]
