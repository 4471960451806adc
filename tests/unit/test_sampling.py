"""Sampling: what decides the bits of a picture, and what does not."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from datasets.manifest import Manifest
from datasets.store import Store
from ldm.config import Recipe, Sampling
from ldm.errors import ContractError, RecipeError
from ldm.latent_diffusion import LatentDiffusion, assemble, class_condition
from ldm.model import build_denoising, load_first_stage
from ldm.models.first_stage import VQModel
from ldm.network_config import CaptionConditioning, ClassConditioning
from ldm.range import to_uint8
from ldm.sampling import passes

LABELS = [3, 0, 14, -1, 7, 7, 2, 9]
CAPTIONS = ["a red cat", "a blue cat that sleeps on a wall", "", "two dogs", "rain", "a cat", "sun", "a hat"]
OTHERS = ["plms", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "euler", "heun"]


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


def captioned_model(chain: Chain) -> LatentDiffusion:
    """A model asked by texts, through a transformer of its own."""
    conditioning = CaptionConditioning(kind="caption", context_dim=16, depth=1)
    return some_model(chain, chain.recipe.model_copy(update={"conditioning": conditioning}))


def settings_of(chain: Chain, **changes: Any) -> dict[str, Any]:
    """The recipe's sampling, changed."""
    return dict(chain.recipe.sampling) | changes


def latents_of(model: LatentDiffusion, labels: Sequence[int], settings: dict[str, Any]) -> Tensor:
    return model.sample_latents(class_condition(model, labels), num=len(labels), **settings)


@pytest.mark.parametrize(
    ("sampler", "eta", "guidance"),
    [("ddim", 0.0, 1.5), ("ddim", 1.0, 1.0), *((sampler, 0.0, 1.5) for sampler in OTHERS)],
)
def test_a_seed_gives_the_same_bits_however_many_pictures_are_asked_for(
    vq_chain: Chain, sampler: str, eta: float, guidance: float
) -> None:
    model = some_model(vq_chain)
    settings = settings_of(vq_chain, sampler=sampler, eta=eta, guidance=guidance)
    one, three, eight = (model.sample(class_condition(model, LABELS[:n]), **settings) for n in (1, 3, 8))
    assert eight.shape == (8, 3, 32, 32)
    assert torch.equal(eight[:3], three)
    assert torch.equal(three[:1], one)
    assert torch.equal(model.sample(class_condition(model, LABELS), **settings), eight)


def test_a_prompt_gives_the_same_bits_whatever_others_are_asked_for(vq_chain: Chain) -> None:
    model, settings = captioned_model(vq_chain), settings_of(vq_chain)
    eight = model.sample(model.condition(caption=CAPTIONS), **settings)
    for n in (1, 3):
        assert torch.equal(model.sample(model.condition(caption=CAPTIONS[:n]), **settings), eight[:n])
    others = model.condition(caption=[CAPTIONS[0], "another picture"])
    assert torch.equal(model.sample(others, **settings)[0], eight[0])
    assert not torch.allclose(model.sample(others, **settings)[1], eight[1], atol=1e-3)


def test_each_condition_is_encoded_by_itself(vq_chain: Chain) -> None:
    model, sizes = captioned_model(vq_chain), list[int]()
    encoder = model.networks.conditioner
    assert encoder is not None
    encoder.register_forward_hook(lambda module, given, made: sizes.append(len(made)))
    assert len(model.condition(caption=CAPTIONS)) == 8
    assert sizes == [1] * 8


@pytest.mark.parametrize(("other", "guidance"), [(1, 1.5), (3, 1.0), (8, 1.5)])
def test_another_micro_batch_changes_next_to_nothing(kl_chain: Chain, other: int, guidance: float) -> None:
    model = some_model(kl_chain)
    few: dict[str, Any] = {"steps": 20, "guidance": guidance, "seed": 3}
    condition = class_condition(model, LABELS)
    pictures = [to_uint8(model.sample(condition, micro_batch=n, **few)).astype(int) for n in (4, other)]
    differences = abs(pictures[0] - pictures[1])
    assert (differences == 0).mean() >= 0.999
    assert differences.max() <= 2


def test_another_micro_batch_changes_few_codes(vq_chain: Chain) -> None:
    model = some_model(vq_chain)
    first_stage, condition = model.first_stage, class_condition(model, LABELS)
    assert isinstance(first_stage, VQModel)
    codes = [
        first_stage.quantize.nearest(
            model.sample_latents(condition, steps=20, guidance=1.5, micro_batch=n) / model.config.scale
        )
        for n in (4, 1, 3, 8)
    ]
    for other in codes[1:]:
        assert float((codes[0] != other).float().mean()) <= 0.002  # measured: 0 of 512


