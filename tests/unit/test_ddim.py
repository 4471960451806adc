from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.diffusion.ddim import sample_ddim
from ldm.diffusion.objective import Denoiser
from ldm.diffusion.schedule import Schedule, linear_schedule
from ldm.diffusion.times import ddim_timesteps

MEAN, VARIANCE = 0.7, 0.25
SCHEDULE = linear_schedule(1000, 0.0015, 0.0195)
ALL = ddim_timesteps(1000, 999)


def variance_of(schedule: Schedule, t: Tensor) -> Tensor:
    """Variance of x_t when x_0 ~ N(MEAN, VARIANCE)."""
    return schedule.alpha_bar[t] * VARIANCE + 1.0 - schedule.alpha_bar[t]


def exact_denoiser(schedule: Schedule) -> Denoiser:
    """E[eps | x_t] when x_0 ~ N(MEAN, VARIANCE)."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = schedule.alpha_bar[t]
        return (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * MEAN) / variance_of(schedule, t)

    return denoise


def error_of(schedule: Schedule, steps: int) -> float:
    """Largest distance of DDIM's end from the exact solution of the probability flow."""
    noisy = torch.linspace(-2, 2, 9, dtype=torch.float64)
    start, end = torch.tensor(ddim_timesteps(schedule.num_timesteps, steps)[0]), torch.tensor(0)
    unit = (noisy - schedule.alpha_bar[start].sqrt() * MEAN) / variance_of(schedule, start).sqrt()
    exact = schedule.alpha_bar[end].sqrt() * MEAN + variance_of(schedule, end).sqrt() * unit
    times = ddim_timesteps(schedule.num_timesteps, steps)
    found = sample_ddim(exact_denoiser(schedule), noisy, schedule=schedule, times=times)
    return float((found - exact).abs().max())


def test_the_error_falls_with_order_one_in_the_steps() -> None:
    fine = linear_schedule(16_000, 0.0015 / 16, 0.0195 / 16)
    steps = [50, 100, 200, 400]
    errors = [error_of(fine, count) for count in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert -1.2 < slope < -0.85
    assert errors[-1] < 0.02


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_all_steps_draw_from_the_data_whatever_eta(eta: float) -> None:
    draws = torch.Generator().manual_seed(0)

    def noise(_: int) -> Tensor:
        return torch.randn(20_000, generator=draws, dtype=torch.float64)

    found = sample_ddim(
        exact_denoiser(SCHEDULE), noise(0), schedule=SCHEDULE, times=ALL, eta=eta, noise=noise
    )
    assert found.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert found.var().item() == pytest.approx(VARIANCE, rel=0.04)


def test_noise_of_eta_one_has_the_posteriors_variance() -> None:
    """sigma^2 = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) between neighbours (Ho et al. 2020)."""
    drawn: list[int] = []

    def noise(i: int) -> Tensor:
        drawn.append(i)
        return torch.full((1,), float(i == 998), dtype=torch.float64)

    def zero(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x_t)

    def end(eta: float) -> Tensor:
        start = torch.zeros(1, dtype=torch.float64)
        return sample_ddim(zero, start, schedule=SCHEDULE, times=ALL, eta=eta, noise=noise)

    difference = end(1.0) - end(0.0)
    ahead, behind = SCHEDULE.alpha_bar[1], SCHEDULE.alpha_bar[0]
    posterior = (1 - ahead / behind) * (1 - behind) / (1 - ahead)
    assert difference.square().item() == pytest.approx(posterior.item())
    assert drawn == list(range(999))


@pytest.mark.parametrize("steps", [1, 7, 30, 250, 999])
def test_the_denoiser_is_asked_exactly_as_often_as_steps(steps: int) -> None:
    asked: list[int] = []
    told: list[tuple[int, int]] = []

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (3,)
        asked.append(int(t[0]))
        return torch.zeros_like(x_t)

    sample_ddim(
        denoise,
        torch.zeros(3, 2),
        schedule=SCHEDULE,
        times=ddim_timesteps(1000, steps),
        on_step=lambda i, n: told.append((i, n)),
    )
    assert asked == ddim_timesteps(1000, steps)
    assert len(asked) == steps
    assert told == [(i + 1, steps) for i in range(steps)]


def test_spacing_never_leaves_the_schedule_and_equals_the_published_one_where_that_works() -> None:
    num_equal = 0
    for steps in range(1, 1000):
        times = ddim_timesteps(1000, steps)
        assert len(times) == steps
        assert times[-1] == 1
        assert times[0] <= 999
        assert all(later > earlier for later, earlier in pairwise(times))
        published = [t + 1 for t in range(0, 1000, 1000 // steps)]
        if len(published) == steps and published[-1] < 1000:
            assert times == published[::-1]
            num_equal += 1
    assert num_equal == 15


@pytest.mark.parametrize("steps", [0, 1000])
def test_more_steps_than_there_are_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps \({steps}\) must be between 1 and 999"):
        ddim_timesteps(1000, steps)


def test_eta_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="give a noise source or eta=0"):
        sample_ddim(exact_denoiser(SCHEDULE), torch.zeros(1), schedule=SCHEDULE, times=[1], eta=0.5)
