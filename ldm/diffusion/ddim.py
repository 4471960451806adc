"""DDIM sampling (Song et al. 2021, eq. 12): from noise to x_0 in a few of the T time steps.

B batch; x is (B, ...).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.objective import Denoiser
from ldm.diffusion.schedule import Schedule

NoiseSource = Callable[[int], Tensor]
"""Step index -> standard normal noise of the shape of x."""


def ddim_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """`steps` time steps, falling, evenly spaced and ending at the first one above zero noise.

    Differs: the published spacing (every T // steps, plus one) gives more steps than asked where steps does
    not divide T, and for some counts an index past the end; where it works, this gives the same.

    Raises:
        ValueError: when more steps are asked for than there are.
    """
    if not 1 <= steps <= num_timesteps - 1:
        raise ValueError(
            f"steps ({steps}) must be between 1 and {num_timesteps - 1}, one less than num_timesteps"
        )
    span = num_timesteps if 2 * steps <= num_timesteps else num_timesteps - 1
    return [i * span // steps + 1 for i in reversed(range(steps))]


@torch.no_grad()
def sample_ddim(
    denoise: Denoiser,
    x_T: Tensor,
    *,
    schedule: Schedule,
    steps: int,
    eta: float = 0.0,
    noise: NoiseSource | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw x_0.

    Args:
        denoise: (x_t, t) -> eps.
        x_T: (B, ...) standard normal noise.
        schedule: the forward process.
        steps: evaluations of the denoiser.
        eta: 0 is deterministic, 1 as noisy as ancestral sampling.
        noise: what eta > 0 draws from.
        on_step: called with (done, steps).

    Returns:
        x_0, shaped like x_T.

    Raises:
        ValueError: eta > 0 without a source of noise, or an impossible number of steps.
    """
    if eta > 0 and noise is None:
        raise ValueError(f"eta ({eta}) > 0 draws noise at every step; give a noise source or eta=0")
    times = ddim_timesteps(schedule.num_timesteps, steps)
    x = x_T
    for i, t in enumerate(times):
        # Differs: the last step lands on alpha_bar_0, as published, not on 1.
        alpha_bar = schedule.alpha_bar[t]
        previous = schedule.alpha_bar[times[i + 1] if i + 1 < len(times) else 0]
        sigma = eta * ((1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous)).sqrt()
        eps = denoise(x, torch.full((len(x),), t, device=x.device))
        x_0 = (x - float((1 - alpha_bar).sqrt()) * eps) / float(alpha_bar.sqrt())
        x = float(previous.sqrt()) * x_0 + float((1 - previous - sigma**2).clamp(min=0).sqrt()) * eps
        if noise is not None and eta > 0:
            x = x + float(sigma) * noise(i)
        if on_step is not None:
            on_step(i + 1, steps)
    return x
