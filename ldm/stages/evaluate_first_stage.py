"""The stage evaluate-first-stage: a first stage -> rFID, PSNR, SSIM, LPIPS beside those of bicubic."""

from collections.abc import Mapping
from typing import Any

from datasets.manifest import Manifest
from ldm.config import Recipe
from ldm.stages.stage import Job, Result, Stage

MIB = 2**20
NUM_SETS = 4
FEATURE_BYTES = 4 * 2048


def what(recipe: Recipe) -> dict[str, Any]:
    """How many pictures are scored, and what decides their last bits."""
    return {
        "num_images": recipe.evaluation.num_images,
        "micro_batch": recipe.evaluation.micro_batch,
        "encoding_micro_batch": recipe.encoding.micro_batch,
        "threads": recipe.threads,
    }


def need_bytes(recipe: Recipe, inputs: Mapping[str, Manifest]) -> int:
    """Features of four sets, the Inception's weights, and a picture."""
    del inputs
    return 100 * MIB + NUM_SETS * recipe.evaluation.num_images * FEATURE_BYTES


def build(job: Job) -> Result:
    """Score the first stage; the scoring library takes seconds to import, so that happens here."""
    from ldm.evaluation.first_stage import score

    return score(job)


EVALUATE_FIRST_STAGE = Stage(
    name="evaluate-first-stage",
    code_version=1,
    inputs={"shards": "download-shards", "first_stage": "train-first-stage"},
    what=what,
    build=build,
    need_bytes=need_bytes,
)
