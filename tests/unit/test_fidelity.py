from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.evaluation import fidelity
from ldm.weights import FID_INCEPTION, inception_state, locate


@pytest.fixture(scope="module")
def weights_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inception_state(tmp_path_factory.mktemp("weights"))


def pictures(count: int, side_px: int = 16, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side_px, side_px), dtype=torch.uint8, generator=generator)


def gaussian_features(count: int, width: int, *, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, width)) @ rng.standard_normal((width, width)) + rng.standard_normal(
        width
    )


def square_root(matrix: np.ndarray) -> np.ndarray:
    """The positive root of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def test_features_do_not_depend_on_how_pictures_come_in_batches(weights_path: Path) -> None:
    x = pictures(5)
    together = fidelity.extract_features([x], weights_path=weights_path, micro_batch=2)
    cut = fidelity.extract_features(iter(x.split([1, 3, 1])), weights_path=weights_path, micro_batch=2)
    assert together.shape == (5, fidelity.NUM_FEATURES)
    assert together.dtype == np.float32
    np.testing.assert_array_equal(cut, together)


def test_features_do_not_depend_on_the_other_pictures(weights_path: Path) -> None:
    x = pictures(3)
    order = [2, 0]
    first = fidelity.extract_features([x], weights_path=weights_path, micro_batch=2)
    second = fidelity.extract_features([x[order]], weights_path=weights_path, micro_batch=2)
    np.testing.assert_array_equal(second, first[order])


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")
def test_features_are_those_of_the_packaged_graph(weights_path: Path) -> None:
    x = pictures(2, 299)  # the size at which nothing is resized
    graph = torch.jit.load(str(locate(FID_INCEPTION)), map_location="cpu").eval()
    with torch.no_grad():
        expected = graph((x.float() - 128) / 128).numpy()
    found = fidelity.extract_features([x], weights_path=weights_path, micro_batch=2)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_extraction_counts_pictures_and_leaves_the_global_random_state_alone(weights_path: Path) -> None:
    before = torch.random.get_rng_state()
    seen: list[tuple[int, int]] = []
    fidelity.extract_features(
        pictures(3).split(1),
        weights_path=weights_path,
        micro_batch=2,
        num_images=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 3), (3, 3)]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_picture_gives_no_feature_and_a_missing_one_is_an_error(weights_path: Path) -> None:
    assert fidelity.extract_features([], weights_path=weights_path).shape == (0, fidelity.NUM_FEATURES)
    with pytest.raises(ValueError, match=r"num_images \(2\) .* received 0"):
        fidelity.extract_features([pictures(0)], weights_path=weights_path, num_images=2)


@pytest.mark.parametrize("sizes", [(), (0,), (3,), (1, 1), (2, 0, 5), (9, 1), (4, 4), (1,) * 7])
def test_micro_batches_keep_every_picture_in_order_and_one_shape(sizes: tuple[int, ...]) -> None:
    x = pictures(sum(sizes), 8)
    parts = list(fidelity.micro_batches(x.split(list(sizes)) if sizes else [], 4))
    assert all(part.shape == (4, 3, 8, 8) for part, _ in parts)
    assert [count for _, count in parts[:-1]] == [4] * (len(parts) - 1)
    assert all(not part[count:].any() for part, count in parts)
    kept = [part[:count] for part, count in parts]
    assert torch.equal(torch.cat(kept) if kept else x[:0], x)


@pytest.mark.parametrize(
    ("batches", "size", "message"),
    [
        ([pictures(1).float()], 2, r"uint8 .* received torch.float32 \(1, 3, 16, 16\)"),
        ([pictures(1).permute(0, 2, 3, 1)], 2, r"received torch.uint8 \(1, 16, 16, 3\)"),
        ([pictures(1, 16), pictures(1, 8)], 4, r"one size, received \(16, 16\) and \(8, 8\)"),
        ([pictures(1)], 0, "at least 1, received 0"),
    ],
)
def test_pictures_of_another_form_are_refused(batches: list[Tensor], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(fidelity.micro_batches(batches, size))


def test_fid_is_the_frechet_distance_of_two_gaussians() -> None:
    a, b = gaussian_features(300, 24, seed=0), gaussian_features(200, 24, seed=1)
    root = square_root(np.cov(a.T))
    cross = np.trace(square_root(root @ np.cov(b.T) @ root))
    shift = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    expected = shift + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * cross
    assert fidelity.scores(a, b)["fid"] == pytest.approx(expected, rel=1e-6)
    assert fidelity.scores(b, a)["fid"] == pytest.approx(expected, rel=1e-6)


def test_kid_of_few_pictures_is_the_unbiased_discrepancy_of_all() -> None:
    a, b = gaussian_features(40, 16, seed=2), gaussian_features(40, 16, seed=3)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / 16 + 1) ** 3

    def mean_of_pairs(x: np.ndarray) -> float:
        return (kernel(x, x).sum() - np.trace(kernel(x, x))) / (len(x) * (len(x) - 1))

    found = fidelity.scores(a, b)
    assert found["kid"] == pytest.approx(
        mean_of_pairs(a) + mean_of_pairs(b) - 2 * kernel(a, b).mean(), rel=1e-9
    )
    assert found["kid_std"] == pytest.approx(0.0, abs=1e-9 * found["kid"])


def test_precision_is_of_generated_pictures_and_recall_of_real_ones() -> None:
    rng = np.random.default_rng(4)
    one_mode = rng.standard_normal((60, 2))
    two_modes = np.concatenate([rng.standard_normal((60, 2)), rng.standard_normal((60, 2)) + 100])
    dropped_a_mode = fidelity.scores(one_mode, two_modes)
    assert dropped_a_mode["precision"] > 0.9
    assert 0.4 < dropped_a_mode["recall"] <= 0.5
    invented_a_mode = fidelity.scores(two_modes, one_mode)
    assert 0.4 < invented_a_mode["precision"] <= 0.5
    assert invented_a_mode["recall"] > 0.9


def test_equal_features_score_perfectly() -> None:
    a = gaussian_features(150, 16, seed=5)
    found = fidelity.scores(a, a.copy())
    assert found["fid"] == pytest.approx(0.0, abs=1e-6 * np.trace(np.cov(a.T)))
    assert (found["precision"], found["recall"]) == (1.0, 1.0)
    assert abs(found["kid"]) < 10 * found["kid_std"]


def test_scores_are_quiet_and_repeatable_whatever_the_global_random_state(
    capfd: pytest.CaptureFixture[str],
) -> None:
    a, b = gaussian_features(130, 8, seed=6), gaussian_features(120, 8, seed=7)
    first = fidelity.scores(a, b)
    torch.rand(1)
    assert fidelity.scores(a, b) == first
    assert set(first) == {"fid", "kid", "kid_std", "precision", "recall"}
    assert capfd.readouterr() == ("", "")


def test_features_that_cannot_be_scored_are_refused() -> None:
    a = gaussian_features(10, 4, seed=8)
    with pytest.raises(ValueError, match=r"features must be \(N, D\) with N > 3 .* received \(3, 4\)"):
        fidelity.scores(a[:3], a)
    with pytest.raises(ValueError, match="received widths 4 and 3"):
        fidelity.scores(a, a[:, :3])
    with pytest.raises(ValueError, match="reference must be finite"):
        fidelity.scores(a, np.where(a > 0, np.nan, a))


@pytest.mark.parametrize("num_images", [1, 400, 2048])
def test_fid_of_fewer_pictures_than_features_is_called_rank_deficient(num_images: int) -> None:
    warning = fidelity.bias_warning(num_images)
    assert warning is not None
    assert f"n={num_images} " in warning
    assert "biased upward" in warning
    assert "rank-deficient" in warning


def test_fid_of_few_pictures_is_called_biased_and_of_many_is_not() -> None:
    warning = fidelity.bias_warning(2049)
    assert warning is not None
    assert "n=2049 pictures is biased upward" in warning
    assert "rank-deficient" not in warning
    assert fidelity.bias_warning(9_999) is not None
    assert fidelity.bias_warning(10_000) is None
