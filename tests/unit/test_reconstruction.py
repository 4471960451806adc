import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.evaluation.reconstruction import gaussian_window, psnr, scores, ssim


def pictures(count: int, *, seed: int, height: int = 16, width: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def similarity_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """Equation 13 of Wang et al. 2004 for one channel, window by window."""
    side = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weights = np.outer(side, side) / np.outer(side, side).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values: list[float] = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (z[top : top + 11, left : left + 11].astype(np.float64) for z in (x, y))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            variance_a, variance_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
            above = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
            values.append(above / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)))
    return float(np.mean(values))


def test_psnr_of_a_constant_error_is_known() -> None:
    x = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    off = torch.tensor([1, 51], dtype=torch.uint8)[:, None, None, None]
    expected = [20 * math.log10(255), 20 * math.log10(255 / 51)]
    assert psnr(x + off, x).tolist() == pytest.approx(expected, rel=1e-12)
    assert psnr(x, x + off).tolist() == pytest.approx(expected, rel=1e-12)


def test_equal_pictures_have_infinite_psnr_and_similarity_one() -> None:
    x = pictures(2, seed=0)
    assert psnr(x, x).tolist() == [math.inf, math.inf]
    assert ssim(x, x).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)


def test_ssim_is_the_formula_of_the_paper_window_by_window() -> None:
    x = pictures(2, seed=1)
    y = (x.float() * 0.7 + 30 + 0.1 * pictures(2, seed=2)).to(torch.uint8)
    expected = [
        np.mean([similarity_by_loops(p, q) for p, q in zip(a.numpy(), b.numpy(), strict=True)])
        for a, b in zip(x, y, strict=True)
    ]
    assert ssim(x, y).tolist() == pytest.approx(expected, rel=1e-9)


def test_ssim_is_symmetric_and_falls_with_noise() -> None:
    x = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    x[..., 8:24, 8:24] = 30
    noise = pictures(1, seed=3, height=32, width=32).float() - 127.5
    light, strong = ((x + share * noise).round().clamp(0, 255).to(torch.uint8) for share in (0.1, 0.5))
    torch.testing.assert_close(ssim(x, light), ssim(light, x))
    assert 1.0 > ssim(x, light).item() > ssim(x, strong).item()


def test_window_is_a_symmetric_average() -> None:
    window = gaussian_window(11, 1.5)
    assert window.sum().item() == pytest.approx(1.0, abs=1e-15)
    assert torch.equal(window, window.flip(0))
    assert (window[4] / window[5]).item() == pytest.approx(math.exp(-1 / (2 * 1.5**2)))


def test_scores_do_not_depend_on_how_pictures_come_in_batches() -> None:
    x, y = pictures(5, seed=4), pictures(5, seed=5)
    together = scores([(x, y)])
    cut = scores(zip(x.split([1, 4]), y.split([1, 4]), strict=True))
    assert cut == pytest.approx(together, rel=1e-12)
    assert together["psnr_db"] == pytest.approx(psnr(x, y).mean().item())
    assert together["ssim"] == pytest.approx(ssim(x, y).mean().item())


def test_pictures_that_cannot_be_compared_are_refused() -> None:
    x = pictures(2, seed=6)
    with pytest.raises(ValueError, match=r"must be uint8 .* received torch\.float32"):
        psnr(x.float(), x)
    with pytest.raises(ValueError, match=r"one shape .* received \(2, 3, 16, 20\) and \(1, 3, 16, 20\)"):
        psnr(x, x[:1])
    with pytest.raises(ValueError, match=r"at least 11 px on a side .* received 16x10"):
        ssim(x[..., :10], x[..., :10])
    with pytest.raises(ValueError, match="received none"):
        scores([])
