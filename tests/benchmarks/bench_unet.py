"""The UNet against diffusers: the same network, weights and batch, in float32 on two threads.

The UNet is that of the recipe `celebahq` at width 64, 22,411,843 parameters, on 8 latents of 32x32. Goals: a
training step has at least 1.5 times the throughput of diffusers' `UNet2DModel` in its default layout and 1.05
times that of it in channels_last; DDIM at least 1.3 and 1.05 times; a guided evaluation costs at most 2.05 of
an unguided one. Nothing is asserted about time. That both sides compute the same numbers is.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.stream import SampleReader
from ldm.bridge.diffusers_unet import diffusers_unet_config, to_diffusers_unet
from ldm.conditions import Fields
from ldm.config import Recipe
from ldm.diffusion.guidance import guide
from ldm.diffusion.objective import draw_timesteps
from ldm.diffusion.samplers import sample, timesteps_of
from ldm.diffusion.schedule import build_schedule
from ldm.latents import LatentContract
from ldm.models.first_stage import IdentityModel
from ldm.models.unet import UNet, build_unet
from ldm.network_config import UNetConfig
from ldm.recipe import load_recipe
from ldm.training.diffusion import DiffusionTrainee
from ldm.training.randomness import generator

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1800)]

BATCH, SIDE = 8, 32
SAMPLING_STEPS = 10
"""Instead of 50: the time of sampling is linear in the steps."""
CHANNELS_LAST = torch.channels_last
LAYOUTS = {"diffusers": torch.contiguous_format, "diffusers, channels_last": CHANNELS_LAST}
CONTRACT = LatentContract(
    first_stage="none",
    weights_sha256="none",
    factor=1,
    image_size_px=SIDE,
    crop="center",
    pixel_range=(-1.0, 1.0),
    stored="pixels",
    shape=(3, SIDE, SIDE),
    dtype="float32",
    orientations=("as_is",),
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    scale=1.0,
    scale_applied=False,
)


def recipe_of_width_64() -> Recipe:
    """What is measured."""
    return load_recipe("celebahq", ["unet.model_channels=64", f"training.batch_size={BATCH}"])


def noise(*shape: int, seed: int) -> Tensor:
    """Standard normal."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_unet(config: UNetConfig) -> UNet:
    """A UNet with random weights, also where training begins at zero."""
    torch.manual_seed(0)
    return without_zeros(build_unet(config))


def without_zeros(unet: UNet) -> UNet:
    """The UNet with random numbers in place of tensors of zeros, so that all of it counts."""
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return unet


def unet_twin(unet: UNet, layout: torch.memory_format) -> nn.Module:
    """The same network and weights in diffusers."""
    settings = diffusers_unet_config(unet.config, sample_size=SIDE)
    twin = getattr(diffusers, settings["_class_name"]).from_config(settings)
    twin.load_state_dict(to_diffusers_unet(unet.state_dict(), unet.config))
    return twin.to(memory_format=layout)


class FixedTrainee(DiffusionTrainee):
    """Our training, fed with one batch: what is compared is the step, not the loader."""

    fixed: Tensor

    def prepared(self, samples: Mapping[str, Any], step: int, *key: int) -> tuple[Tensor, Fields]:
        """The batch, at every step."""
        del samples, step, key
        return self.fixed, {}


