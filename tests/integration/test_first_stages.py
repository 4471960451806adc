import math
import re
from collections.abc import Callable

import pytest
import torch

from datasets.stream import SampleReader
from ldm.config import Recipe
from ldm.training.first_stage import FirstStageTrainee

MULT = {
    1: "[1]",
    2: "[1,2]",
    4: "[1,2,2]",
    8: "[1,1,2,2]",
    16: "[1,1,1,2,2]",
    32: "[1,1,1,1,2,2]",
}
KINDS = {
    "vq": ["first_stage.model.kind=vq"],
    "kl": ["first_stage.model.kind=kl", "first_stage.model.num_codes=null"],
}
QUERY_OR_KEY = re.compile(r"\.attn\S*\.[qk]\.")
"""Attention to a single position is that position whatever query and key are: they move by rounding alone."""
Cats = Callable[[str], SampleReader]


def trained(recipe: Recipe, cats: Cats, *, num_steps: int = 2) -> FirstStageTrainee:
    """A first stage after some steps, each of which moved every weight and gave finite numbers."""
    trainee = FirstStageTrainee(recipe.first_stage, cats("train"), cats("held_out"))
    one_position = recipe.latent_size == 1
    for step in range(num_steps):
        before = {name: p.detach().clone() for name, p in trainee.model.named_parameters()}
        logged = {
            name: value.item() for name, value in (trainee.gradients(step) | trainee.update(step)).items()
        }
        assert all(map(math.isfinite, logged.values())), logged
        assert {"loss", "generator", "discriminator", "adaptive_weight"} <= logged.keys()
        same = [name for name, p in trainee.model.named_parameters() if torch.equal(p, before[name])]
        assert [name for name in same if not (one_position and QUERY_OR_KEY.search(name))] == []
    assert trainee.look({})["reconstructions"].startswith(b"\x89PNG")
    return trainee


@pytest.mark.parametrize("factor", list(MULT))
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_first_stage_builds_and_trains_two_steps(
    kind: str, factor: int, tiny_recipe: Callable[..., Recipe], cats: Cats
) -> None:
    recipe = tiny_recipe(
        *KINDS[kind],
        f"first_stage.model.channel_mult={MULT[factor]}",
        f"first_stage.model.attention_factors=[{factor}]",
        "first_stage.loss.adversarial_start_images=0",
        "unet.channel_mult=[1]",
    )
    assert recipe.first_stage.model.factor == factor
    trained(recipe, cats)


@pytest.mark.parametrize("kind", list(KINDS))
def test_all_terms_of_the_objective_work_together(
    kind: str, tiny_recipe: Callable[..., Recipe], cats: Cats
) -> None:
    recipe = tiny_recipe(
        *KINDS[kind],
        "first_stage.loss.perceptual_weight=1",
        "first_stage.loss.adversarial_start_images=0",
        "first_stage.training.clip_norm=1",
    )
    trained(recipe, cats, num_steps=3)
