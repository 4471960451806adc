import pytest
import torch
from torch import Tensor

from ldm.diffusion.ddim import sample_ddim
from ldm.diffusion.guidance import guide, guide_by_classifier, rescale_deviation
from ldm.diffusion.schedule import linear_schedule
from ldm.diffusion.times import ddim_timesteps

CONTEXT, NULL = torch.full((2, 1, 3), 5.0), torch.full((2, 1, 3), 1.0)
X, T = torch.arange(2.0).view(2, 1, 1, 1), torch.tensor([3, 4])


class Recorder:
    """A denoiser that answers with its context's mean plus its input, and counts what it was given."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        assert len(x_t) == len(t) == len(context)
        self.rows.append(len(x_t))
        return x_t + context.mean(dim=(1, 2))[:, None, None, None]


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_noise_goes_from_the_unasked_through_the_asked_one(scale: float) -> None:
    guided = guide(Recorder(), CONTEXT, NULL, scale=scale)(X, T)
    torch.testing.assert_close(guided, X + 1.0 + scale * (5.0 - 1.0))


@pytest.mark.parametrize(("scale", "rows"), [(1.0, [2]), (2.0, [4])])
def test_only_guidance_costs_a_second_evaluation(scale: float, rows: list[int]) -> None:
    denoise = Recorder()
    guide(denoise, CONTEXT, NULL, scale=scale)(X, T)
    assert denoise.rows == rows


@pytest.mark.parametrize(("t", "rows"), [(199, 2), (200, 4), (500, 4), (800, 4), (801, 2)])
def test_only_inside_its_interval_guidance_acts_and_costs(t: int, rows: int) -> None:
    denoise = Recorder()
    guided = guide(denoise, CONTEXT, NULL, scale=3.0, interval=(200, 800))(X, torch.tensor([t, t]))
    assert denoise.rows == [rows]
    torch.testing.assert_close(guided, X + (13.0 if rows == 4 else 5.0))


def test_rescaled_noise_has_the_deviation_of_the_conditional_one() -> None:
    eps, eps_cond = 5 * torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    whole, half = (rescale_deviation(eps, eps_cond, share=share) for share in (1.0, 0.5))
    torch.testing.assert_close(whole.std((1, 2, 3)), eps_cond.std((1, 2, 3)))
    torch.testing.assert_close(half, (eps + whole) / 2)


def test_a_guide_rescales_when_asked() -> None:
    def denoise(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return x_t * context.mean(dim=(1, 2))[:, None, None, None]

    x = torch.randn(2, 1, 8, 8)
    guided = guide(denoise, CONTEXT, NULL, scale=3.0, rescale=1.0)(x, T)
    torch.testing.assert_close(guided, 5.0 * x)
    assert not torch.allclose(guide(denoise, CONTEXT, NULL, scale=3.0)(x, T), guided)


def test_a_classifier_moves_gaussian_data_to_what_is_seen() -> None:
    """x_0 ~ N(0, 1), seen as y = 2 with deviation 1: the posterior is N(1, 1/2)."""
    schedule = linear_schedule(1000, 0.0015, 0.0195)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return (1 - schedule.alpha_bar[t]).sqrt() * x_t

    def log_probability(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = schedule.alpha_bar[t]  # y given x_t is N(sqrt(alpha_bar) x_t, 2 - alpha_bar)
        return -0.5 * (2.0 - alpha_bar.sqrt() * x_t).square() / (2.0 - alpha_bar)

    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = sample_ddim(
        guide_by_classifier(denoise, log_probability, schedule=schedule, scale=1.0),
        noise,
        schedule=schedule,
        times=ddim_timesteps(1000, 250),
    )
    assert found.mean().item() == pytest.approx(1.0, abs=0.03)
    assert found.var().item() == pytest.approx(0.5, abs=0.02)
