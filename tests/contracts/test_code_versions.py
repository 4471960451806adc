"""What a stage makes of a fixed tiny input is written down here, beside its version (decision 0007).

When a test fails because a stage's output was changed on purpose, raise its version (`code_version`, or
`CODE_VERSION` in datasets) and put in the numbers of the failing test's message. Training is compared within
a tolerance, because other processors give other last bits.
"""

import json

import pytest

from ldm.stages import STAGES
from ldm.stages.stage import Job
from ldm.training.report import Silent

TOLERANCE = 2e-3
FIRST_STAGE = (3, 0.46793)
LATENTS = (1, 6.7026)
UNET = (3, 0.92506)


def last(values: dict[str, list[list[float]]]) -> float:
    """The last logged loss."""
    return values["loss"][-1][1]


def test_the_first_stage_ends_at_the_loss_written_down(vq_chain) -> None:
    history = json.loads(vq_chain.store.read(vq_chain.first_stage, "history.json"))
    assert (vq_chain.first_stage.content.code_version, last(history)) == pytest.approx(
        FIRST_STAGE, rel=TOLERANCE
    )


def test_latents_have_the_scale_written_down(vq_chain) -> None:
    content = vq_chain.latents.content
    found = (content.code_version, content.statistics["contract"]["scale"])
    assert found == pytest.approx(LATENTS, rel=TOLERANCE)


def test_the_unet_ends_at_the_loss_written_down(vq_chain, tiny_recipe) -> None:
    stage = STAGES["train-ldm"]
    inputs = {"latents": vq_chain.latents, "first_stage": vq_chain.first_stage}
    recipe = tiny_recipe()
    job = Job(stage, vq_chain.store, recipe, stage.key(recipe, inputs), inputs, Silent())
    manifest = stage.run(job, dict)
    history = json.loads(vq_chain.store.read(manifest, "history.json"))
    assert (manifest.content.code_version, last(history)) == pytest.approx(UNET, rel=TOLERANCE)
