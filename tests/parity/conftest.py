"""The judge of stored outputs."""

from collections.abc import Callable

import pytest
from torch import Tensor


@pytest.fixture
def differs() -> Callable[..., str]:
    """Compares what was computed with what is stored."""
    return difference


def difference(got: Tensor, want: Tensor, *, atol: float, rtol: float) -> str:
    """What is wrong with an output, or nothing. Whole numbers must be equal, others within a bound."""
    if got.shape != want.shape:
        return f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    if not want.is_floating_point():
        return f"{int((got != want).sum())} differ" if bool((got != want).any()) else ""
    error = (got.double() - want.double()).abs()
    within = bool((error <= atol + rtol * want.double().abs()).all()) and bool(got.isfinite().all())
    return "" if within else f"largest error {float(error.max()):.2e}"
