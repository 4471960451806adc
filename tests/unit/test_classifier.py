import pytest
import torch
from torch import Tensor

from ldm.evaluation.classifier import Classifier, accuracy, learning_rate, normalised, train_classifier

NUM_CLASSES = 4
COLOURS = torch.tensor([[220, 40, 40], [40, 200, 60], [50, 70, 220], [230, 200, 40]], dtype=torch.uint8)


def coloured_squares(count: int, *, seed: int, side_px: int = 16) -> tuple[Tensor, Tensor]:
    """Pictures of noise with a square whose colour is the class and whose place is not."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, side_px, side_px)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (count,), generator=generator)
    square = side_px // 3
    corners = torch.randint(0, side_px - square, (count, 2), generator=generator).tolist()
    for image, label, (top, left) in zip(images, labels, corners, strict=True):
        image[:, top : top + square, left : left + square] = COLOURS[label, :, None, None]
    return images, labels


def trained(*, seed: int = 0, num_images: int = 128) -> Classifier:
    images, labels = coloured_squares(100, seed=1)
    return train_classifier(images, labels, num_classes=NUM_CLASSES, seed=seed, num_images=num_images)


def weights_of(model: Classifier) -> Tensor:
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


def test_classes_are_learnt_and_hold_for_pictures_never_seen() -> None:
    images, labels = coloured_squares(600, seed=2)
    model = train_classifier(images, labels, num_classes=NUM_CLASSES, seed=0, num_images=6_000)
    assert accuracy(model, *coloured_squares(200, seed=3)) > 0.97


def test_accuracy_is_the_share_of_labels_met() -> None:
    model = trained()
    images, _ = coloured_squares(100, seed=4)
    guesses = model(images).argmax(dim=1)
    assert accuracy(model, images, guesses) == 1.0
    assert accuracy(model, images, (guesses + 1) % NUM_CLASSES) == 0.0
    half = torch.where(torch.arange(100) < 50, guesses, (guesses + 1) % NUM_CLASSES)
    assert accuracy(model, images, half) == 0.5


def test_equal_seeds_give_equal_weights_and_others_do_not() -> None:
    first = trained(seed=5)
    torch.rand(7)
    assert torch.equal(weights_of(trained(seed=5)), weights_of(first))
    assert not torch.equal(weights_of(trained(seed=6)), weights_of(first))


def test_training_leaves_random_state_and_threads_alone() -> None:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    model = trained()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_gradient_reaches_every_parameter() -> None:
    model = Classifier(num_classes=NUM_CLASSES, generator=torch.Generator().manual_seed(0))
    model(coloured_squares(4, seed=7)[0]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_verdict_does_not_depend_on_the_other_pictures() -> None:
    model, (images, _) = trained(), coloured_squares(6, seed=8)
    alone = torch.cat([model(part) for part in images.split(1)])
    torch.testing.assert_close(model(images), alone)


@pytest.mark.parametrize("side_px", [28, 32])
def test_pictures_up_to_32_px_keep_their_pixels(side_px: int) -> None:
    images = torch.full((1, 3, side_px, side_px), 255, dtype=torch.uint8)
    images[..., 0, 0] = 0
    pixels = normalised(images)
    assert pixels.shape == images.shape
    assert pixels.amin() == -1.0
    assert pixels.amax() == 1.0


def test_larger_pictures_are_averaged_down_to_32_px() -> None:
    small = torch.randint(
        0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(9)
    )
    large = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(normalised(large), normalised(small))
    model = trained()
    torch.testing.assert_close(model(large), model(small))


def test_progress_ends_at_the_budget() -> None:
    images, labels = coloured_squares(100, seed=10)
    seen: list[tuple[int, int]] = []
    train_classifier(
        images,
        labels,
        num_classes=NUM_CLASSES,
        seed=0,
        num_images=150,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(64, 150), (128, 150), (150, 150)]


def test_fewer_pictures_than_a_batch_are_enough() -> None:
    images, labels = coloured_squares(5, seed=11)
    model = train_classifier(images, labels, num_classes=NUM_CLASSES, seed=0, num_images=500)
    assert accuracy(model, images, labels) == 1.0


def test_learning_rate_rises_then_falls_to_nothing() -> None:
    rates = [learning_rate(seen, num_images=1_000) for seen in range(0, 1_001, 50)]
    peak = rates.index(max(rates))
    assert rates[0] == 0.0
    assert peak == 2
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(1_064, num_images=1_000) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("label", [-1, NUM_CLASSES])
def test_label_out_of_range_is_refused_in_training_and_in_judging(label: int) -> None:
    images, labels = coloured_squares(10, seed=12)
    model = train_classifier(images, labels, num_classes=NUM_CLASSES, seed=0, num_images=10)
    labels[3] = label
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.3, .* -1 means"):
        train_classifier(images, labels, num_classes=NUM_CLASSES, seed=0)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.3"):
        accuracy(model, images, labels)


def test_pictures_and_labels_that_do_not_fit_are_refused() -> None:
    images, labels = coloured_squares(10, seed=13)
    with pytest.raises(ValueError, match=r"\(9,\) for 10 pictures"):
        train_classifier(images, labels[:9], num_classes=NUM_CLASSES, seed=0)
    with pytest.raises(ValueError, match="at least one picture"):
        train_classifier(images[:0], labels[:0], num_classes=NUM_CLASSES, seed=0)
    with pytest.raises(ValueError, match=r"uint8 .* received torch.float32"):
        train_classifier(images.float(), labels, num_classes=NUM_CLASSES, seed=0)
