import pytest
import torch
from torch import Tensor

from ldm.diffusion.guidance import guide

CONTEXT, NULL = torch.full((2, 1, 3), 5.0), torch.full((2, 1, 3), 1.0)
X, T = torch.arange(2.0).view(2, 1, 1, 1), torch.tensor([3, 4])


class Recorder:
    """A denoiser that answers with its context's mean plus its input, and counts what it was given."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        assert len(x_t) == len(t) == len(context)
        self.rows.append(len(x_t))
        return x_t + context.mean(dim=(1, 2))[:, None, None, None]


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_noise_goes_from_the_unasked_through_the_asked_one(scale: float) -> None:
    guided = guide(Recorder(), CONTEXT, NULL, scale=scale)(X, T)
    torch.testing.assert_close(guided, X + 1.0 + scale * (5.0 - 1.0))


@pytest.mark.parametrize(("scale", "rows"), [(1.0, [2]), (2.0, [4])])
def test_only_guidance_costs_a_second_evaluation(scale: float, rows: list[int]) -> None:
    denoise = Recorder()
    guide(denoise, CONTEXT, NULL, scale=scale)(X, T)
    assert denoise.rows == rows
