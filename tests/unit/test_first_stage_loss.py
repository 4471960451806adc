from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from datasets.stream import SampleReader
from ldm.config import Recipe
from ldm.models.first_stage import VQModel
from ldm.models.gaussian import kl_to_standard_normal
from ldm.training.first_stage import FirstStageTrainee
from ldm.training.first_stage_loss import pixel_gradient, reconstruction_loss

Cats = Callable[[str], SampleReader]
Make = Callable[..., FirstStageTrainee]
KL = ("first_stage.model.kind=kl", "first_stage.model.num_codes=null", "first_stage.loss.kl_weight=0.01")
KINDS = {"vq": ("first_stage.model.beta=0.25",), "kl": KL}
ALL_TERMS = (
    "first_stage.loss.perceptual_weight=0.7",
    "first_stage.loss.perceptual_start_images=4",
    "first_stage.loss.adversarial_start_images=8",
)


@pytest.fixture
def make(tiny_recipe: Callable[..., Recipe], cats: Cats) -> Make:
    return lambda *overrides: FirstStageTrainee(
        tiny_recipe(*overrides).first_stage, cats("train"), cats("held_out")
    )


def gradients(trainee: FirstStageTrainee, *, images: int, adversarial: bool = False) -> dict[str, Tensor]:
    """Gradient of each weight of the autoencoder on the first batch."""
    x = trainee.batch(0)
    trainee.optimizer.zero_grad()
    trainee.backward(trainee.encode_shard(x, 0, 0), x, images, adversarial=adversarial)
    return {name: p.grad.clone() for name, p in trainee.model.named_parameters() if p.grad is not None}


def change(first: dict[str, Tensor], second: dict[str, Tensor], prefix: str) -> float:
    """Share by which the gradients of some weights differ."""
    differences = [(first[n] - second[n]).norm() for n in first if n.startswith(prefix)]
    sizes = [first[n].norm() for n in first if n.startswith(prefix)]
    return float(torch.stack(differences).norm() / torch.stack(sizes).norm())


@pytest.mark.parametrize("kind", list(KINDS))
def test_lpips_and_the_discriminator_move_encoder_and_decoder(kind: str, make: Make) -> None:
    trainee = make(*KINDS[kind], *ALL_TERMS)
    pixel = gradients(trainee, images=0)
    perceptual = gradients(trainee, images=4)
    adversarial = gradients(trainee, images=8, adversarial=True)
    for part in ("encoder", "decoder"):
        assert change(pixel, perceptual, part) > 0.01
        assert change(perceptual, adversarial, part) > 0.01


def test_the_kl_term_moves_the_encoder_and_not_the_decoder(make: Make) -> None:
    without, with_it = (
        gradients(make(*KL, f"first_stage.loss.kl_weight={weight}"), images=0) for weight in (0, 1)
    )
    assert change(without, with_it, "encoder") > 0.01
    assert change(without, with_it, "decoder") == 0.0


def test_the_commitment_term_moves_the_encoder_and_the_codebook_term_the_codes(make: Make) -> None:
    off, commitment, both = (
        gradients(
            make(f"first_stage.loss.codebook_weight={weight}", f"first_stage.model.beta={beta}"), images=0
        )
        for weight, beta in ((0, 0.25), (1, 0), (1, 0.25))
    )
    assert change(off, commitment, "encoder") > 1e-3
    assert change(off, commitment, "decoder") == 0.0
    assert not commitment["quantize.embedding.weight"].any()
    assert both["quantize.embedding.weight"].any()
    assert change(commitment, both, "encoder") == 0.0


def test_the_latents_terms_are_normalised_as_published(make: Make) -> None:
    vq, kl = make(*KINDS["vq"]), make(*KL)
    x = vq.batch(0)
    encoded = vq.encode_shard(x, 0, 0)
    assert encoded.quantized is not None
    assert isinstance(vq.model, VQModel)
    codes = vq.model.quantize.lookup(encoded.quantized.indices)
    torch.testing.assert_close(encoded.regulariser, 1.25 * (codes - encoded.latents).square().mean())
    encoded = kl.encode_shard(x, 0, 0)
    mean, logvar = encoded.latents.chunk(2, dim=1)
    nats = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    torch.testing.assert_close(encoded.regulariser, 0.01 * nats.sum() / len(x))


@pytest.mark.parametrize("summed", [False, True])
def test_the_gradient_of_the_pixel_term_is_what_autograd_finds_bit_for_bit(summed: bool) -> None:
    draws = torch.Generator().manual_seed(0)
    x, y = (torch.rand(3, 3, 16, 16, generator=draws) for _ in range(2))
    y.requires_grad_()
    loss, _ = reconstruction_loss(y, x, None, weight=1.0, summed=summed)
    (expected,) = torch.autograd.grad(loss, y)
    assert torch.equal(pixel_gradient(y.detach(), x, summed=summed), expected)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_logged_gradients_are_those_of_each_term_alone(kind: str, make: Make) -> None:
    trainee = make(*KINDS[kind], *ALL_TERMS)
    x = trainee.batch(0)
    logged = trainee.backward(trainee.encode_shard(x, 0, 0), x, 8, adversarial=True, measured=True)
    encoded = trainee.encode_shard(x, 0, 0)
    picture = encoded.reconstruction.detach().requires_grad_()
    assert trainee.lpips is not None
    divisor = len(x) if kind == "kl" else x.numel()
    terms = {
        "pixel": (picture - x).abs().sum() / divisor,
        "perceptual": 0.7 * trainee.lpips(picture, x).sum() * x[0].numel() / divisor,
        "adversarial": -trainee.discriminator(picture).mean()
        * (trainee.loss.adversarial_weight * logged["adaptive_weight"]),
    }
    expected = {name: torch.autograd.grad(term, picture)[0] for name, term in terms.items()}
    if encoded.quantized is None:
        kl = 0.01 * kl_to_standard_normal(encoded.latents).mean()
        expected["kl"] = torch.autograd.grad(kl, encoded.latents)[0]
    else:
        assert isinstance(trainee.model, VQModel)
        codes = trainee.model.quantize
        z, e = encoded.latents.detach(), codes.lookup(encoded.quantized.indices)
        expected["commitment"] = 2 * (z - e.detach()) / z.numel()
        pulled = 0.25 * (e - z).square().mean()
        (expected["codebook"],) = torch.autograd.grad(pulled, codes.embedding.weight)
    assert {name for name in logged if name.startswith("gradient/")} == {f"gradient/{n}" for n in expected}
    for name, gradient in expected.items():
        torch.testing.assert_close(logged[f"gradient/{name}"], gradient.norm(), rtol=1e-3, atol=0)


def test_terms_that_are_switched_off_have_no_gradient_to_watch(make: Make) -> None:
    trainee = make("first_stage.loss.codebook_weight=0", "first_stage.loss.adversarial_weight=0")
    x = trainee.batch(0)
    logged = trainee.backward(trainee.encode_shard(x, 0, 0), x, 0, adversarial=False, measured=True)
    assert [name for name in logged if name.startswith("gradient/")] == ["gradient/pixel"]
