import pytest
import torch

from ldm.config import Diffusion
from ldm.diffusion.objective import (
    Objective,
    draw_timesteps,
    eps_of_prediction,
    loss_weights,
    prediction_loss,
    target_of,
    with_log_variance,
)
from ldm.diffusion.schedule import build_schedule, flow_schedule, linear_schedule


def test_betas_are_squares_of_evenly_spaced_roots_between_the_published_ends() -> None:
    alpha_bar = linear_schedule(1000, 0.0015, 0.0195).alpha_bar
    assert alpha_bar.dtype == torch.float64
    betas = 1.0 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    assert betas[[0, -1]].tolist() == pytest.approx([0.0015, 0.0195], rel=1e-9)
    roots = betas.sqrt().diff()
    torch.testing.assert_close(roots, roots[:1].expand_as(roots), rtol=1e-6, atol=0)


def test_signal_falls_from_nearly_all_to_nearly_none() -> None:
    schedule = linear_schedule(1000, 0.0015, 0.0195)
    assert schedule.num_timesteps == 1000
    assert (schedule.alpha_bar.diff() < 0).all()
    assert schedule.alpha_bar[0] > 0.998
    assert schedule.alpha_bar[-1] < 2e-4


def test_noise_added_to_unit_data_keeps_unit_variance() -> None:
    schedule = linear_schedule(100, 0.01, 0.1)
    draws = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(4, 1, 100, 100, generator=draws) for _ in range(2))
    x_t = schedule.add_noise(x_0, torch.tensor([0, 20, 50, 99]), eps)
    torch.testing.assert_close(x_t.var(dim=(1, 2, 3)), torch.ones(4), atol=0.06, rtol=0)


def test_the_signal_is_found_again_from_the_noise() -> None:
    schedule = linear_schedule(1000, 0.0015, 0.0195)
    draws = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(5, 2, 3, 3, generator=draws, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0, 1, 400, 998, 999])
    torch.testing.assert_close(schedule.x_0_of_eps(schedule.add_noise(x_0, t, eps), t, eps), x_0)


def test_the_loss_is_the_mean_squared_error_of_each_samples_noise() -> None:
    schedule = linear_schedule(1000, 0.0015, 0.0195)
    x_0, t = torch.zeros(3, 2, 4, 4), torch.tensor([0, 500, 999])
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    offset = torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1, 1)
    losses = prediction_loss(lambda x_t, t: eps + offset, x_0, t, eps, schedule=schedule, objective="eps")
    torch.testing.assert_close(losses, torch.tensor([0.0, 1.0, 9.0]))


def test_time_steps_are_uniform_over_all() -> None:
    counts = draw_timesteps(40_000, 4, torch.Generator().manual_seed(0)).bincount(minlength=4)
    assert len(counts) == 4
    assert ((counts - 10_000).abs() < 400).all()


@pytest.mark.parametrize("objective", ["eps", "v", "x0", "flow"])
def test_a_perfect_prediction_has_no_loss_and_means_the_true_noise(objective: Objective) -> None:
    schedule = linear_schedule(1000, 0.0015, 0.0195)
    draws = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(8, 4, 2, 2, generator=draws) for _ in range(2))
    t = torch.linspace(0, 999, 8).long()
    target = target_of(x_0, t, eps, schedule=schedule, objective=objective)
    losses = prediction_loss(lambda x_t, t: target, x_0, t, eps, schedule=schedule, objective=objective)
    assert losses.max() == 0
    x_t = schedule.add_noise(x_0, t, eps)
    meant = eps_of_prediction(target, x_t, t, schedule=schedule, objective=objective)
    torch.testing.assert_close(meant, eps, rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("objective", ["eps", "v", "x0", "flow"])
def test_min_snr_weighs_the_same_error_of_the_latent_the_same_whatever_is_predicted(
    objective: Objective,
) -> None:
    schedule = linear_schedule(1000, 0.0015, 0.0195)
    draws = torch.Generator().manual_seed(0)
    x_0, eps, wrong = (torch.randn(5, 4, 2, 2, generator=draws, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([0, 100, 300, 700, 999])
    x_t = schedule.add_noise(x_0, t, eps)
    guess = target_of(wrong, t, schedule.eps_of_x_0(x_t, t, wrong), schedule=schedule, objective=objective)
    losses = prediction_loss(lambda x, t: guess, x_0, t, eps, schedule=schedule, objective=objective)
    weights = loss_weights(schedule, objective=objective, weighting="min_snr")[t]
    expected = schedule.snr[t].clamp(max=5.0) * (wrong - x_0).square().flatten(1).mean(1)
    torch.testing.assert_close(weights * losses, expected, rtol=1e-5, atol=0)


def test_simple_weights_are_one() -> None:
    schedule = linear_schedule(1000, 0.0015, 0.0195)
    assert torch.equal(loss_weights(schedule, objective="v", weighting="simple"), torch.ones(1000))


def test_the_absolute_error_is_the_other_loss() -> None:
    schedule = linear_schedule(1000, 0.0015, 0.0195)
    x_0, t, eps = torch.zeros(2, 1, 4, 4), torch.tensor([5, 500]), torch.ones(2, 1, 4, 4)
    losses = prediction_loss(
        lambda x_t, t: eps - 3.0, x_0, t, eps, schedule=schedule, objective="eps", distance="l1"
    )
    assert losses.tolist() == [3.0, 3.0]


def test_a_learned_log_variance_is_best_at_the_logarithm_of_the_mean_loss() -> None:
    losses, t = torch.tensor([0.5, 1.5, 0.1]), torch.tensor([2, 2, 0])
    log_variance = torch.tensor([0.1, 7.0, 1.0]).log().requires_grad_()
    with_log_variance(losses, log_variance, t).mean().backward()
    assert log_variance.grad is not None
    torch.testing.assert_close(log_variance.grad, torch.zeros(3))


def test_the_flow_schedule_is_a_straight_line_in_its_own_coordinates() -> None:
    schedule = flow_schedule(99)
    noise, signal = (1 - schedule.alpha_bar).sqrt(), schedule.alpha_bar.sqrt()
    torch.testing.assert_close(noise / (signal + noise), torch.arange(1, 100, dtype=torch.float64) / 100)


@pytest.mark.parametrize("name", ["linear", "sqrt_linear", "sqrt", "cosine", "flow"])
def test_every_schedule_of_a_recipe_loses_signal_at_each_time_step(name: str) -> None:
    schedule = build_schedule(Diffusion.model_validate({"schedule": name, "num_timesteps": 200}))
    assert schedule.num_timesteps == 200
    assert (schedule.alpha_bar.diff() < 0).all()
    assert ((schedule.betas > 0) & (schedule.betas < 1)).all()
    assert schedule.alpha_bar[0] > 0.8
