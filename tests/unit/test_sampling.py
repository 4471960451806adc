from collections.abc import Sequence
from typing import Protocol

import pytest
import torch

from datasets.manifest import Manifest
from datasets.store import Store
from ldm.config import Recipe
from ldm.errors import ContractError
from ldm.model import LatentDiffusion, assemble, build_denoising, load_first_stage
from ldm.network_config import CaptionConditioning, ClassConditioning

LABELS = [3, 0, 14, -1, 7, 7, 2, 9]


class Chain(Protocol):
    """What the fixtures of conftest.py give."""

    recipe: Recipe
    store: Store
    first_stage: Manifest


def some_model(chain: Chain, recipe: Recipe | None = None) -> LatentDiffusion:
    """A model of random weights, none of them zero, so that conditions and guidance tell."""
    recipe = recipe or chain.recipe
    torch.manual_seed(0)
    networks = build_denoising(recipe, num_classes=15).requires_grad_(False).eval()
    for parameter in networks.parameters():
        parameter += 0.1 * torch.randn(parameter.shape)
    first_stage = load_first_stage(chain.store, chain.first_stage)
    classes: Sequence[str] = [f"colour {label}" for label in range(15)]
    return assemble(recipe, networks, first_stage, scale=2.0, classes=classes)


@pytest.mark.parametrize(("eta", "guidance"), [(0.0, 1.5), (1.0, 1.0)])
def test_a_seed_gives_the_same_bits_however_many_pictures_are_asked_for(
    vq_chain: Chain, eta: float, guidance: float
) -> None:
    model = some_model(vq_chain)
    sampling = vq_chain.recipe.sampling.model_copy(update={"eta": eta, "guidance": guidance})
    all_eight, three = model.sample(LABELS, sampling), model.sample(LABELS[:3], sampling)
    assert all_eight.shape == (8, 3, 32, 32)
    assert torch.equal(all_eight[:3], three)
    assert torch.equal(model.sample(LABELS, sampling), all_eight)


def test_seed_label_and_guidance_each_change_the_latent(vq_chain: Chain) -> None:
    model, sampling = some_model(vq_chain), vq_chain.recipe.sampling
    latent = model.sample_latents([3], sampling)
    others = [
        model.sample_latents([3], sampling.model_copy(update={"seed": 1})),
        model.sample_latents([4], sampling),
        model.sample_latents([-1], sampling),
        model.sample_latents([3], sampling.model_copy(update={"guidance": 3.0})),
    ]
    assert not any(torch.allclose(latent, other, atol=1e-4) for other in others)


def test_pictures_with_one_label_differ(vq_chain: Chain) -> None:
    first, second = some_model(vq_chain).sample_latents([7, 7], vq_chain.recipe.sampling)
    assert not torch.allclose(first, second, atol=1e-2)


def test_progress_counts_every_evaluation(vq_chain: Chain) -> None:
    told: list[tuple[int, int]] = []
    some_model(vq_chain).sample(
        LABELS[:5], vq_chain.recipe.sampling, on_step=lambda i, n: told.append((i, n))
    )
    assert told == [(i + 1, 6) for i in range(6)]  # two passes of three steps


@pytest.mark.parametrize("label", [15, -2])
def test_a_class_the_model_does_not_know_is_refused(vq_chain: Chain, label: int) -> None:
    with pytest.raises(ContractError, match=rf"-1 \(none\) to 14 for this model, got \[{label}\]"):
        some_model(vq_chain).sample([0, label], vq_chain.recipe.sampling)


def test_guidance_of_an_unconditional_model_is_refused(vq_chain: Chain) -> None:
    recipe = vq_chain.recipe
    bare = recipe.model_copy(
        update={"conditioning": None, "unet": recipe.unet.model_copy(update={"context_dim": None})}
    )
    model = some_model(vq_chain, bare)
    with pytest.raises(ContractError, match=r"use sampling\.guidance=1"):
        model.sample([-1], recipe.sampling)
    plain = recipe.sampling.model_copy(update={"guidance": 1.0})
    assert model.sample([-1], plain).shape == (1, 3, 32, 32)


def test_a_model_without_a_null_class_samples_its_classes_but_is_neither_guided_nor_asked_for_nothing(
    vq_chain: Chain,
) -> None:
    recipe = vq_chain.recipe
    conditioning = ClassConditioning(kind="class_label", context_dim=16, null_class=False, drop_rate=0.0)
    model = some_model(vq_chain, recipe.model_copy(update={"conditioning": conditioning}))
    plain = recipe.sampling.model_copy(update={"guidance": 1.0})
    assert model.sample([14], plain).shape == (1, 3, 32, 32)
    with pytest.raises(ContractError, match=r"class labels must be 0 to 14 for this model, got \[-1\]"):
        model.sample([-1], plain)
    with pytest.raises(ContractError, match=r"a null condition, and this one has none; use sampling.guid"):
        model.sample([14], recipe.sampling)


def test_a_condition_that_is_no_class_cannot_be_asked_for_by_label(vq_chain: Chain) -> None:
    recipe = vq_chain.recipe
    conditioning = CaptionConditioning(kind="caption", context_dim=16, depth=1)
    model = some_model(vq_chain, recipe.model_copy(update={"conditioning": conditioning}))
    plain = recipe.sampling.model_copy(update={"guidance": 1.0})
    with pytest.raises(ContractError, match=r"asked for by class label alone so far, .*TokenEncoder"):
        model.sample([-1], plain)
