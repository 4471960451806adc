"""The samplers by name, with the time steps each of them is meant for.

T time steps, B batch; x is (B, ...). Denoiser evaluations for n steps: n, but n + 1 for plms, 2n for heun.

    ddim          Song et al. 2021, eq. 12; eta from 0 (deterministic) to 1
    ddpm          Ho et al. 2020, alg. 2; all T steps, stochastic
    plms          Liu et al. 2022, as published with the paper
    dpmpp_2m      Lu et al. 2022b, alg. 2
    dpmpp_2m_sde  Lu et al. 2022b, App. B; stochastic
    unipc         Zhao et al. 2023, order 2
    euler, heun   rectified flow: Liu et al. 2023; Karras et al. 2022, alg. 1
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from ldm.diffusion.ddim import sample_ddim
from ldm.diffusion.ddpm import sample_ddpm
from ldm.diffusion.dpm_solver import sample_dpmpp_2m, sample_dpmpp_2m_sde
from ldm.diffusion.flow import sample_euler, sample_heun
from ldm.diffusion.objective import Denoiser
from ldm.diffusion.plms import sample_plms
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.times import (
    Correction,
    NoiseSource,
    OnStep,
    ancestral_timesteps,
    ddim_timesteps,
    even_timesteps,
    log_snr_timesteps,
)
from ldm.diffusion.unipc import sample_unipc

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddim": sample_ddim,
    "ddpm": sample_ddpm,
    "plms": sample_plms,
    "dpmpp_2m": sample_dpmpp_2m,
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
    "unipc": sample_unipc,
    "euler": sample_euler,
    "heun": sample_heun,
}
STOCHASTIC = frozenset({"ddpm", "dpmpp_2m_sde"})
"""Samplers that always draw noise; DDIM does with eta > 0."""
LOG_SNR = frozenset({"dpmpp_2m", "dpmpp_2m_sde", "unipc"})
"""Samplers whose steps are even in the logarithm of the SNR."""


def timesteps_of(sampler: str, schedule: Schedule, steps: int) -> list[int]:
    """The falling time steps, `steps` of them, that a sampler is meant for.

    Raises:
        ValueError: more steps than there are, or an unknown sampler.
    """
    check_sampler(sampler)
    if sampler in LOG_SNR:
        return log_snr_timesteps(schedule, steps)
    if sampler == "ddpm":
        return ancestral_timesteps(schedule.num_timesteps, steps)
    if sampler in ("ddim", "plms"):
        return ddim_timesteps(schedule.num_timesteps, steps)
    return even_timesteps(schedule.num_timesteps, steps)


def sample(
    sampler: str,
    denoise: Denoiser,
    *,
    x_T: Tensor,
    schedule: Schedule,
    times: Sequence[int],
    eta: float = 0.0,
    noise: NoiseSource | None = None,
    correct: Correction | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw x_0 by a sampler's name.

    Args:
        sampler: a name of `SAMPLERS`.
        denoise: (x_t, t) -> eps.
        x_T: (B, ...) at the noise level of the first time step.
        schedule: the forward process.
        times: falling time steps (`timesteps_of`), or their tail.
        eta: noise of DDIM.
        noise: standard normal noise by step index, for what is stochastic.
        correct: changes x before each step.
        on_step: told after each step.

    Returns:
        x_0, shaped like x_T.

    Raises:
        ValueError: an unknown sampler, noise that is missing, eta of a sampler without, or wrong time steps.
    """
    check_sampler(sampler)
    more = {}
    if sampler == "ddim":
        more = {"eta": eta, "noise": noise}
    elif eta > 0:
        raise ValueError(
            f"eta ({eta}) is the noise of ddim, and {sampler} has none to set; use eta=0, or ddim"
        )
    elif sampler in STOCHASTIC:
        if noise is None:
            raise ValueError(
                f"{sampler} draws noise at every step, got none; give a noise source, or use ddim"
            )
        more = {"noise": noise}
    return SAMPLERS[sampler](
        denoise, x_T, schedule=schedule, times=times, correct=correct, on_step=on_step, **more
    )


def check_sampler(sampler: str) -> None:
    """Refuse a name that is none."""
    if sampler not in SAMPLERS:
        raise ValueError(
            f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}; choose one of these"
        )
