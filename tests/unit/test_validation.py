from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from datasets.keys import artifact_key
from datasets.manifest import Content
from datasets.samples import encode_image
from datasets.shards import write_shard
from datasets.store import Store
from datasets.stream import SampleReader
from ldm.config import Recipe
from ldm.errors import TrainingError
from ldm.evaluation import reconstruction
from ldm.evaluation.sets import nchw, reconstruct
from ldm.first_stage_config import Validation
from ldm.model import WEIGHTS
from ldm.models.lpips import build_lpips
from ldm.range import from_uint8
from ldm.stages import STAGES
from ldm.stages.stage import Job
from ldm.training.first_stage import FirstStageTrainee
from ldm.training.loop import History, images_seen, train
from ldm.training.report import Silent
from ldm.training.validation import (
    EXACT_DB,
    LPIPS_DISTANCE,
    PSNR,
    RFID,
    SSIM,
    HeldOut,
    best,
    judged,
    judged_after,
    num_without_better,
)
from ldm.weights import inception_state

Cats = Callable[[str], SampleReader]
Make = Callable[..., FirstStageTrainee]
EVERY = ("first_stage.validation.every_images=8", "first_stage.validation.num_images=6")
PLAIN = ("first_stage.loss.adversarial_weight=0", "first_stage.training.lr_schedule=constant")


@pytest.fixture
def make(tiny_recipe: Callable[..., Recipe], cats: Cats) -> Make:
    return lambda *overrides: FirstStageTrainee(
        tiny_recipe(*overrides).first_stage, cats("train"), cats("held_out")
    )


def run(trainee: FirstStageTrainee) -> History:
    """Train to the end in a work area of its own."""
    work = Store("memory://validation").work("train", "1" * 64)
    work.clear()
    return train(trainee, work, report=Silent())


def test_scores_are_those_of_the_last_held_out_pictures_and_their_reconstructions(
    make: Make, cats: Cats
) -> None:
    trainee = make(*EVERY)
    trainee.gradients(0)
    trainee.update(0)
    assert not trainee.validates(4)
    assert trainee.validates(8)
    scores = trainee.validate()
    model = trainee.averaged()
    images = cats("held_out").fetch(range(6, 12))["image"]
    rebuilt = reconstruct(model, images, micro_batch=4)
    plain = reconstruction.scores([(nchw(rebuilt), nchw(images))])
    assert scores[PSNR] == pytest.approx(plain["psnr_db"])
    assert scores[SSIM] == pytest.approx(plain["ssim"])
    distance = build_lpips()(from_uint8(rebuilt), from_uint8(images)).mean().item()
    assert scores[LPIPS_DISTANCE] == pytest.approx(distance, rel=1e-4)
    assert scores.keys() == {PSNR, SSIM, LPIPS_DISTANCE}


def test_pictures_that_come_back_exactly_have_a_finite_psnr(cats: Cats) -> None:
    class Mirror:
        """Gives back what it gets."""

        def encode(self, x: Tensor) -> Tensor:
            return x

        def latent(self, stored: Tensor, noise: Tensor | None) -> Tensor:
            del noise
            return stored

        def decode(self, z: Tensor) -> Tensor:
            return z

    config = Validation(every_images=8, num_images=5)
    held_out = HeldOut(config, cats("held_out"), micro_batch=4, lpips=build_lpips(), inception=Path)
    assert held_out.scores(Mirror()) == pytest.approx({PSNR: EXACT_DB, SSIM: 1.0, LPIPS_DISTANCE: 0.0})


def test_validation_leaves_training_as_it_is(make: Make) -> None:
    without, with_it = make("first_stage.validation.every_images=0"), make(*EVERY)
    before, after = run(without), run(with_it)
    assert {name: points for name, points in after.items() if not name.startswith("validation/")} == before
    assert [images for images, _ in after[PSNR]] == [8, 16, 24, 32, 40, 48]
    ours, theirs = without.tensors(), with_it.tensors()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_the_end_of_training_is_validated_too(make: Make) -> None:
    history = run(make("first_stage.validation.every_images=20", "first_stage.validation.num_images=6"))
    assert [images for images, _ in history[PSNR]] == [20, 40, 48]


