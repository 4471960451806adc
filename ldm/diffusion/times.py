"""The time steps that a sampler visits, and the walk along them.

T time steps, B batch; x is (B, ...). A walk visits falling time steps and ends at time step 0, the least
noise there is. Differs: the published samplers end there too, where others go on to no noise at all.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule

QUAD_SHARE = 0.8

NoiseSource = Callable[[int], Tensor]
"""Step index -> standard normal noise of the shape of x."""

Correction = Callable[[Tensor, int], Tensor]
"""(x_t, t) -> x_t: what a caller changes before the step from t, for example known latents put back."""

OnStep = Callable[[int, int], None]
"""Called after each step with (steps done, steps)."""

Step = Callable[[Tensor, int, int, int], Tensor]
"""(x_t, index, t, the time step to go to) -> x there."""


def ddim_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """`steps` time steps, falling, evenly spaced and ending at the first one above the least noise.

    Differs: the published spacing (every T // steps, plus one) gives more steps than asked where steps does
    not divide T, and for some counts an index past the end; where it works, this gives the same.

    Raises:
        ValueError: when more steps are asked for than there are.
    """
    check_steps(num_timesteps, steps)
    span = num_timesteps if 2 * steps <= num_timesteps else num_timesteps - 1
    return [i * span // steps + 1 for i in reversed(range(steps))]


def published_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """The published spacing as it is: every T // steps, plus one, falling (see `ddim_timesteps`).

    Raises:
        ValueError: where it leaves the schedule.
    """
    check_steps(num_timesteps, steps)
    times = [t + 1 for t in range(0, num_timesteps, num_timesteps // steps)]
    if times[-1] >= num_timesteps:
        raise ValueError(
            f"the published spacing must stay below num_timesteps ({num_timesteps}), got {times[-1]} for "
            f"{steps} steps; use another number of steps, or ddim_timesteps"
        )
    return times[::-1]


def quad_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """The published quadratic spacing, denser near the data: squares up to 0.8 T, plus one, falling.

    Large counts repeat the lowest time steps, which `walk` refuses.
    """
    check_steps(num_timesteps, steps)
    roots = np.linspace(0.0, np.sqrt(num_timesteps * QUAD_SHARE), steps)
    return [int(t) + 1 for t in np.square(roots)][::-1]


def even_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """`steps` time steps, falling from the last one, evenly spaced towards time step 0, which is left out."""
    check_steps(num_timesteps, steps)
    return [round((num_timesteps - 1) * i / steps) for i in range(steps, 0, -1)]


def log_snr_timesteps(schedule: Schedule, steps: int) -> list[int]:
    """`steps` time steps, falling from the last one, evenly spaced in the logarithm of the SNR towards 0.

    Exponential solvers take equal steps there (Lu et al. 2022b, Sec. 6). Rounded to the nearest time step;
    where several round to one, near the data, each but the first moves on to the next free one.
    """
    num_timesteps = schedule.num_timesteps
    check_steps(num_timesteps, steps)
    log_snr = schedule.snr.log().numpy(force=True)
    grid = np.linspace(log_snr[0], log_snr[-1], steps + 1)[1:]
    nearest = np.interp(-grid, -log_snr, np.arange(num_timesteps)).round()
    times: list[int] = []
    for i, t in enumerate(nearest):
        free = times[-1] + 1 if times else 1
        times.append(min(max(int(t), free), num_timesteps - (steps - i)))
    return times[::-1]


def ancestral_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """The last `steps` time steps of ancestral sampling: steps - 1, ..., 1, 0."""
    check_steps(num_timesteps + 1, steps)
    return list(range(steps))[::-1]


def check_steps(num_timesteps: int, steps: int) -> None:
    """Refuse more steps than there are."""
    if not 1 <= steps <= num_timesteps - 1:
        raise ValueError(
            f"steps ({steps}) must be between 1 and {num_timesteps - 1}, one less than num_timesteps"
        )


def walk(
    step: Step,
    x: Tensor,
    times: Sequence[int],
    *,
    schedule: Schedule,
    correct: Correction | None,
    on_step: OnStep | None,
    end: int = 0,
) -> Tensor:
    """X at the end of the time steps, each left by one call of `step`.

    Args:
        step: (x_t, index, t, the time step to go to) -> x there.
        x: (B, ...) at the noise level of the first time step.
        times: falling time steps.
        schedule: the forward process they belong to.
        correct: changes x before each step.
        on_step: told after each step.
        end: where the last step goes to; -1 is no noise at all.

    Raises:
        ValueError: time steps that do not fall or leave the schedule.
    """
    highest = schedule.num_timesteps - 1
    if not times or times[0] > highest or any(t <= after for t, after in pairwise([*times, end])):
        raise ValueError(
            f"time steps must fall strictly from at most {highest} and stay above {end}, got {list(times)}; "
            "take them from ldm.diffusion.times, with fewer steps if one occurs twice"
        )
    for i, (t, after) in enumerate(pairwise([*times, end])):
        if correct is not None:
            x = correct(x, t)
        x = step(x, i, t, after)
        if on_step is not None:
            on_step(i + 1, len(times))
    return x


def batch_of(t: int, x: Tensor) -> Tensor:
    """The time step t for each sample of x: (B,) int64."""
    return torch.full((len(x),), t, device=x.device)
