"""Samplers on Gaussian data, where the best denoiser and the way of every noise are known in closed form."""

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.config import Sampling
from ldm.diffusion.objective import Denoiser
from ldm.diffusion.samplers import SAMPLERS, STOCHASTIC, sample, timesteps_of
from ldm.diffusion.schedule import Schedule, flow_schedule, linear_schedule

MEAN, VARIANCE = 0.7, 0.25
SCHEDULE = linear_schedule(1000, 0.0015, 0.0195)
FINE = flow_schedule(16_000)
# Slope of log error over log steps. UniPC's corrector gains an order. PLMS is held to its first step.
ORDERS = {
    "ddim": (-1.1, -0.9),
    "euler": (-1.1, -0.9),
    "plms": (-2.2, -1.85),
    "dpmpp_2m": (-2.2, -1.85),
    "unipc": (-3.1, -2.7),
    "heun": (-2.1, -1.85),
}


def deviation(schedule: Schedule, t: Tensor) -> Tensor:
    """Deviation of x_t when x_0 ~ N(MEAN, VARIANCE)."""
    return (schedule.alpha_bar[t] * VARIANCE + 1.0 - schedule.alpha_bar[t]).sqrt()


def exact_denoiser(schedule: Schedule) -> Denoiser:
    """E[eps | x_t] when x_0 ~ N(MEAN, VARIANCE)."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = schedule.alpha_bar[t]
        return (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * MEAN) / deviation(schedule, t).square()

    return denoise


def error_of(sampler: str, schedule: Schedule, steps: int) -> float:
    """Largest distance of a sampler's end from the exact solution of the probability flow."""
    times = timesteps_of(sampler, schedule, steps)
    noisy = torch.linspace(-2, 2, 9, dtype=torch.float64)
    start, end = torch.tensor(times[0]), torch.tensor(0)
    unit = (noisy - schedule.alpha_bar[start].sqrt() * MEAN) / deviation(schedule, start)
    exact = schedule.alpha_bar[end].sqrt() * MEAN + deviation(schedule, end) * unit
    found = sample(sampler, exact_denoiser(schedule), x_T=noisy, schedule=schedule, times=times)
    return float((found - exact).abs().max())


def noise_of(size: int, seed: int = 0):
    """Standard normal noise by step."""
    draws = torch.Generator().manual_seed(seed)
    return lambda _: torch.randn(size, generator=draws, dtype=torch.float64)


def test_the_registry_holds_what_a_recipe_can_name() -> None:
    assert list(SAMPLERS) == list(get_args(Sampling.model_fields["sampler"].annotation))
    assert set(SAMPLERS) == set(ORDERS) | STOCHASTIC


@pytest.mark.parametrize("sampler", list(ORDERS))
def test_the_error_falls_with_the_order_of_the_method(sampler: str) -> None:
    steps = [50, 100, 200, 400]
    errors = [error_of(sampler, FINE, count) for count in steps]
    steepest, flattest = ORDERS[sampler]
    assert steepest < np.polyfit(np.log(steps), np.log(errors), 1)[0] < flattest
    assert errors[-1] < 0.005


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "unipc"])
def test_twenty_steps_of_second_order_are_nearer_than_a_hundred_of_ddim(sampler: str) -> None:
    assert error_of(sampler, SCHEDULE, 20) < error_of("ddim", SCHEDULE, 100) / 3


@pytest.mark.parametrize(
    ("sampler", "steps", "eta"),
    [
        ("ddim", 999, 0.0),
        ("ddim", 999, 0.5),
        ("ddim", 999, 1.0),
        ("ddpm", 1000, 0.0),
        ("dpmpp_2m_sde", 60, 0.0),
    ],
)
def test_what_is_drawn_is_distributed_as_the_data(sampler: str, steps: int, eta: float) -> None:
    noise = noise_of(20_000)
    times = timesteps_of(sampler, SCHEDULE, steps)
    found = sample(
        sampler, exact_denoiser(SCHEDULE), x_T=noise(0), schedule=SCHEDULE, times=times, eta=eta, noise=noise
    )
    assert found.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert found.var().item() == pytest.approx(VARIANCE, rel=0.04)


