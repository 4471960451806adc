import pytest
import torch
from torch import Tensor

from ldm.diffusion.editing import keep_known, paste, start_from
from ldm.diffusion.samplers import SAMPLERS, sample, timesteps_of
from ldm.diffusion.schedule import at, linear_schedule

SCHEDULE = linear_schedule(1000, 0.0015, 0.0195)
MASK = torch.zeros(1, 1, 8, 8)
MASK[..., :4] = 1.0


def denoise(x_t: Tensor, t: Tensor) -> Tensor:
    """The best denoiser of latents that are one standard normal number everywhere."""
    alpha_bar = at(SCHEDULE.alpha_bar, t, x_t)
    total = x_t.mean(dim=(1, 2, 3), keepdim=True) * x_t[0].numel()
    number = alpha_bar.sqrt() * total / (x_t[0].numel() * alpha_bar + 1 - alpha_bar)
    return (x_t - alpha_bar.sqrt() * number) / (1 - alpha_bar).sqrt()


def noise_of(seed: int):
    """Standard normal noise by number."""
    return lambda i: torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed + i))


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ddpm"])
def test_inpainting_keeps_what_is_known_and_fills_the_rest_to_fit(sampler: str) -> None:
    known = torch.tensor([-1.0, 0.5, 1.5]).view(3, 1, 1, 1).expand(3, 4, 8, 8)
    x = sample(
        sampler,
        denoise,
        x_T=noise_of(0)(0),
        schedule=SCHEDULE,
        times=timesteps_of(sampler, SCHEDULE, 100),
        noise=noise_of(5000),
        correct=keep_known(known, MASK, schedule=SCHEDULE, noise=noise_of(9000)),
    )
    assert not torch.equal(x[..., :4], known[..., :4])
    pasted = paste(x, known, MASK)
    assert torch.equal(pasted[..., :4], known[..., :4])
    assert torch.equal(pasted[..., 4:], x[..., 4:])
    torch.testing.assert_close(x[..., 4:].mean((1, 2, 3)), known[:, 0, 0, 0], atol=0.15, rtol=0)


def test_known_latents_stand_at_the_noise_level_of_the_step() -> None:
    known, noise = torch.full((3, 4, 8, 8), 2.0), noise_of(0)
    x = keep_known(known, MASK, schedule=SCHEDULE, noise=noise)(torch.zeros(3, 4, 8, 8), 300)
    expected = SCHEDULE.add_noise(known, torch.full((3,), 300), noise(300))
    assert torch.equal(x[..., :4], expected[..., :4])
    assert not x[..., 4:].any()


def test_the_less_strength_the_nearer_to_the_picture() -> None:
    x_0, times = noise_of(7)(0), timesteps_of("ddim", SCHEDULE, 50)
    distances = []
    for strength in (0.1, 0.5, 1.0):
        x_t, left = start_from(x_0, noise_of(1)(0), times, schedule=SCHEDULE, strength=strength)
        assert left == times[-round(50 * strength) :]
        end = sample("ddim", lambda x, t: torch.zeros_like(x), x_T=x_t, schedule=SCHEDULE, times=left)
        noiseless = SCHEDULE.add_noise(x_0, torch.full((3,), left[0]), torch.zeros_like(x_0))
        assert (x_t - noiseless).std().item() == pytest.approx(SCHEDULE.noise(left[0]), rel=0.1)
        distances.append(float((end - x_0).square().mean()))
    assert distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("strength", [0.0, 1.5, -1.0])
def test_a_strength_that_is_no_share_is_refused(strength: float) -> None:
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(
        ValueError, match=rf"strength \({strength}\) must be above 0 and at most 1; 0\.5 goes"
    ):
        start_from(x, x, [5, 3, 1], schedule=SCHEDULE, strength=strength)
