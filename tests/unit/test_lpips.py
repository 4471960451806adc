from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm.models.lpips import LPIPS, build_lpips, unit_normalised


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return build_lpips()


def pictures(count: int, side_px: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, side_px, side_px, generator=generator) * 2 - 1


def flipped(x: Tensor) -> Tensor:
    return x.flip(3)


def dimmed(x: Tensor) -> Tensor:
    return 0.8 * x


# lpips 0.1.4: lpips.LPIPS(net="vgg")(x, change(x)), the heads of its release and torchvision's VGG16
@pytest.mark.parity
@pytest.mark.parametrize(
    ("change", "expected"), [(torch.clone, 0.0), (flipped, 0.183892), (dimmed, 0.002225)]
)
def test_distance_is_that_of_the_reference_package(
    lpips: LPIPS, change: Callable[[Tensor], Tensor], expected: float
) -> None:
    x = ((torch.arange(3 * 64 * 64) * 37 % 256) / 127.5 - 1).reshape(1, 3, 64, 64)
    assert lpips(x, change(x)).item() == pytest.approx(expected, abs=1e-6)


def test_equal_pictures_have_no_distance_and_others_have_some(lpips: LPIPS) -> None:
    x = pictures(2, 32, seed=0)
    assert lpips(x, x).tolist() == [0.0, 0.0]
    assert lpips(x, -x).min() > 0.01


def test_distance_is_symmetric(lpips: LPIPS) -> None:
    x, y = pictures(2, 32, seed=1), pictures(2, 32, seed=2)
    torch.testing.assert_close(lpips(x, y), lpips(y, x))


def test_distance_of_a_picture_does_not_depend_on_its_neighbours(lpips: LPIPS) -> None:
    x, y = pictures(3, 32, seed=3), pictures(3, 32, seed=4)
    alone = torch.cat([lpips(a, b) for a, b in zip(x.split(1), y.split(1), strict=True)])
    torch.testing.assert_close(lpips(x, y), alone)


def test_stronger_noise_is_farther(lpips: LPIPS) -> None:
    x, noise = pictures(1, 32, seed=5) * 0.5, pictures(1, 32, seed=6)
    near, middle, far = (lpips(x, x + strength * noise).item() for strength in (0.05, 0.2, 0.5))
    assert near < middle < far


def test_gradient_reaches_the_picture_and_no_parameter(lpips: LPIPS) -> None:
    x = pictures(2, 32, seed=7).requires_grad_()
    lpips(x, pictures(2, 32, seed=8)).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert (x.grad.flatten(1).abs().amax(dim=1) > 0).all()
    assert not any(p.requires_grad or p.grad is not None for p in lpips.parameters())
    assert not lpips.training


def test_a_step_against_the_gradient_brings_pictures_nearer(lpips: LPIPS) -> None:
    x, y = pictures(1, 32, seed=9).requires_grad_(), pictures(1, 32, seed=10)
    before = lpips(x, y).sum()
    (gradient,) = torch.autograd.grad(before, x)
    assert lpips((x - 0.01 * gradient.sign()).detach(), y) < before


def test_features_taken_once_give_the_same_distance(lpips: LPIPS) -> None:
    x, y = pictures(2, 32, seed=11), pictures(2, 32, seed=12)
    assert torch.equal(lpips.distance(lpips.features(x), lpips.features(y)), lpips(x, y))


def test_levels_halve_the_sides_and_have_unit_length(lpips: LPIPS) -> None:
    features = lpips.features(pictures(1, 32, seed=13))
    assert [tuple(level.shape) for level in features] == [
        (1, width, side, side)
        for width, side in zip((64, 128, 256, 512, 512), (32, 16, 8, 4, 2), strict=True)
    ]
    for level in features:
        length = level.norm(dim=1)
        assert ((length - 1).abs() < 1e-4).logical_or(length == 0).all()


def test_all_zero_features_have_a_finite_gradient() -> None:
    features = torch.zeros(1, 4, 2, 2)
    features[..., 0] = 1.0
    features.requires_grad_()
    unit_normalised(features).square().sum().backward()
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()


def test_building_leaves_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    build_lpips()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_state_survives_saving_and_loading(lpips: LPIPS) -> None:
    other = build_lpips()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(lpips.state_dict())
    x, y = pictures(1, 32, seed=14), pictures(1, 32, seed=15)
    assert torch.equal(other(x, y), lpips(x, y))
