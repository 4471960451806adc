from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from datasets.stream import SampleReader
from ldm.config import Recipe
from ldm.first_stage_config import FirstStageRecipe
from ldm.models.discriminator import hinge_loss
from ldm.training.first_stage import FirstStageTrainee
from ldm.training.first_stage_loss import (
    MAX_ADAPTIVE_WEIGHT,
    Encoded,
    adaptive_weight,
    forward,
    reconstruction_loss,
)
from ldm.training.randomness import generator

Cats = Callable[[str], SampleReader]
KINDS = {
    "vq": ("first_stage.model.kind=vq", "first_stage.model.beta=0.25"),
    "kl": (
        "first_stage.model.kind=kl",
        "first_stage.model.num_codes=null",
        "first_stage.loss.kl_weight=0.01",
    ),
}


@pytest.fixture(params=list(KINDS))
def recipe(request: pytest.FixtureRequest, tiny_recipe: Callable[..., Recipe]) -> FirstStageRecipe:
    return tiny_recipe(*KINDS[request.param]).first_stage


@pytest.fixture
def trainee(recipe: FirstStageRecipe, cats: Cats) -> FirstStageTrainee:
    return FirstStageTrainee(recipe, cats("train"), cats("held_out"))


def encoded_batch(trainee: FirstStageTrainee) -> tuple[Tensor, Encoded]:
    x = trainee.batch(0)
    return x, forward(trainee.model, x, trainee.loss, generator(0, "posterior"))


def plain_terms(trainee: FirstStageTrainee, x: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
    """Reconstruction and adversarial loss, as functions of the weights."""
    error = (encoded.reconstruction - x).abs()
    summed = trainee.config.kind == "kl"
    return (
        error.sum() / len(x) if summed else error.mean(),
        -trainee.discriminator(encoded.reconstruction).mean(),
    )


def plain_weight(trainee: FirstStageTrainee, rec: Tensor, adv: Tensor) -> Tensor:
    """The definition: one backward pass through everything for each of the two terms."""
    last = trainee.model.decoder.last_layer
    rec_norm, adv_norm = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (rec, adv))
    return (rec_norm / (adv_norm + 1e-4)).clamp(0, 1e4)


def test_the_adaptive_weight_is_its_definition_and_one_pass_gives_the_plain_gradients(
    trainee: FirstStageTrainee,
) -> None:
    x, encoded = encoded_batch(trainee)
    rec, adv = plain_terms(trainee, x, encoded)
    weight = plain_weight(trainee, rec, adv)
    loss = rec + encoded.regulariser + trainee.loss.adversarial_weight * weight * adv
    plain = torch.autograd.grad(loss, list(trainee.model.parameters()))
    _, again = encoded_batch(trainee)
    logged = trainee.backward(again, x, 0, adversarial=True)
    torch.testing.assert_close(logged["adaptive_weight"], weight, rtol=1e-4, atol=0)
    assert len(plain) > 40
    whole = torch.cat([gradient.flatten() for gradient in plain]).norm()
    for (name, parameter), expected in zip(trainee.model.named_parameters(), plain, strict=True):
        assert parameter.grad is not None, name
        scale = expected.norm().clamp(min=0.01 * whole)  # keys' biases have a true gradient of zero
        assert (parameter.grad - expected).norm() < 1e-5 * scale, name


def test_the_adaptive_weight_is_bounded() -> None:
    last = torch.ones(1, requires_grad=True)
    picture = last * torch.ones(1, 3, 2, 2)
    strong, none = torch.full((1, 3, 2, 2), 1e9), torch.zeros(1, 3, 2, 2)
    assert adaptive_weight(picture, last, strong, none).item() == MAX_ADAPTIVE_WEIGHT
    assert adaptive_weight(picture, last, none, strong).item() == 0.0