def test_passes_cover_every_picture_once_and_are_padded() -> None:
    parts = passes(7, 3)
    assert [list(part.indices) for part in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [part.rows.tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]
    noise = parts[2].noise((2, 2), 5, "x_T")
    assert torch.equal(noise[0], passes(7, 7)[0].noise((2, 2), 5, "x_T")[6])


def test_seed_label_and_guidance_each_change_the_latent(vq_chain: Chain) -> None:
    model = some_model(vq_chain)
    latent = latents_of(model, [3], settings_of(vq_chain))
    others = [
        latents_of(model, [3], settings_of(vq_chain, seed=1)),
        latents_of(model, [4], settings_of(vq_chain)),
        latents_of(model, [-1], settings_of(vq_chain)),
        latents_of(model, [3], settings_of(vq_chain, guidance=3.0)),
    ]
    assert not any(torch.allclose(latent, other, atol=1e-4) for other in others)


def test_interval_and_rescale_of_guidance_are_heeded(vq_chain: Chain) -> None:
    model = some_model(vq_chain)
    plain, strong = (latents_of(model, [3], settings_of(vq_chain, guidance=g)) for g in (1.0, 4.0))
    nowhere = latents_of(model, [3], settings_of(vq_chain, guidance=4.0, guidance_interval=(998, 999)))
    torch.testing.assert_close(nowhere, plain, atol=1e-4, rtol=0)
    rescaled = latents_of(model, [3], settings_of(vq_chain, guidance=4.0, guidance_rescale=1.0))
    assert not torch.allclose(rescaled, strong, atol=1e-3)


def test_ancestral_sampling_takes_all_steps_of_a_model(
    vq_chain: Chain, tiny_recipe: Callable[..., Recipe]
) -> None:
    recipe = tiny_recipe("diffusion.num_timesteps=6", "sampling.sampler=ddpm", "sampling.steps=6")
    model, settings = some_model(vq_chain, recipe), dict(recipe.sampling)
    told: list[int] = []
    latents = latents_of(model, [3, 4, 5], settings | {"on_step": lambda i, n: told.append(i)})
    assert told == [1, 2, 3, 4, 5, 6]
    assert torch.equal(latents_of(model, [3], settings), latents[:1])
    with pytest.raises(RecipeError, match=r"steps \(3\) must be diffusion.num_timesteps \(6\) for sampler"):
        latents_of(model, [3], settings | {"steps": 3})


def test_decoding_with_a_gradient_gives_the_same_pictures_and_reaches_the_latent(vq_chain: Chain) -> None:
    model = some_model(vq_chain)
    latents = latents_of(model, [3, 4], settings_of(vq_chain)).requires_grad_()
    pictures = model.decode_with_gradient(latents)
    torch.testing.assert_close(pictures, model.decode(latents.detach()), rtol=1e-4, atol=1e-4)
    pictures.square().sum().backward()
    assert latents.grad is not None
    assert latents.grad.any()


def test_pictures_with_one_label_differ(vq_chain: Chain) -> None:
    first, second = latents_of(some_model(vq_chain), [7, 7], settings_of(vq_chain))
    assert not torch.allclose(first, second, atol=1e-2)


def test_progress_counts_every_evaluation(vq_chain: Chain) -> None:
    told: list[tuple[int, int]] = []
    model = some_model(vq_chain)
    latents_of(model, LABELS[:5], settings_of(vq_chain, on_step=lambda i, n: told.append((i, n))))
    assert told == [(i + 1, 6) for i in range(6)]  # two passes of three steps


def test_every_setting_of_a_recipe_is_one_of_the_model(vq_chain: Chain) -> None:
    model = some_model(vq_chain)
    assert len(Sampling.model_fields) == 8
    assert model.sample(class_condition(model, [1]), **dict(vq_chain.recipe.sampling)).shape == (1, 3, 32, 32)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"step": 5}, r"sampling: step: Extra inputs .*; settings are sampler, steps, eta"),
        ({"sampler": "euler", "eta": 0.5}, r"eta \(0.5\) is the noise of sampler ddim"),
        ({"steps": 1000}, r"sampling.steps \(1000\) must be below diffusion.num_timesteps \(1000\)"),
        ({"micro_batch": 0}, r"micro_batch: Input should be greater than 0"),
    ]
    for wrong, message in refused:
        with pytest.raises(RecipeError, match=message):
            model.sample(class_condition(model, [1]), **wrong)


@pytest.mark.parametrize("label", [16, -2])
def test_a_class_the_model_does_not_know_is_refused(vq_chain: Chain, label: int) -> None:
    with pytest.raises(ContractError, match=rf"class_label must be -1 to 15 for this model, got \[{label}\]"):
        class_condition(some_model(vq_chain), [0, label])


def test_guidance_of_an_unconditional_model_is_refused(vq_chain: Chain) -> None:
    recipe = vq_chain.recipe
    bare = recipe.model_copy(
        update={"conditioning": None, "unet": recipe.unet.model_copy(update={"context_dim": None})}
    )
    model = some_model(vq_chain, bare)
    assert class_condition(model, [-1]) is None
    with pytest.raises(ContractError, match=r"\(unconditional\) was not; use guidance=1"):
        model.sample(**settings_of(vq_chain))
    assert model.sample(num=2, **settings_of(vq_chain, guidance=1.0)).shape == (2, 3, 32, 32)


def test_a_model_without_a_null_class_samples_its_classes_but_is_neither_guided_nor_asked_for_nothing(
    vq_chain: Chain,
) -> None:
    recipe = vq_chain.recipe
    conditioning = ClassConditioning(kind="class_label", context_dim=16, null_class=False, drop_rate=0.0)
    model = some_model(vq_chain, recipe.model_copy(update={"conditioning": conditioning}))
    plain = settings_of(vq_chain, guidance=1.0)
    assert model.sample(class_condition(model, [14]), **plain).shape == (1, 3, 32, 32)
    with pytest.raises(ContractError, match=r"class_label must be 0 to 14 for this model, got \[-1\]"):
        class_condition(model, [-1])
    with pytest.raises(ContractError, match=r"conditioned on class_label\) was not; use guidance=1"):
        model.sample(class_condition(model, [14]), **settings_of(vq_chain))


def test_a_condition_that_is_no_class_must_be_given(vq_chain: Chain) -> None:
    model = captioned_model(vq_chain)
    assert model.classes == ()
    with pytest.raises(ContractError, match=r"got none; make it by model.condition\(caption\)"):
        model.sample(guidance=1.0)
