import math

import pytest
import torch
from torch import Tensor

from ldm.diffusion.bound import prior_nats, rate_distortion
from ldm.diffusion.ddpm import posterior_mean
from ldm.diffusion.objective import vlb_weights
from ldm.diffusion.schedule import at, linear_schedule

SCHEDULE = linear_schedule(1000, 0.0015, 0.0195)
VARIANCE = 0.25
X_0 = 0.5 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def denoise(x_t: Tensor, t: Tensor) -> Tensor:
    """The best denoiser of N(0, VARIANCE)."""
    alpha_bar = at(SCHEDULE.alpha_bar, t, x_t)
    return (1 - alpha_bar).sqrt() * x_t / (alpha_bar * VARIANCE + 1 - alpha_bar)


def noise(t: int) -> Tensor:
    return torch.randn(X_0.shape, generator=torch.Generator().manual_seed(t + 1), dtype=torch.float64)


def test_the_rate_of_gaussian_data_is_its_mutual_information_with_x_t() -> None:
    """1/2 log2(1 + variance SNR) bits; many steps cost hardly more than that."""
    found = rate_distortion(denoise, X_0, schedule=SCHEDULE, noise=noise)
    assert found.times == list(range(1000))[::-1]
    for t in (700, 400, 100, 10):
        bits = 0.5 * math.log2(1 + VARIANCE * float(SCHEDULE.snr[t]))
        assert found.rate[999 - t].item() == pytest.approx(bits, rel=0.03, abs=0.002)
        error = VARIANCE / (1 + VARIANCE * float(SCHEDULE.snr[t]))
        assert found.distortion[999 - t].item() == pytest.approx(math.sqrt(error), rel=0.05)
    assert (found.rate.diff() > 0).all()


def test_fewer_time_steps_cost_more_bits() -> None:
    few, more = (
        rate_distortion(denoise, X_0, schedule=SCHEDULE, noise=noise, times=range(999, -1, -every)).rate[-1]
        for every in (333, 27)
    )
    assert few > 1.2 * more


@pytest.mark.parametrize("t", [1, 50, 900])
def test_a_term_is_the_divergence_of_the_posteriors_and_the_published_weight_of_the_error_of_eps(
    t: int,
) -> None:
    at_t = torch.full((len(X_0),), t)
    eps = noise(t)
    x_t = SCHEDULE.add_noise(X_0, at_t, eps)
    estimate = SCHEDULE.x_0_of_eps(x_t, at_t, denoise(x_t, at_t))
    true, guessed = (posterior_mean(x_0, x_t, schedule=SCHEDULE, t=t) for x_0 in (X_0, estimate))
    divergence = float(((true - guessed).square() / (2 * SCHEDULE.posterior_variance[t])).mean())
    found = rate_distortion(denoise, X_0, schedule=SCHEDULE, noise=noise, times=[t, t - 1])
    assert found.rate.diff().item() * math.log(2) == pytest.approx(divergence, rel=1e-6)
    weighted = vlb_weights(SCHEDULE)[t] * (denoise(x_t, at_t) - eps).square().mean()
    assert float(weighted) == pytest.approx(divergence, rel=1e-6)


def test_the_prior_costs_what_gaussians_differ_by() -> None:
    alpha_bar = float(SCHEDULE.alpha_bar[300])
    normal = torch.distributions.Normal
    parts = [
        torch.distributions.kl_divergence(
            normal(alpha_bar**0.5 * x, (1 - alpha_bar) ** 0.5), normal(0.0, 1.0)
        )
        for x in X_0[:5]
    ]
    expected = float(torch.stack(parts).mean())
    assert prior_nats(X_0[:5], schedule=SCHEDULE, t=300) == pytest.approx(expected)
