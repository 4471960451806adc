"""Pictures that samples start from, keep, or are drawn towards."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.edits import Edit, mask_of
from ldm.errors import ContractError
from ldm.latent_diffusion import LatentDiffusion, assemble, class_condition
from ldm.model import build_denoising, load_first_stage

FEW: dict[str, Any] = {"steps": 6, "micro_batch": 2}


@pytest.fixture(scope="module")
def model(kl_chain: Any) -> LatentDiffusion:
    """A model of random weights over a KL first stage, whose codes do not jump."""
    torch.manual_seed(0)
    recipe = kl_chain.recipe
    networks = build_denoising(recipe, num_classes=15).requires_grad_(False).eval()
    for parameter in networks.parameters():
        parameter += 0.02 * torch.randn(parameter.shape)
    first_stage = load_first_stage(kl_chain.store, kl_chain.first_stage)
    return assemble(recipe, networks, first_stage, scale=1.0, classes=recipe.dataset.classes)


@pytest.fixture(scope="module")
def image() -> Tensor:
    """One picture, (1, 3, 32, 32)."""
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def right_half() -> Tensor:
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    return mask


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean())


def test_little_strength_stays_near_the_picture(model: LatentDiffusion, image: Tensor) -> None:
    condition, z = class_condition(model, [3]), model.encode(image)
    far = [
        distance(model.sample_latents(condition, edit=Edit(image, strength=s), **FEW), z)
        for s in (0.17, 0.5, 1.0)
    ]
    assert far[0] < far[1] < far[2]
    nothing = distance(model.sample_latents(condition, **FEW), z)
    assert far[0] < 0.5 * nothing


def test_inpainting_keeps_what_the_mask_keeps_and_paints_the_rest(
    model: LatentDiffusion, image: Tensor
) -> None:
    condition, mask = class_condition(model, [3]), right_half()
    pictures = model.sample(condition, edit=Edit(image, mask=mask), **FEW)
    assert torch.equal(pictures[..., :16], image[..., :16])
    assert distance(pictures[..., 16:], image[..., 16:]) > 0.01
    latents = model.sample_latents(condition, edit=Edit(image, mask=mask), **FEW)
    z, alone = model.encode(image), model.sample_latents(condition, **FEW)
    assert distance(latents[..., :4], z[..., :4]) < 0.2 * distance(alone[..., :4], z[..., :4])


def test_what_is_painted_over_is_not_seen(model: LatentDiffusion, image: Tensor) -> None:
    condition, mask = class_condition(model, [3]), right_half()
    # the encoder looks across the border, so the two images differ at its far side alone
    other = image.clone()
    other[..., 28:] = 1.0
    z, other_z = model.encode(image), model.encode(other)
    made, other_made = (
        model.sample_latents(condition, edit=Edit(one, mask=mask), **FEW) for one in (image, other)
    )
    seen, painted = distance(z[..., 4:], other_z[..., 4:]), distance(made[..., 4:], other_made[..., 4:])
    assert painted < 0.05 * seen


def test_a_latent_position_is_kept_only_when_no_pixel_of_it_is_painted(
    model: LatentDiffusion, image: Tensor
) -> None:
    from ldm.edits import latent_edit

    mask = torch.zeros(1, 1, 32, 32)
    mask[0, 0, 5, 9] = 1
    known = latent_edit(Edit(image, mask=mask), model.encode, 4).known
    assert known is not None
    assert (known == 0).nonzero().tolist() == [[0, 0, 1, 2]]


def test_a_target_draws_samples_towards_it(model: LatentDiffusion) -> None:
    condition, large = class_condition(model, [3]), model.sample(class_condition(model, [9]), seed=5, **FEW)
    plain = model.sample(condition, **FEW)
    for shrink in (1, 4):
        target = F.avg_pool2d(large, shrink)
        guided = model.sample(condition, edit=Edit(target=target, target_scale=0.5 * shrink), **FEW)
        before, after = (distance(F.avg_pool2d(made, shrink), target) for made in (plain, guided))
        assert after < 0.7 * before


@pytest.mark.parametrize("kind", ["strength", "mask", "target"])
def test_an_edited_picture_does_not_depend_on_how_many_are_asked_for(
    model: LatentDiffusion, image: Tensor, kind: str
) -> None:
    edits = {
        "strength": Edit(image, strength=0.5),
        "mask": Edit(image, mask=right_half(), strength=0.9),
        "target": Edit(target=image, target_scale=0.05),
    }
    labels = [3, 0, 14, 7, 2]
    many = model.sample(class_condition(model, labels), edit=edits[kind], **FEW)
    for n in (1, 3):
        assert torch.equal(
            model.sample(class_condition(model, labels[:n]), edit=edits[kind], **FEW), many[:n]
        )


def test_each_sample_may_have_a_picture_of_its_own(model: LatentDiffusion, image: Tensor) -> None:
    both = torch.cat([image, -image])
    condition = class_condition(model, [3, 4])
    made = model.sample(condition, edit=Edit(both, strength=0.5), **FEW)
    shared = model.sample(condition, edit=Edit(image, strength=0.5), **FEW)
    assert torch.equal(made[0], shared[0])
    assert distance(made[1], shared[1]) > 1e-4
    with pytest.raises(ContractError, match=r"image must be one for all samples or one for each of 3, got 2"):
        model.sample(class_condition(model, [3, 4, 5]), edit=Edit(both, strength=0.5), **FEW)


def test_a_mask_is_where_a_picture_is_nearer_to_white() -> None:
    grey = np.stack([np.full((2, 2, 3), level, np.uint8) for level in (0, 127, 128, 255)])
    assert mask_of(grey)[:, 0, 0, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda x: Edit(x), r"changed by a strength, a mask or both.* strength None, mask none"),
        (lambda x: Edit(strength=0.5), r"they need an image, got image none, strength 0.5"),
        (lambda x: Edit(x, strength=0.0), r"strength \(0.0\) must be above 0 and at most 1"),
        (lambda x: Edit(x, strength=1.5), r"strength \(1.5\) must be above 0 and at most 1"),
        (lambda x: Edit(x, mask=torch.full((1, 1, 32, 32), 0.5)), r"a mask must be 1 .* got other numbers"),
        (lambda x: Edit(x, mask=torch.ones(1, 1, 8, 8)), r"mask must have the shape \(B, 1, 32, 32\), got"),
    ],
)
def test_an_edit_that_makes_no_sense_is_refused(image: Tensor, edit: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        edit(image)


def test_an_image_of_another_size_than_the_condition_is_refused(model: LatentDiffusion) -> None:
    large = torch.zeros(1, 3, 64, 32)
    assert model.sample(class_condition(model, [1]), edit=Edit(large, strength=0.5), **FEW).shape[2:] == (
        64,
        32,
    )
    with pytest.raises(ContractError, match=r"must be as large as the samples, 32x32, got 64x32; scale it"):
        model.sample(
            class_condition(model, [1]),
            edit=Edit(large, strength=0.5),
            start=torch.zeros(1, 4, 8, 8),
            **FEW,
        )
