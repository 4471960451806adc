"""Image guiding brings samples nearer to a target: the direction is tested, not the printed sign."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.guidance import guide_by_target
from ldm.diffusion.image_guiding import Distance, low_resolution_distance, near_target, squared_distance
from ldm.diffusion.samplers import sample, timesteps_of
from ldm.diffusion.schedule import linear_schedule
from ldm.models.lpips import build_lpips

SCHEDULE = linear_schedule(1000, 0.0015, 0.0195)
DRAWS = torch.Generator().manual_seed(0)
MIXING = torch.randn(3, 4, 1, 1, generator=DRAWS) / 2
NOISE = torch.randn(2, 4, 8, 8, generator=DRAWS)


def decode(z: Tensor) -> Tensor:
    """Pictures (B, 3, 4h, 4w) of latents (B, 4, h, w)."""
    return torch.tanh(F.interpolate(F.conv2d(z, MIXING), scale_factor=4, mode="bilinear"))


def denoise(x_t: Tensor, t: Tensor) -> Tensor:
    """The best denoiser of standard normal latents."""
    return (1.0 - SCHEDULE.alpha_bar[t]).sqrt().to(x_t)[:, None, None, None] * x_t


def draw(distance: Distance | None, target: Tensor, *, scale: float = 1.0, sampler: str = "ddim") -> Tensor:
    guided = (
        guide_by_target(
            denoise, near_target(decode, target, distance=distance), schedule=SCHEDULE, scale=scale
        )
        if distance
        else denoise
    )
    times = timesteps_of(sampler, SCHEDULE, 20)
    return sample(sampler, guided, x_T=NOISE, schedule=SCHEDULE, times=times)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "heun"])
@pytest.mark.parametrize(
    ("distance", "side", "scale"),
    [(squared_distance, 32, 0.05), (low_resolution_distance, 16, 0.2)],
    ids=["picture", "low resolution"],
)
def test_guided_samples_are_nearer_to_their_target(
    distance: Callable[[Tensor, Tensor], Tensor], side: int, scale: float, sampler: str
) -> None:
    target = F.interpolate(
        decode(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))),
        size=(side, side),
        mode="area",
    )
    free, guided = draw(None, target, sampler=sampler), draw(distance, target, scale=scale, sampler=sampler)
    assert (distance(decode(guided), target) < 0.6 * distance(decode(free), target)).all()
    away = draw(distance, target, scale=-scale, sampler="ddim")
    assert (distance(decode(away), target) > distance(decode(free), target)).all()


def test_lpips_guides_too() -> None:
    lpips = build_lpips()
    target = decode(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)))
    before, after = (
        lpips(decode(latents), target) for latents in (draw(None, target), draw(lpips, target, scale=200.0))
    )
    assert (after < 0.7 * before).all()


def test_the_low_resolution_of_a_constant_picture_is_that_constant() -> None:
    grey = torch.full((1, 3, 32, 32), 0.25)
    assert low_resolution_distance(grey, torch.full((1, 3, 8, 8), 0.25)).item() == pytest.approx(0, abs=1e-9)
    assert low_resolution_distance(grey, torch.zeros(1, 3, 8, 8)).item() == pytest.approx(3 * 64 / 16)
