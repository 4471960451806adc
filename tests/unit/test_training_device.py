"""Training places every tensor on its device: on "meta", which mixes with none, a stray one is an error."""

from collections.abc import Callable
from typing import Protocol

import pytest
import torch

from datasets.manifest import Manifest
from datasets.store import Store
from datasets.stream import SampleReader
from ldm.config import Recipe
from ldm.training.diffusion import DiffusionTrainee
from ldm.training.first_stage import FirstStageTrainee


class Chain(Protocol):
    recipe: Recipe
    store: Store
    first_stage: Manifest
    latents: Manifest

    def reader(self, *, split: str = "train") -> SampleReader: ...


MakeTrainee = Callable[..., DiffusionTrainee]


def with_training(recipe: Recipe, **settings: object) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=settings)})


@pytest.mark.parametrize("kind", ["vq", "kl"])
@pytest.mark.parametrize("learned", [False, True])
def test_a_step_of_the_unet_stays_on_its_device(
    kind: str, learned: bool, request: pytest.FixtureRequest, diffusion_trainee: MakeTrainee
) -> None:
    chain: Chain = request.getfixturevalue(f"{kind}_chain")
    changed = {"learn_log_variance": learned, "weighting": "simple" if learned else "min_snr"}
    recipe = chain.recipe.model_copy(update={"diffusion": chain.recipe.diffusion.model_copy(update=changed)})
    trainee = diffusion_trainee(chain, recipe, device="meta")
    logged = trainee.backward(trainee.batches.at(0), 0, 0)
    assert logged["loss"].device.type == "meta"
    gradients = [parameter.grad for parameter in trainee.networks.parameters()]
    assert all(gradient is not None and gradient.device.type == "meta" for gradient in gradients)
    trainee.ema.update(0)


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_a_step_of_the_first_stage_stays_on_its_device(
    kind: str, tiny_recipe: Callable[..., Recipe], cats: Callable[[str], SampleReader]
) -> None:
    kinds = {"vq": (), "kl": ("first_stage.model.kind=kl", "first_stage.model.num_codes=null")}
    recipe = tiny_recipe("first_stage.loss.perceptual_weight=1", *kinds[kind]).first_stage
    trainee = FirstStageTrainee(recipe, cats("train"), cats("held_out"), device="meta")
    x = trainee.batch(0)
    encoded = trainee.encode_shard(x, 0, 0)
    logged = trainee.backward(encoded, x, 0, adversarial=True, measured=True)
    assert {value.device.type for value in logged.values()} == {"meta"}
    trainee.ema.update(0)


def test_bfloat16_trains_near_float32_and_keeps_weights_in_float32(
    vq_chain: Chain,
    tiny_recipe: Callable[..., Recipe],
    cats: Callable[[str], SampleReader],
    diffusion_trainee: MakeTrainee,
) -> None:
    for_unet = [
        diffusion_trainee(vq_chain, with_training(vq_chain.recipe, precision=precision))
        for precision in ("float32", "bfloat16")
    ]
    shared = ("first_stage.loss.perceptual_weight=1", "first_stage.loss.adversarial_start_images=0")
    of_first_stage = [
        FirstStageTrainee(
            tiny_recipe(*shared, f"first_stage.training.precision={precision}").first_stage,
            cats("train"),
            cats("held_out"),
        )
        for precision in ("float32", "bfloat16")
    ]
    for exact, rounded in (for_unet, of_first_stage):
        ours, theirs = exact.gradients(0), rounded.gradients(0)
        assert ours["gradient_norm"] != theirs["gradient_norm"]
        assert ours["loss"].item() == pytest.approx(theirs["loss"].item(), rel=0.02)
        rounded.update(0)
        assert {value.dtype for value in rounded.tensors().values()} <= {torch.float32, torch.int64}
