import pytest
import torch
from torch import Tensor

from ldm.diffusion.ddim import sample_ddim
from ldm.diffusion.schedule import linear_schedule
from ldm.diffusion.times import ddim_timesteps

SCHEDULE = linear_schedule(1000, 0.0015, 0.0195)
ALL = ddim_timesteps(1000, 999)


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


def test_eta_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="give a noise source or eta=0"):
        sample_ddim(lambda x_t, t: x_t, torch.zeros(1), schedule=SCHEDULE, times=[1], eta=0.5)