def test_patience_ends_a_run_that_gets_no_better(make: Make) -> None:
    overrides = (*EVERY, *PLAIN, "first_stage.validation.patience=2", "first_stage.training.lr=1e-30")
    trainee = make(*overrides, "first_stage.loss.revive_after_images=0")
    history = run(trainee)
    assert [images for images, _ in history[PSNR]] == [8, 16, 24]
    assert images_seen(history) == 24
    assert trainee.stops(history)


def test_the_best_averaged_weights_are_kept(make: Make) -> None:
    overrides = (*EVERY, *PLAIN, "first_stage.validation.keep_best=true", "first_stage.training.lr=0.02")
    trainee = make(*overrides)
    history = run(trainee)
    found = best(history[PSNR])
    assert found is not None
    images, _ = found
    assert images < 48, "else the last weights are the best and nothing is tested"
    shorter = make(*overrides, f"first_stage.training.num_images={images}")
    run(shorter)
    assert [
        n for n, value in trainee.result().items() if not torch.equal(value, shorter.ema.averages[n])
    ] == []
    assert any(not torch.equal(value, trainee.ema.averages[n]) for n, value in trainee.result().items())


def test_without_keep_best_the_result_is_the_last_average(make: Make) -> None:
    trainee = make(*EVERY)
    assert trainee.result() is trainee.ema.averages


def test_scores_from_before_the_last_term_joined_in_do_not_count(make: Make) -> None:
    trainee = make("first_stage.loss.perceptual_weight=1", "first_stage.loss.perceptual_start_images=8")
    assert judged_after(trainee.loss, trainee.training) == 16  # the discriminator's start
    never = trainee.loss.model_copy(update={"adversarial_start_images": 48})
    assert judged_after(never, trainee.training) == 8
    off = trainee.loss.model_copy(update={"adversarial_weight": 0.0, "perceptual_weight": 0.0})
    assert judged_after(off, trainee.training) == 0
    history: History = {PSNR: [(8, 30.0), (16, 29.0), (24, 20.0), (32, 21.0), (40, 20.5), (48, 21.0)]}
    points = judged(history, Validation(every_images=8), after=16)
    assert points == [(24, 20.0), (32, 21.0), (40, 20.5), (48, 21.0)]
    assert best(points) == (32, 21.0)
    assert num_without_better(points) == 2
    assert (best([]), num_without_better([])) == (None, 0)


def test_with_rfid_the_lowest_rfid_is_the_best() -> None:
    history: History = {PSNR: [(8, 20.0), (16, 30.0)], RFID: [(8, 5.0), (16, 6.0)]}
    points = judged(history, Validation(every_images=8, rfid=True), after=0)
    assert best(points) == (8, -5.0)
    assert num_without_better(points) == 1


@pytest.mark.slow
def test_rfid_is_the_distance_of_reconstructions_to_their_originals(
    tiny_recipe: Callable[..., Recipe], cats: Cats, tmp_path: Path
) -> None:
    from ldm.evaluation import fidelity

    recipe = tiny_recipe(*EVERY, "first_stage.validation.rfid=true").first_stage
    trainee = FirstStageTrainee(
        recipe, cats("train"), cats("held_out"), inception=lambda: inception_state(tmp_path)
    )
    images = cats("held_out").fetch(range(6, 12))["image"]
    pair = reconstruct(trainee.averaged(), images, micro_batch=4), images
    features = [
        torch.from_numpy(
            fidelity.extract_features([nchw(p)], weights_path=inception_state(tmp_path))
        ).double()
        for p in pair
    ]
    scores = trainee.validate()
    assert scores[RFID] == pytest.approx(fidelity.frechet_distance(*features), rel=1e-6)
    assert trainee.validate()[RFID] == scores[RFID]


def test_rfid_of_too_few_pictures_is_refused(cats: Cats, tmp_path: Path) -> None:
    reader = single_coloured(Store(tmp_path), [(n, n, n) for n in range(3)], split="held_out")
    config = Validation(every_images=8, rfid=True)
    with pytest.raises(
        TrainingError, match=r"rfid needs at least 4 held-out pictures, the data set has 3; hold"
    ):
        HeldOut(config, reader, micro_batch=4, lpips=build_lpips(), inception=Path)