class PlainLoop:
    """The same step as one would write it over diffusers; averaged weights, which ours has, are left out."""

    def __init__(self, trainee: FixedTrainee, layout: torch.memory_format) -> None:
        self.seed = trainee.training.seed
        self.model = unet_twin(trainee.networks.unet, layout).train()
        self.x_0 = trainee.fixed.contiguous(memory_format=layout)
        self.scheduler = ddim_of_diffusers(trainee.recipe)
        training = trainee.training
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=training.lr, betas=training.betas, weight_decay=training.weight_decay
        )

    def step(self) -> Tensor:
        """One optimiser step; the loss before it."""
        steps = self.scheduler.config.num_train_timesteps
        t = draw_timesteps(len(self.x_0), steps, generator(self.seed, 0, "timesteps"))
        eps = torch.randn(self.x_0.shape, generator=generator(self.seed, 0, "noise"))
        loss = F.mse_loss(self.model(self.scheduler.add_noise(self.x_0, eps, t), t).sample, eps)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def ddim_of_diffusers(recipe: Recipe) -> Any:
    """The recipe's schedule with DDIM over the published time steps."""
    diffusion = recipe.diffusion
    return getattr(diffusers, "DDIMScheduler")(  # noqa: B009 - its stubs do not export it
        num_train_timesteps=diffusion.num_timesteps,
        beta_start=diffusion.linear_start,
        beta_end=diffusion.linear_end,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def test_a_training_step(race: Any, show: Any, cats: Callable[[str], SampleReader]) -> None:
    recipe, reader = recipe_of_width_64(), cats("train")
    trainee = FixedTrainee(recipe, reader, CONTRACT, IdentityModel(), num_classes=0, look=lambda networks: {})
    assert sum(p.numel() for p in without_zeros(trainee.networks.unet).parameters()) == 22_411_843
    trainee.fixed = noise(BATCH, 3, SIDE, SIDE, seed=1).contiguous(memory_format=CHANNELS_LAST)
    loops = {name: PlainLoop(trainee, layout) for name, layout in LAYOUTS.items()}
    steps = itertools.count()

    def one_step() -> dict[str, Tensor]:
        step = next(steps)
        return trainee.gradients(step) | trainee.update(step)

    loss = one_step()["loss"]
    for loop in loops.values():
        torch.testing.assert_close(loop.step(), loss, rtol=1e-5, atol=0.0)
    show({name: race(one_step, loop.step, rounds=9) for name, loop in loops.items()})


@torch.inference_mode()
def test_sampling_with_ddim(race: Any, show: Any) -> None:
    recipe = recipe_of_width_64()
    unet, schedule = some_unet(recipe.unet).eval(), build_schedule(recipe.diffusion)
    start = noise(BATCH, 3, SIDE, SIDE, seed=1).contiguous(memory_format=CHANNELS_LAST)
    times = timesteps_of("ddim", schedule, SAMPLING_STEPS)

    def ours() -> Tensor:
        return sample("ddim", unet, x_T=start, schedule=schedule, times=times)

    def other(twin: nn.Module, layout: torch.memory_format) -> Tensor:
        scheduler, x = ddim_of_diffusers(recipe), start.contiguous(memory_format=layout)
        scheduler.set_timesteps(SAMPLING_STEPS)
        for t in scheduler.timesteps:
            x = scheduler.step(twin(x, t).sample, t, x).prev_sample
        return x

    expected, races = ours(), {}
    for name, layout in LAYOUTS.items():
        twin = unet_twin(unet, layout).eval()
        torch.testing.assert_close(other(twin, layout), expected, rtol=1e-3, atol=1e-3)
        races[name] = race(ours, lambda twin=twin, layout=layout: other(twin, layout), rounds=5)
    show(races)


@torch.inference_mode()
def test_a_guided_evaluation_costs_two(race: Any, show: Any) -> None:
    config = UNetConfig.model_validate(recipe_of_width_64().unet.model_dump() | {"context_dim": 512})
    unet, scale = some_unet(config).eval(), 3.0
    x = noise(BATCH, 3, SIDE, SIDE, seed=1).contiguous(memory_format=CHANNELS_LAST)
    asked, null = (noise(BATCH, 1, 512, seed=seed) for seed in (2, 3))
    t = torch.full((BATCH,), 500)
    guided = guide(unet, asked, null, scale=scale)
    eps_null, eps_cond = unet(x, t, null), unet(x, t, asked)
    torch.testing.assert_close(guided(x, t), eps_null + scale * (eps_cond - eps_null), rtol=1e-4, atol=1e-4)
    show({"guided over unguided": race(lambda: unet(x, t, asked), lambda: guided(x, t), rounds=21)})
