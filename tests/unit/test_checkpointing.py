"""Gradient checkpointing changes where the memory goes, not one bit of what is learned."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from datasets.stream import SampleReader
from ldm.config import Recipe
from ldm.models.first_stage import VQModel, build_first_stage
from ldm.stages.train_first_stage import what
from ldm.training.first_stage import FirstStageTrainee

Cats = Callable[[str], SampleReader]
ON = "first_stage.gradient_checkpointing=true"
KINDS = {
    "vq": (),
    "kl": ("first_stage.model.kind=kl", "first_stage.model.num_codes=null"),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_training_gives_the_same_bits_with_checkpointing(
    kind: str, tiny_recipe: Callable[..., Recipe], cats: Cats
) -> None:
    settings = (
        *KINDS[kind],
        "first_stage.model.dropout=0.2",
        "first_stage.loss.adversarial_start_images=4",
    )
    found: list[dict[str, Tensor]] = []
    for option in ((), (ON,)):
        recipe = tiny_recipe(*settings, *option).first_stage
        trainee = FirstStageTrainee(recipe, cats("train"), cats("held_out"))
        torch.manual_seed(0)  # of the dropout
        for step in range(3):
            trainee.gradients(step)
            trainee.update(step)
        found.append(trainee.tensors())
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys()
    assert [name for name in plain if not torch.equal(plain[name], checkpointed[name])] == []


def test_checkpointing_keeps_less_for_the_backward_pass(tiny_recipe: Callable[..., Recipe]) -> None:
    def kept(*, checkpointing: bool) -> int:
        torch.manual_seed(0)
        model = build_first_stage(tiny_recipe().first_stage.model, checkpointing=checkpointing)
        assert isinstance(model, VQModel)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.zeros(2, 3, 32, 32))
        return sum(sizes.values())

    assert kept(checkpointing=True) < 0.6 * kept(checkpointing=False)


def test_checkpointing_is_no_part_of_the_key(tiny_recipe: Callable[..., Recipe]) -> None:
    assert tiny_recipe(ON).first_stage.gradient_checkpointing
    assert what(tiny_recipe(ON)) == what(tiny_recipe())