def single_coloured(store: Store, colours: list[tuple[int, int, int]], *, split: str) -> SampleReader:
    """A store with one picture of each colour."""
    stage, what = "download-shards", {"colours": colours}
    key = artifact_key(stage, 1, what=what, parents={})
    pictures = [np.full((32, 32, 3), colour, np.uint8) for colour in colours]
    tar = write_shard(encode_image(f"{n:09d}", p, about={"class_label": 0}) for n, p in enumerate(pictures))
    files = (store.put(stage, key, f"{split}-00000.tar", tar, count=len(pictures)),)
    statistics = {"num_train": 0, "num_held_out": 0, f"num_{split}": len(pictures), "classes": ["grey"]}
    content = Content(stage, key, 1, what=what, parents={}, files=files, statistics=statistics)
    return SampleReader(store, store.commit(content, {}), split=split)


@pytest.mark.parametrize("num_colours", [1, 4])
def test_pictures_that_do_not_differ_are_refused_before_training(
    num_colours: int, tiny_recipe: Callable[..., Recipe], cats: Cats, tmp_path: Path
) -> None:
    reader = single_coloured(Store(tmp_path), [(9, 9, 9)] * 4, split="train")
    if num_colours == 4:
        reader = single_coloured(Store(tmp_path), [(n, 9, 9) for n in range(4)], split="train")
    trainee = FirstStageTrainee(tiny_recipe().first_stage, reader, cats("held_out"))
    if num_colours == 4:
        trainee.batch(0)
        return
    with pytest.raises(
        TrainingError, match=r"must differ: all 4 pictures .* one colour \[9, 9, 9\]; look at"
    ):
        run(trainee)


def test_one_picture_again_and_again_is_refused(tiny_recipe: Callable[..., Recipe], cats: Cats) -> None:
    from ldm.training.first_stage import check_pictures

    one = cats("train").fetch(range(1))["image"]
    with pytest.raises(TrainingError, match="all 3 pictures of the first batch are the same; look at"):
        check_pictures(one.repeat(3, axis=0))
    check_pictures(one)


def test_validation_is_part_of_the_key_only_where_there_is_any(tiny_recipe: Callable[..., Recipe]) -> None:
    what = STAGES["train-first-stage"].what
    off = "first_stage.validation.every_images=0"
    assert what(tiny_recipe(off)) == what(tiny_recipe(off, "first_stage.validation.num_images=7"))
    assert what(tiny_recipe(*EVERY)) != what(tiny_recipe(off))
    assert what(tiny_recipe(*EVERY)) != what(tiny_recipe(*EVERY, "first_stage.validation.keep_best=true"))


def test_the_artifact_holds_the_best_weights_the_page_and_the_verdicts(
    tiny_recipe: Callable[..., Recipe], cat_store: Store, vq_chain
) -> None:
    overrides = ("first_stage.validation.keep_best=true", "first_stage.validation.patience=9")
    recipe = tiny_recipe(*EVERY, *PLAIN, *overrides)
    stage, inputs = STAGES["train-first-stage"], {"shards": vq_chain.shards}
    pictures: dict[str, bytes] = {}

    class Album(Silent):
        def picture(self, name: str, images_seen: int, png: bytes) -> None:
            pictures[name] = png

    manifest = stage.run(Job(stage, cat_store, recipe, stage.key(recipe, inputs), inputs, Album()), dict)
    statistics = manifest.content.statistics
    assert {"losses", "gradients", "codes", "latents", "held-out"} == statistics["health"].keys()
    assert all(text.startswith(("ok: ", "look: ")) for text in statistics["health"].values())
    assert statistics["best"]["num_images"] in range(8, 49, 8)
    assert statistics["stopped_early_at_images"] is None
    assert cat_store.read(manifest, "health.png") == pictures["first_stage_health"]
    assert cat_store.read(manifest, WEIGHTS)
