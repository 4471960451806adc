"""The stage evaluate: a model -> scores beside their floor, and pictures to look at."""

from collections.abc import Mapping
from typing import Any

from datasets.manifest import Manifest
from ldm.config import Recipe
from ldm.stages.stage import Job, Result, Stage

MIB = 2**20
NUM_SETS = 5
FEATURE_BYTES = 4 * 2048


def what(recipe: Recipe) -> dict[str, Any]:
    """How samples are drawn and scored."""
    return {
        "sampling": recipe.sampling.model_dump(mode="json"),
        "evaluation": recipe.evaluation.model_dump(mode="json"),
        "threads": recipe.threads,
    }


def need_bytes(recipe: Recipe, inputs: Mapping[str, Manifest]) -> int:
    """Five sets of pictures and their features, and the Inception's weights."""
    del inputs
    picture = 3 * recipe.dataset.image_size_px**2
    return 100 * MIB + NUM_SETS * recipe.evaluation.num_images * (picture + FEATURE_BYTES)


def build(job: Job) -> Result:
    """Score the model; the scoring library takes seconds to import, so that happens here."""
    from ldm.evaluation.score import score

    return score(job)


EVALUATE = Stage(
    name="evaluate",
    code_version=2,
    inputs={
        "shards": "download-shards",
        "first_stage": "train-first-stage",
        "latents": "encode-latents",
        "model": "train-ldm",
    },
    what=what,
    build=build,
    need_bytes=need_bytes,
)
