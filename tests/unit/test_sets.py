"""The sets of pictures that are scored."""

import numpy as np
import pytest

from ldm.config import Recipe
from ldm.evaluation.sets import SETS, decode_noise, make_set, num_scored, reconstruct, sample_labels
from ldm.latent_diffusion import LatentDiffusion, assemble
from ldm.latents import contract_of
from ldm.model import build_denoising, load_first_stage


@pytest.fixture(scope="module")
def recipe(tiny_recipe) -> Recipe:
    return tiny_recipe("evaluation.num_images=5")


@pytest.fixture(scope="module")
def model(vq_chain, recipe: Recipe) -> LatentDiffusion:
    first_stage = load_first_stage(vq_chain.store, vq_chain.first_stage)
    networks = build_denoising(recipe, num_classes=15).eval()
    return assemble(recipe, networks, first_stage, scale=1.0, classes=recipe.dataset.classes)


@pytest.fixture(scope="module")
def pictures(vq_chain, cats, recipe: Recipe, model: LatentDiffusion) -> dict[str, np.ndarray]:
    contract = contract_of(vq_chain.latents)
    parts = {"recipe": recipe, "model": model, "contract": contract, "held_out": cats("held_out")}
    return {name: make_set(name, **parts, on_step=lambda done, total: None) for name in SETS}


def test_all_sets_have_the_same_number_of_pictures_of_the_same_size(pictures: dict[str, np.ndarray]) -> None:
    assert {images.shape for images in pictures.values()} == {(5, 32, 32, 3)}
    assert {images.dtype for images in pictures.values()} == {np.dtype(np.uint8)}


def test_reference_and_real_pictures_share_none(pictures: dict[str, np.ndarray]) -> None:
    reference, real = ({image.tobytes() for image in pictures[name]} for name in ("reference", "real"))
    assert len(reference) == len(real) == 5
    assert not reference & real


def test_fewer_held_out_pictures_make_smaller_sets_not_overlapping_ones(cats, tiny_recipe) -> None:
    assert num_scored(tiny_recipe("evaluation.num_images=400"), cats("held_out")) == 6


def test_every_class_is_asked_for_equally_often() -> None:
    labels = sample_labels(15, 400)
    counts = np.bincount(labels, minlength=15)
    assert counts.max() - counts.min() <= 1
    assert sample_labels(0, 3) == [-1, -1, -1]


def test_a_reconstruction_does_not_depend_on_how_many_were_asked_for(cats, model: LatentDiffusion) -> None:
    images = cats("held_out").fetch(range(7))["image"]
    all_of_them = reconstruct(model.first_stage, images, micro_batch=4)
    assert np.array_equal(all_of_them[:3], reconstruct(model.first_stage, images[:3], micro_batch=4))


def test_noise_decodings_are_a_function_of_the_seed(vq_chain, model: LatentDiffusion, recipe: Recipe) -> None:
    contract = contract_of(vq_chain.latents)
    first, second = (
        decode_noise(model.first_stage, contract, model.latent_shape, 4, recipe=recipe) for _ in range(2)
    )
    assert np.array_equal(first, second)
