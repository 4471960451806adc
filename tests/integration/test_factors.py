"""The order of the paper's Tab. 8 in two minutes: with equal steps, reconstructions get worse as f grows."""

from itertools import pairwise
from pathlib import Path

import pytest

from flows.compare_first_stages import overrides_for
from flows.first_stage_scores import rows_of
from flows.produce import make
from flows.request import Request

FACTORS = {"cats-vq-f2": 2, "cats-vq-f4": 4, "cats-vq-f8": 8}
SHORT = [
    "dataset.source.train=2000",
    "dataset.source.held_out=80",
    "dataset.source.dead=0",
    "first_stage.training.num_images=2400",
    "first_stage.training.batch_size=8",
    "first_stage.training.warmup_images=160",
    "first_stage.training.lr=0.001",
    "first_stage.training.ema_decay=0.9",
    "first_stage.loss.perceptual_weight=0",
    "first_stage.loss.adversarial_weight=0",
    "first_stage.loss.revive_after_images=200",
    "first_stage.validation.every_images=0",
    "evaluation.num_images=80",
]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_reconstructions_get_worse_as_f_grows(tmp_path: Path) -> None:
    manifests = []
    for name in FACTORS:
        request = Request.resolve("demo", overrides_for(name, SHORT), str(tmp_path))
        for stage in ("download-shards", "train-first-stage", "evaluate-first-stage"):
            request.found[stage] = request.find(stage) or make.fn(request, stage)
        manifests.append(request.found["evaluate-first-stage"])
    rows = rows_of(manifests)
    assert [row["f"] for row in rows] == list(FACTORS.values())
    for finer, coarser in pairwise(rows):
        assert finer["psnr_db"] > coarser["psnr_db"] + 0.5, (finer, coarser)
    assert rows[0]["rfid_same_pictures"] < rows[-1]["rfid_same_pictures"], rows  # neighbours need longer runs
