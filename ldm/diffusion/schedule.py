"""The forward process q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I) (paper App. B).

T time steps, B batch; x is (B, ...).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def at(values: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """values[t], shaped to multiply x: (T,), (B,) -> (B, 1, 1, ...) in the type and on the device of x."""
    return values[t].to(x).view(-1, *([1] * (x.dim() - 1)))


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a discrete diffusion."""

    alpha_bar: Tensor
    """(T,) float64: the share of signal variance left at each time step, falling."""

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alpha_bar)

    def add_noise(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps."""
        return at(self.alpha_bar.sqrt(), t, x_0) * x_0 + at((1.0 - self.alpha_bar).sqrt(), t, x_0) * eps

    def x_0_of_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The x_0 that `eps` implies: the inverse of `add_noise`."""
        return (x_t - at((1.0 - self.alpha_bar).sqrt(), t, x_t) * eps) / at(self.alpha_bar.sqrt(), t, x_t)

    def velocity(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Velocity v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 (Salimans & Ho 2022, App. D)."""
        return at(self.alpha_bar.sqrt(), t, x_0) * eps - at((1.0 - self.alpha_bar).sqrt(), t, x_0) * x_0

    def eps_of_velocity(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """The eps that `v` implies: sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t."""
        return at(self.alpha_bar.sqrt(), t, x_t) * v + at((1.0 - self.alpha_bar).sqrt(), t, x_t) * x_t


def linear_schedule(num_timesteps: int, start: float, end: float) -> Schedule:
    """The published schedule: betas are the squares of evenly spaced square roots of `start` ... `end`.

    Other code calls it scaled linear; the published configs call it linear.
    """
    betas = torch.linspace(start**0.5, end**0.5, num_timesteps, dtype=torch.float64).square()
    return Schedule(alpha_bar=torch.cumprod(1.0 - betas, dim=0))
