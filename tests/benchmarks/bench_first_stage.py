"""The first stage against diffusers: the same network, weights and batch, in float32 (goals: README.md here).

Nothing is asserted about time. That both sides compute the same numbers is.
B batch, H W height and width of the pictures in [-1, 1].
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.stream import SampleReader
from ldm.first_stage_config import FirstStageModel, FirstStageRecipe
from ldm.models.discriminator import PatchDiscriminator, hinge_loss
from ldm.models.first_stage import KLModel, VQModel, build_first_stage
from ldm.models.lpips import LPIPS, build_lpips, unit_normalised
from ldm.recipe import load_recipe
from ldm.training.first_stage import FirstStageTrainee

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1200)]

CHANNELS_LAST = torch.channels_last
PAPER = {
    "vq-f4": {"kind": "vq", "channel_mult": (1, 2, 4), "z_channels": 3, "embed_dim": 3, "num_codes": 8192},
    "kl-f8": {"kind": "kl", "channel_mult": (1, 2, 4, 4), "z_channels": 4, "embed_dim": 4},
}
STEPS = {
    "demo, 32 px, batch 16": (
        *("first_stage.model.channels=32", "first_stage.loss.discriminator_channels=32"),
        *("first_stage.loss.discriminator_layers=2", "first_stage.training.batch_size=16"),
    ),
    "64 channels, 64 px, batch 4": (
        *("first_stage.model.channels=64", "first_stage.model.num_res_blocks=2"),
        *("first_stage.model.norm_groups=32", "first_stage.model.num_codes=8192"),
        *("first_stage.loss.discriminator_channels=64", "first_stage.loss.discriminator_layers=3"),
        "first_stage.training.batch_size=4",
    ),
}
SIDES_PX = dict(zip(STEPS, (32, 64), strict=True))
ALL_TERMS = (
    *("first_stage.loss.perceptual_start_images=0", "first_stage.loss.adversarial_start_images=0"),
    *("first_stage.loss.revive_after_images=0", "first_stage.training.lr_schedule=constant"),
    *("first_stage.training.warmup_images=0", "first_stage.training.lr=0.0001"),
)

Twin = Callable[[VQModel | KLModel, FirstStageModel], Any]


def some_model(config: FirstStageModel) -> VQModel | KLModel:
    """A first stage with random weights, and codes as far apart as latents are."""
    torch.manual_seed(0)
    model = build_first_stage(config)
    assert isinstance(model, VQModel | KLModel)
    if isinstance(model, VQModel):
        nn.init.normal_(model.quantize.embedding.weight)
    return model.eval().requires_grad_(False)


def some_pictures(batch: int, side_px: int) -> Tensor:
    """Smooth noise, channels-last."""
    noise = torch.randn(batch, 3, side_px // 8, side_px // 8, generator=torch.Generator().manual_seed(1))
    x = F.interpolate(noise, side_px, mode="bilinear").clamp(-1.0, 1.0)
    return x.contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("name", list(PAPER))
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_a_picture_of_256_px(way: str, name: str, twin: Twin, race: Any, show: Any) -> None:
    config = FirstStageModel.model_validate(PAPER[name])
    model = some_model(config)
    plain, last = (twin(model, config).eval().requires_grad_(False) for _ in range(2))
    last.to(memory_format=CHANNELS_LAST)
    x = some_pictures(1, 256)
    with torch.inference_mode():
        z = model.latent(model.encode(x), None)
        if way == "decode":
            sides = [(model.decode, z)] + [(lambda z, of=of: of.decode(z).sample, z) for of in (plain, last)]
        else:
            sides = [
                (model.encode, x),
                (moments_or_latents(plain), x.contiguous()),
                (moments_or_latents(last), x),
            ]
        ours, *others = (lambda run=run, given=given: run(given) for run, given in sides)
        expected = ours()
        for other in others:
            torch.testing.assert_close(other(), expected, rtol=0.0, atol=1e-4)
        names = ("diffusers", "diffusers, channels_last")
        show({f"{name} {n}": race(ours, other, rounds=5) for n, other in zip(names, others, strict=True)})


def moments_or_latents(twin: Any) -> Callable[[Tensor], Tensor]:
    """What our `encode` gives, of a model of diffusers."""
    if twin.config["_class_name"] == "VQModel":
        return lambda x: twin.encode(x).latents
    return lambda x: twin.encode(x).latent_dist.parameters


class FixedTrainee(FirstStageTrainee):
    """Our training, fed with one batch: what is compared is the step, not the loader."""

    fixed: Tensor

    def batch(self, step: int) -> Tensor:
        """The batch, at every step."""
        del step
        return self.fixed


class PlainLoop:
    """The same step as one would write it over diffusers, after the published code.

    Everything is in the default layout: diffusers' `VQModel`, and our LPIPS and discriminator with weights in
    that layout. The adaptive weight takes two backward passes down to the last layer, the loss a third one.
    Discriminator weights ask for no gradient in the generator's pass, as Lightning had it in the published
    code, and the reconstruction is computed once. Left out is what ours does besides: averaged weights and
    usage of codes.
    """

    def __init__(self, recipe: FirstStageRecipe, trainee: FixedTrainee, twin: Twin) -> None:
        assert recipe.training is not None
        self.weight, self.x = recipe.loss.adversarial_weight, trainee.fixed.contiguous()
        self.model = twin(trainee.model, recipe.model).train()
        self.discriminator = PatchDiscriminator(
            recipe.loss.discriminator_channels, recipe.loss.discriminator_layers
        )
        self.discriminator.load_state_dict(trainee.discriminator.state_dict())
        self.lpips = build_lpips().to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        training = recipe.training
        self.optimizer, self.discriminator_optimizer = (
            torch.optim.Adam(module.parameters(), lr=training.lr, betas=training.betas)
            for module in (self.model, self.discriminator)
        )

    def step(self) -> dict[str, Tensor]:
        """One step of the autoencoder, then one of the discriminator."""
        x, last = self.x, self.model.decoder.conv_out.weight
        y, regulariser = self.model(x, return_dict=False)
        rec = ((y - x).abs() + plain_lpips(self.lpips, y, x)).mean()
        self.discriminator.requires_grad_(False)
        fooling = -self.discriminator(y).mean()
        norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (rec, fooling)]
        weight = (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4).detach()
        self.optimizer.zero_grad()
        (rec + regulariser + self.weight * weight * fooling).backward()
        self.optimizer.step()
        self.discriminator.requires_grad_(True)
        loss = hinge_loss(self.discriminator(x), self.discriminator(y.detach()))
        self.discriminator_optimizer.zero_grad()
        loss.backward()
        self.discriminator_optimizer.step()
        return {"reconstruction": rec, "adaptive_weight": weight, "generator": fooling, "discriminator": loss}


def plain_lpips(lpips: LPIPS, x: Tensor, y: Tensor) -> Tensor:
    """The perceptual distance (B, 1, 1, 1) in the layout of the pictures and weights given."""
    total = x.new_zeros(len(x), 1, 1, 1)
    x, y = ((pictures - lpips.shift) / lpips.scale for pictures in (x, y))
    for level, head in zip(lpips.levels, lpips.heads, strict=True):
        x, y = level(x), level(y)
        difference = (unit_normalised(x) - unit_normalised(y)) ** 2
        total = total + F.conv2d(difference, head).mean((2, 3), keepdim=True)
    return total


@pytest.mark.parametrize("name", list(STEPS))
def test_a_training_step(
    name: str, twin: Twin, race: Any, show: Any, cats: Callable[[str], SampleReader]
) -> None:
    recipe = load_recipe("demo", [*STEPS[name], *ALL_TERMS]).first_stage
    assert recipe.training is not None
    trainee = FixedTrainee(recipe, cats("train"), cats("held_out"))
    trainee.fixed = some_pictures(recipe.training.batch_size, SIDES_PX[name])
    loop = PlainLoop(recipe, trainee, twin)

    def one_step() -> dict[str, Tensor]:
        return trainee.gradients(0) | trainee.update(0)

    ours, plain = one_step(), loop.step()  # later ones drift: diffusers puts beta on the other term
    for key, value in plain.items():
        torch.testing.assert_close(ours[key], value.detach(), rtol=1e-3, atol=1e-5, msg=key)
    show({f"{name}": race(one_step, loop.step, rounds=11)})
