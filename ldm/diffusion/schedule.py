"""The forward process q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I) (paper App. B).

T time steps, B batch; x is (B, ...).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.config import Diffusion

MAX_BETA = 0.999
COSINE_OFFSET = 0.008


def at(values: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """values[t], shaped to multiply x: (T,), (B,) -> (B, 1, 1, ...) in the type and on the device of x."""
    return values.to(t.device)[t].to(x).view(-1, *([1] * (x.dim() - 1)))


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a discrete diffusion."""

    alpha_bar: Tensor
    """(T,) float64: the share of signal variance left at each time step, falling."""

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alpha_bar)

    @property
    def alpha_bar_before(self) -> Tensor:
        """(T,) float64: alpha_bar one time step earlier, 1 before the first."""
        return torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar[:-1]])

    @property
    def betas(self) -> Tensor:
        """(T,) float64: the share of variance that each time step replaces by noise."""
        return 1.0 - self.alpha_bar / self.alpha_bar_before

    @property
    def snr(self) -> Tensor:
        """(T,) float64: signal to noise ratio alpha_bar / (1 - alpha_bar), falling."""
        return self.alpha_bar / (1.0 - self.alpha_bar)

    @property
    def posterior_variance(self) -> Tensor:
        """(T,) float64: variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7); 0 at the first."""
        return self.betas * (1.0 - self.alpha_bar_before) / (1.0 - self.alpha_bar)

    @property
    def posterior_coefficients(self) -> tuple[Tensor, Tensor]:
        """Both (T,) float64: weights of x_0 and of x_t in the mean of q(x_{t-1} | x_t, x_0) (eq. 7 there)."""
        of_x_0 = self.betas * self.alpha_bar_before.sqrt() / (1.0 - self.alpha_bar)
        of_x_t = (1.0 - self.alpha_bar_before) * (1.0 - self.betas).sqrt() / (1.0 - self.alpha_bar)
        return of_x_0, of_x_t

    def signal(self, t: int) -> float:
        """sqrt(alpha_bar_t): what x_0 is multiplied by."""
        return math.sqrt(float(self.alpha_bar[t]))

    def noise(self, t: int) -> float:
        """sqrt(1 - alpha_bar_t): what eps is multiplied by."""
        return math.sqrt(1.0 - float(self.alpha_bar[t]))

    def half_log_snr(self, t: int) -> float:
        """lambda_t = log(signal / noise), which falls with t (Lu et al. 2022a, Sec. 3.1)."""
        return math.log(self.signal(t) / self.noise(t))

    def add_noise(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps."""
        return at(self.alpha_bar.sqrt(), t, x_0) * x_0 + at((1.0 - self.alpha_bar).sqrt(), t, x_0) * eps

    def x_0_of_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The x_0 that `eps` implies: the inverse of `add_noise`."""
        return (x_t - at((1.0 - self.alpha_bar).sqrt(), t, x_t) * eps) / at(self.alpha_bar.sqrt(), t, x_t)

    def eps_of_x_0(self, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
        """The eps that `x_0` implies: (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t)."""
        return (x_t - at(self.alpha_bar.sqrt(), t, x_t) * x_0) / at((1.0 - self.alpha_bar).sqrt(), t, x_t)

    def velocity(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Velocity v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 (Salimans & Ho 2022, App. D)."""
        return at(self.alpha_bar.sqrt(), t, x_0) * eps - at((1.0 - self.alpha_bar).sqrt(), t, x_0) * x_0

    def eps_of_velocity(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """The eps that `v` implies: sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t."""
        return at(self.alpha_bar.sqrt(), t, x_t) * v + at((1.0 - self.alpha_bar).sqrt(), t, x_t) * x_t

    def eps_of_flow(self, x_t: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """The eps that the flow u = eps - x_0 implies: (x_t + a u) / (a + s), a signal and s noise."""
        signal, noise = at(self.alpha_bar.sqrt(), t, x_t), at((1.0 - self.alpha_bar).sqrt(), t, x_t)
        return (x_t + signal * u) / (signal + noise)


def schedule_of(betas: Tensor) -> Schedule:
    """The schedule with these betas (T,) float64."""
    return Schedule(alpha_bar=torch.cumprod(1.0 - betas, dim=0))


def linear_schedule(num_timesteps: int, start: float, end: float) -> Schedule:
    """The published schedule: betas are the squares of evenly spaced square roots of `start` ... `end`.

    Other code calls it scaled linear; the published configs call it linear.
    """
    return schedule_of(torch.linspace(start**0.5, end**0.5, num_timesteps, dtype=torch.float64).square())


def sqrt_linear_schedule(num_timesteps: int, start: float, end: float) -> Schedule:
    """Betas evenly spaced from `start` to `end` (Ho et al. 2020, Sec. 4); named as published."""
    return schedule_of(torch.linspace(start, end, num_timesteps, dtype=torch.float64))


def sqrt_schedule(num_timesteps: int, start: float, end: float) -> Schedule:
    """Betas are square roots of evenly spaced numbers `start` ... `end`; the name is the published code's."""
    return schedule_of(torch.linspace(start, end, num_timesteps, dtype=torch.float64).sqrt())


def cosine_schedule(num_timesteps: int) -> Schedule:
    """alpha_bar is a squared cosine, with betas of at most 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
    share = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    angle = (share + COSINE_OFFSET) / (1.0 + COSINE_OFFSET) * (math.pi / 2)
    alpha_bar = angle.cos().square()
    return schedule_of((1.0 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0.0, MAX_BETA))


def flow_schedule(num_timesteps: int) -> Schedule:
    """Noise levels of rectified flow (Liu et al. 2023, eq. 1): noise to signal is s to 1 - s, s even.

    Differs: x_t is scaled to unit variance, (1 - s) x_0 + s eps over the root of (1 - s)^2 + s^2, so that
    every sampler and objective of this package takes it; a network learns the same function of a scaled
    input. s = (t + 1) / (T + 1) stops short of 1, where eps says nothing of x_0.
    """
    s = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / (num_timesteps + 1)
    return Schedule(alpha_bar=(1.0 - s).square() / ((1.0 - s).square() + s.square()))


def build_schedule(config: Diffusion) -> Schedule:
    """The schedule of a recipe."""
    match config.schedule:
        case "linear":
            return linear_schedule(config.num_timesteps, config.linear_start, config.linear_end)
        case "sqrt_linear":
            return sqrt_linear_schedule(config.num_timesteps, config.linear_start, config.linear_end)
        case "sqrt":
            return sqrt_schedule(config.num_timesteps, config.linear_start, config.linear_end)
        case "cosine":
            return cosine_schedule(config.num_timesteps)
        case "flow":
            return flow_schedule(config.num_timesteps)
