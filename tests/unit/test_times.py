from itertools import pairwise

import pytest
import torch

from ldm.diffusion.schedule import Schedule, cosine_schedule, flow_schedule, linear_schedule
from ldm.diffusion.times import (
    ancestral_timesteps,
    ddim_timesteps,
    even_timesteps,
    log_snr_timesteps,
    published_timesteps,
    quad_timesteps,
    walk,
)

SCHEDULE = linear_schedule(1000, 0.0015, 0.0195)


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


@pytest.mark.parametrize(
    "schedule", [SCHEDULE, cosine_schedule(1000), flow_schedule(1000)], ids=["linear", "cosine", "flow"]
)
def test_even_spacings_begin_at_the_last_time_step_and_never_repeat_one(schedule: Schedule) -> None:
    for steps in range(1, 1000):
        for times in (even_timesteps(1000, steps), log_snr_timesteps(schedule, steps)):
            assert len(times) == steps
            assert times[0] == 999
            assert times[-1] >= 1
            assert all(later > earlier for later, earlier in pairwise(times))


def test_spacing_in_log_snr_takes_nearly_equal_steps_there() -> None:
    times = torch.tensor([*log_snr_timesteps(SCHEDULE, 15), 0])
    steps = SCHEDULE.snr.log()[times].diff()
    assert steps.max() / steps.min() < 1.5
    evenly = torch.tensor([*even_timesteps(1000, 15), 0])
    unequal = SCHEDULE.snr.log()[evenly].diff()
    assert unequal.max() / unequal.min() > 5


def test_ancestral_sampling_takes_a_contiguous_tail() -> None:
    assert ancestral_timesteps(1000, 4) == [3, 2, 1, 0]
    assert ancestral_timesteps(1000, 1000) == list(range(1000))[::-1]


@pytest.mark.parametrize("steps", [3, 27, 101, 600])
def test_the_published_spacing_is_refused_where_it_leaves_the_schedule(steps: int) -> None:
    with pytest.raises(
        ValueError, match=rf"must stay below num_timesteps \(1000\), got .* for {steps} steps; use"
    ):
        published_timesteps(1000, steps)


@pytest.mark.parametrize(
    "times",
    [
        [],
        [1000, 5],
        [5, 7],
        [5, 0],
        quad_timesteps(1000, 50),
    ],
    ids=["none", "outside", "rising", "the end itself", "twice the same"],
)
def test_a_walk_refuses_time_steps_that_do_not_fall(times: list[int]) -> None:
    with pytest.raises(
        ValueError, match=r"must fall strictly from at most 999 and stay above 0, got .*; take them"
    ):
        walk(lambda x, i, t, after: x, torch.zeros(1), times, schedule=SCHEDULE, correct=None, on_step=None)


def test_a_correction_comes_before_each_step_with_the_time_step_it_is_at() -> None:
    told: list[str] = []

    def step(x: torch.Tensor, i: int, t: int, after: int) -> torch.Tensor:
        told.append(f"step {i}: {t} to {after} at {int(x)}")
        return x + 1

    def correct(x: torch.Tensor, t: int) -> torch.Tensor:
        told.append(f"correct at {t}")
        return x + 10

    end = walk(step, torch.zeros(()), [7, 3], schedule=SCHEDULE, correct=correct, on_step=None)
    assert int(end) == 22
    assert told == ["correct at 7", "step 0: 7 to 3 at 10", "correct at 3", "step 1: 3 to 0 at 21"]
