"""Scores of a first stage: beside bicubic scaling, reproducible, and side by side in a table."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datasets.manifest import Manifest
from flows.compare_first_stages import overrides_for
from flows.first_stage_scores import HEADINGS, cells, lines_over_f, markdown, rows_of
from ldm.evaluation.features import distance, kept_features
from ldm.evaluation.first_stage import bicubic
from ldm.evaluation.reconstruction import psnr
from ldm.evaluation.sets import nchw, reconstruct
from ldm.model import load_first_stage
from ldm.recipe import load_recipe
from ldm.stages import STAGES
from ldm.stages.stage import Job
from ldm.training.report import Silent

STAGE = STAGES["evaluate-first-stage"]


def run(chain: Any, *, num_images: int, report: Silent | None = None) -> Manifest:
    """The stage's result on the tiny chain, in its store."""
    evaluation = chain.recipe.evaluation.model_copy(update={"num_images": num_images, "micro_batch": 4})
    recipe = chain.recipe.model_copy(update={"evaluation": evaluation})
    inputs = {"shards": chain.shards, "first_stage": chain.first_stage}
    key = STAGE.key(recipe, inputs)
    provenance = {"recipe": recipe.model_dump(mode="json")}
    return STAGE.run(Job(STAGE, chain.store, recipe, key, inputs, report or Silent()), lambda: provenance)


class Telling(Silent):
    """Remembers progress and the names of pictures."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []
        self.shown: list[str] = []

    def progress(self, done: int, total: int) -> None:
        self.told.append((done, total))

    def picture(self, name: str, images_seen: int, png: bytes) -> None:
        self.shown.append(name)


@pytest.fixture(scope="module")
def report() -> Telling:
    return Telling()


@pytest.fixture(scope="module")
def manifest(vq_chain: Any, report: Telling) -> Manifest:
    return run(vq_chain, num_images=4, report=report)


def test_scores_are_those_of_the_reconstructions_of_held_out_pictures(
    vq_chain: Any, cats: Any, manifest: Manifest
) -> None:
    scores = manifest.content.statistics["scores"]
    real = cats("held_out").fetch(range(4))["image"]
    first_stage = load_first_stage(vq_chain.store, vq_chain.first_stage)
    expected = reconstruct(first_stage, real, micro_batch=8)
    assert scores["psnr_db"] == pytest.approx(psnr(nchw(expected), nchw(real)).mean().item())
    half = bicubic(real, 4)
    assert scores["bicubic_psnr_db"] == pytest.approx(psnr(nchw(half), nchw(real)).mean().item())
    assert scores["num_images"] == 4
    assert {"rfid", "rfid_same_pictures", "floor_fid", "lpips", "ssim", "bicubic_lpips"} <= set(scores)
    assert scores["rfid_same_pictures"] > scores["bicubic_rfid_same_pictures"] > 0  # trained for 12 steps


def test_progress_reaches_its_total_and_a_picture_is_reported(report: Telling, manifest: Manifest) -> None:
    assert report.told == sorted(report.told)
    assert report.told[-1] == (16, 16)
    assert report.shown == ["reconstructions"]
    assert [file.name for file in manifest.content.files] == ["scores.json", "reconstructions.png"]


def test_where_too_few_are_held_out_for_a_reference_only_the_published_form_is_scored(vq_chain: Any) -> None:
    scores = run(vq_chain, num_images=7).content.statistics["scores"]
    assert "rfid_same_pictures" in scores
    assert not {"rfid", "floor_fid", "bicubic_rfid"} & set(scores)


def test_bicubic_keeps_what_is_smooth_and_loses_what_is_finer_than_f() -> None:
    flat = np.full((2, 16, 16, 3), 77, np.uint8)
    assert np.array_equal(bicubic(flat, 4), flat)
    checks = np.indices((16, 16)).sum(0) % 2 * 255
    fine = np.repeat(checks[None, :, :, None], 3, axis=3).astype(np.uint8)
    assert bicubic(fine, 2).std() < 20 < fine.std()


@pytest.fixture
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def test_features_are_computed_once_for_equal_pictures_and_anew_when_damaged(
    pictures: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []
    ask = {"cache_dir": tmp_path, "micro_batch": 2, "progress": lambda done, total: calls.append(done)}
    first = kept_features(pictures, **ask)
    assert calls == [2, 3]
    assert np.array_equal(kept_features(pictures.copy(), **ask), first)
    assert calls == [2, 3, 3]
    (kept,) = tmp_path.glob("features-*.npy")
    kept.write_bytes(kept.read_bytes()[:-1] + b"\x01")
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(kept_features(pictures, **ask), first)
    assert "are not the bytes their name says" in caplog.text
    other = pictures.copy()
    other[0, 0, 0, 0] ^= 1
    assert not np.array_equal(kept_features(other, **ask), first)
    assert distance(first, first) == pytest.approx(0, abs=1e-3)


def test_a_first_stage_brings_its_channels_into_the_recipe_it_is_compared_in() -> None:
    recipe = load_recipe("demo", overrides_for("cats-vq-f2", ["first_stage.training.num_images=160"]))
    assert (recipe.first_stage.name, recipe.unet.in_channels, recipe.latent_size) == ("cats-vq-f2", 2, 16)
    assert recipe.first_stage.training is not None
    assert recipe.first_stage.training.num_images == 160


ROWS = [
    {"name": "b", "kind": "vq", "f": 2, "num_images": 9, "rfid_same_pictures": 1.0, "psnr_db": 30.0},
    {"name": "a", "kind": "vq", "f": 4, "num_images": 9, "rfid_same_pictures": 5.0, "psnr_db": 25.0}
    | {"bicubic_rfid_same_pictures": 50.0},
    {"name": "c", "kind": "kl", "f": 4, "num_images": 9, "rfid_same_pictures": 4.0}
    | {"bicubic_rfid_same_pictures": 50.0},
]


def test_the_table_has_a_row_each_and_a_dash_for_what_does_not_exist() -> None:
    lines = markdown(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert all(line.count("|") == len(HEADINGS) + 1 for line in lines)
    assert cells(ROWS[2])[:5] == ["c", "KL", "4", "9", "4"]
    assert cells(ROWS[2])[5] == "-"


def test_curves_have_a_line_per_kind_and_one_point_per_factor_for_bicubic() -> None:
    assert lines_over_f(ROWS, "rfid_same_pictures") == {
        "VQ": [(2, 1.0), (4, 5.0)],
        "KL": [(4, 4.0)],
        "bicubic": [(4, 50.0)],
    }


def test_curves_go_by_f_in_whatever_order_first_stages_were_named() -> None:
    assert lines_over_f(ROWS[::-1], "rfid_same_pictures")["VQ"] == [(2, 1.0), (4, 5.0)]


def test_a_row_comes_from_what_a_manifest_says(manifest: Manifest) -> None:
    (row,) = rows_of([manifest])
    assert (row["name"], row["kind"], row["f"], row["num_images"]) == ("cats-vq-f4", "vq", 4, 4)