@pytest.mark.parametrize("sampler", sorted(STOCHASTIC))
def test_fresh_noise_changes_what_a_stochastic_sampler_draws(sampler: str) -> None:
    times = timesteps_of(sampler, SCHEDULE, 1000 if sampler == "ddpm" else 20)

    def draw(seed: int) -> Tensor:
        return sample(
            sampler,
            exact_denoiser(SCHEDULE),
            x_T=torch.zeros(500, dtype=torch.float64),
            schedule=SCHEDULE,
            times=times,
            noise=noise_of(500, seed),
        )

    assert torch.equal(draw(1), draw(1))
    assert abs(np.corrcoef(draw(1), draw(2))[0, 1]) < 0.2


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_evaluations_are_as_many_as_documented(sampler: str, steps: int) -> None:
    asked: list[int] = []
    told: list[tuple[int, int]] = []

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (3,)
        asked.append(int(t[0]))
        return 0.1 * x_t

    x = sample(
        sampler,
        denoise,
        x_T=torch.ones(3, 2),
        schedule=SCHEDULE,
        times=timesteps_of(sampler, SCHEDULE, steps),
        noise=lambda _: torch.zeros(3, 2),
        on_step=lambda i, n: told.append((i, n)),
    )
    assert len(asked) == {"plms": steps + 1, "heun": 2 * steps}.get(sampler, steps)
    assert told == [(i + 1, steps) for i in range(steps)]
    assert x.isfinite().all()
    assert x.shape == (3, 2)
    assert x.dtype == torch.float32


@pytest.mark.parametrize("schedule", [SCHEDULE, flow_schedule(1000)], ids=["linear", "flow"])
def test_euler_along_rectified_flow_is_ddim(schedule: Schedule) -> None:
    noisy = torch.linspace(-2, 2, 9, dtype=torch.float64)
    both = [
        sample(name, exact_denoiser(schedule), x_T=noisy, schedule=schedule, times=[999, 600, 250, 20])
        for name in ("euler", "ddim")
    ]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-9)


def test_ddim_of_neighbouring_time_steps_with_eta_one_is_ancestral_sampling_but_for_its_last_step() -> None:
    noise = noise_of(50)
    start, fresh = noise(0), [noise(i) for i in range(40)]
    shared = {"x_T": start, "schedule": SCHEDULE, "noise": lambda i: fresh[i]}
    to_level_0 = sample("ddim", exact_denoiser(SCHEDULE), times=list(range(40))[:0:-1], eta=1.0, **shared)
    ancestral = sample("ddpm", exact_denoiser(SCHEDULE), times=list(range(40))[::-1], **shared)
    last = exact_denoiser(SCHEDULE)(to_level_0, torch.zeros(50, dtype=torch.long))
    x_0 = SCHEDULE.x_0_of_eps(to_level_0, torch.zeros(50, dtype=torch.long), last)
    torch.testing.assert_close(ancestral, x_0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("sampler", "more", "message"),
    [
        ("ode", {}, r"sampler must be one of ddim, .*, got 'ode'; choose"),
        ("plms", {"eta": 0.5}, r"eta \(0\.5\) is the noise of ddim, and plms has none to set; use eta=0"),
        ("ddim", {"eta": 0.5}, r"eta \(0\.5\) > 0 draws noise at every step; give a noise source or eta=0"),
        ("dpmpp_2m_sde", {}, r"dpmpp_2m_sde draws noise at every step, got none; give"),
        (
            "ddpm",
            {"noise": torch.zeros},
            r"takes every time step down to 0, got \[9, 4, 1\]; use all of them, or",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(sampler: str, more: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(
            sampler,
            exact_denoiser(SCHEDULE),
            x_T=torch.zeros(1),
            schedule=SCHEDULE,
            times=[9, 4, 1],
            **more,
        )
