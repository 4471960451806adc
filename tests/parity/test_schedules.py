"""Schedules as the published code has them: betas, DDIM's time steps and noise levels, learning rates.

The numbers were made by running it; see schedules.md beside the fixture.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ldm.diffusion.ddim import ddim_sigma
from ldm.diffusion.schedule import (
    cosine_schedule,
    linear_schedule,
    sqrt_linear_schedule,
    sqrt_schedule,
)
from ldm.diffusion.times import ddim_timesteps, published_timesteps, quad_timesteps
from ldm.models.unet import timestep_embedding
from ldm.training.learning_rate import learning_rate
from ldm.training_config import Training

pytestmark = pytest.mark.parity
PUBLISHED = load_file(Path(__file__).parent / "fixtures" / "schedules.safetensors")
ENDS = (1000, 0.0015, 0.0195)
SCHEDULES = {
    "linear": linear_schedule(*ENDS),
    "cosine": cosine_schedule(1000),
    "sqrt_linear": sqrt_linear_schedule(*ENDS),
    "sqrt": sqrt_schedule(*ENDS),
}
SPACINGS = {"uniform": published_timesteps, "quad": quad_timesteps}
COUNTS = (10, 20, 50, 100, 200, 250)
RTOL = 1e-6


def test_every_array_is_compared() -> None:
    of_ddim = {
        f"ddim_{what}_{kind}_{n}"
        for what in ("t", "alpha", "alpha_prev", "sigma")
        for kind in SPACINGS
        for n in COUNTS
    }
    odd = {f"ddim_t_uniform_{n}" for n in (3, 7, 30, 60)}
    rest = {"timesteps", "embedding_32", "lr_steps", "lr_linear", "lr_warmup_cosine"}
    assert set(PUBLISHED) == {f"betas_{name}" for name in SCHEDULES} | of_ddim | odd | rest


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_betas(name: str) -> None:
    np.testing.assert_allclose(SCHEDULES[name].betas.numpy(), PUBLISHED[f"betas_{name}"], rtol=RTOL)


@pytest.mark.parametrize("kind", list(SPACINGS))
@pytest.mark.parametrize("steps", COUNTS)
def test_time_steps_and_noise_levels_of_ddim(kind: str, steps: int) -> None:
    times = SPACINGS[kind](1000, steps)[::-1]
    assert times == PUBLISHED[f"ddim_t_{kind}_{steps}"].tolist()
    if kind == "uniform":
        assert ddim_timesteps(1000, steps) == times[::-1]
    alpha_bar = SCHEDULES["linear"].alpha_bar
    here, before = alpha_bar[times], alpha_bar[[0, *times[:-1]]]
    np.testing.assert_allclose(here.numpy(), PUBLISHED[f"ddim_alpha_{kind}_{steps}"], rtol=RTOL)
    np.testing.assert_allclose(before.numpy(), PUBLISHED[f"ddim_alpha_prev_{kind}_{steps}"], rtol=RTOL)
    sigma = ddim_sigma(here, before, eta=1.0)
    np.testing.assert_allclose(sigma.numpy(), PUBLISHED[f"ddim_sigma_{kind}_{steps}"], rtol=RTOL, atol=1e-9)


@pytest.mark.parametrize("steps", [7, 30, 60])
def test_the_published_spacing_takes_more_steps_than_asked_and_ours_does_not(steps: int) -> None:
    published = PUBLISHED[f"ddim_t_uniform_{steps}"].tolist()
    assert published_timesteps(1000, steps)[::-1] == published
    assert len(published) > steps == len(ddim_timesteps(1000, steps))


def test_the_published_spacing_leaves_the_schedule_with_three_steps() -> None:
    assert PUBLISHED["ddim_t_uniform_3"].tolist()[-1] == 1000
    with pytest.raises(ValueError, match=r"got 1000 for 3 steps"):
        published_timesteps(1000, 3)


def test_embeddings_of_time_steps() -> None:
    found = timestep_embedding(torch.from_numpy(PUBLISHED["timesteps"]), 32)
    np.testing.assert_allclose(found.numpy(), PUBLISHED["embedding_32"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("published", "largest", "settings"),
    [
        ("lr_linear", 1.0, {"warmup_images": 10_000, "warmup_start": 1e-6}),
        (
            "lr_warmup_cosine",
            0.1,
            {
                "lr_schedule": "warmup_cosine",
                "warmup_images": 1000,
                "warmup_start": 0.001 / 0.1,
                "lr_floor": 0.0001 / 0.1,
                "decay_images": 50_000,
            },
        ),
    ],
)
def test_learning_rates_of_lsun_churches_and_of_inpainting(
    published: str, largest: float, settings: dict[str, object]
) -> None:
    training = Training.model_validate({"num_images": 100_000, "batch_size": 1, "lr": largest, **settings})
    found = [learning_rate(training, int(step)) for step in PUBLISHED["lr_steps"]]
    np.testing.assert_allclose(found, PUBLISHED[published], rtol=RTOL)