def test_the_discriminator_gets_the_gradient_of_its_own_loss_alone(trainee: FirstStageTrainee) -> None:
    x, encoded = encoded_batch(trainee)
    fake = encoded.reconstruction.detach()
    loss = hinge_loss(trainee.discriminator(x), trainee.discriminator(fake))
    gradients = torch.autograd.grad(loss, list(trainee.discriminator.parameters()))
    logged = trainee.backward(encoded, x, 0, adversarial=True)
    torch.testing.assert_close(logged["discriminator"], loss.detach())
    for parameter, gradient in zip(trainee.discriminator.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_discriminators_loss_moves_nothing_else(trainee: FirstStageTrainee) -> None:
    x, encoded = encoded_batch(trainee)
    trainee.backward_discriminator(x, trainee.discriminator(encoded.reconstruction))
    assert all(p.grad is not None for p in trainee.discriminator.parameters())
    assert all(p.grad is None for p in trainee.model.parameters())


def test_the_discriminator_learns_to_tell_real_from_made_pictures(trainee: FirstStageTrainee) -> None:
    x, encoded = encoded_batch(trainee)
    fake = encoded.reconstruction.detach()
    losses = []
    for _ in range(30):
        logged = trainee.backward_discriminator(x, trainee.discriminator(fake))
        trainee.discriminator_optimizer.step()
        trainee.discriminator_optimizer.zero_grad()
        losses.append(logged["discriminator"].item())
    assert losses[-1] < 0.5 * losses[0]


def test_lpips_and_discriminator_are_off_before_their_start(
    tiny_recipe: Callable[..., Recipe], cats: Cats
) -> None:
    recipe = tiny_recipe(
        "first_stage.loss.perceptual_weight=1",
        "first_stage.loss.perceptual_start_images=4",
        "first_stage.loss.adversarial_start_images=8",
    ).first_stage
    trainee = FirstStageTrainee(recipe, cats("train"), cats("held_out"))
    start = [p.detach().clone() for p in trainee.discriminator.parameters()]

    def moved() -> bool:
        return any(
            not torch.equal(p, q) for p, q in zip(trainee.discriminator.parameters(), start, strict=True)
        )

    seen = []
    for step in range(3):
        logged = trainee.gradients(step) | trainee.update(step)
        seen.append(("lpips" in logged, "generator" in logged, "discriminator" in logged, moved()))
    assert seen == [
        (False, False, False, False),
        (True, False, False, False),
        (True, True, True, True),
    ]


def test_lpips_is_added_to_every_pixel(tiny_recipe: Callable[..., Recipe], cats: Cats) -> None:
    trainee = FirstStageTrainee(
        tiny_recipe("first_stage.loss.perceptual_weight=1").first_stage, cats("train"), cats("held_out")
    )
    x, lpips = trainee.batch(0), trainee.lpips
    assert lpips is not None
    y = x.flip(3)
    l1, distance = (y - x).abs().mean(), lpips(y, x).mean()
    mean, perceptual = reconstruction_loss(y, x, lpips, weight=0.5, summed=False)
    torch.testing.assert_close(mean, l1 + 0.5 * distance)
    torch.testing.assert_close(perceptual, distance)
    total, _ = reconstruction_loss(y, x, lpips, weight=0.5, summed=True)
    torch.testing.assert_close(total, mean * x[0].numel())


def test_one_batch_can_be_learnt_by_heart(trainee: FirstStageTrainee) -> None:
    x, errors = trainee.batch(0), []
    for step in range(60):
        encoded = forward(trainee.model, x, trainee.loss, generator(0, step))
        errors.append(float(trainee.backward(encoded, x, 0, adversarial=False)["l1"]))
        trainee.optimizer.step()
        trainee.optimizer.zero_grad()
    assert errors[-1] < 0.5 * errors[0]


def test_codes_that_nobody_uses_are_revived(tiny_recipe: Callable[..., Recipe], cats: Cats) -> None:
    recipe = tiny_recipe("first_stage.loss.revive_after_images=8").first_stage
    trainee = FirstStageTrainee(recipe, cats("train"), cats("held_out"))
    usage = [(trainee.gradients(step) | trainee.update(step))["code_usage"].item() for step in range(3)]
    assert usage[-1] == 1.0
    assert (trainee.codes.used_at > 0).all()


def test_mirroring_turns_about_half_of_the_pictures(tiny_recipe: Callable[..., Recipe], cats: Cats) -> None:
    plain, mirroring = (
        FirstStageTrainee(
            tiny_recipe(f"first_stage.training.mirror={mirror}").first_stage, cats("train"), cats("held_out")
        )
        for mirror in ("false", "true")
    )
    num_turned = 0
    for step in range(20):
        for x, y in zip(plain.batch(step), mirroring.batch(step), strict=True):
            turned = torch.equal(y, x.flip(2)) and not torch.equal(x, y)
            assert turned or torch.equal(x, y)
            num_turned += turned
    assert 25 <= num_turned <= 55  # of 80


def test_an_identity_has_nothing_to_train(tiny_recipe: Callable[..., Recipe], cats: Cats) -> None:
    recipe = tiny_recipe().first_stage.model_copy(update={"training": None})
    with pytest.raises(ValueError, match="must have weights to train, got the identity"):
        FirstStageTrainee(recipe, cats("train"), cats("held_out"))
