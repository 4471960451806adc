import numpy as np
import torch

from ldm.range import from_uint8, to_uint8


def test_every_level_survives_the_way_into_the_model_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    x = from_uint8(levels)
    assert x.dtype == torch.float32
    assert (x.min().item(), x.max().item()) == (-1.0, 1.0)
    assert np.array_equal(to_uint8(x), levels)


def test_values_are_rounded_to_the_nearest_level_and_clamped() -> None:
    x = torch.tensor([99.6, 99.4, 300.0, -20.0]) / 127.5 - 1.0
    assert to_uint8(x.view(1, 1, 1, 4).expand(1, 3, 1, 4))[0, 0, :, 1].tolist() == [100, 99, 255, 0]


def test_channels_are_last_as_bytes_and_first_as_tensors() -> None:
    images = np.zeros((2, 4, 5, 3), dtype=np.uint8)
    images[1, 3, 2] = (255, 0, 51)
    x = from_uint8(images)
    assert x.shape == (2, 3, 4, 5)
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x[1, :, 3, 2], torch.tensor([1.0, -1.0, -0.6]))
    assert to_uint8(x).shape == images.shape


def test_reading_leaves_the_pictures_of_a_view_as_they_are() -> None:
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    mirrored = images[:, :, ::-1]
    assert torch.equal(from_uint8(mirrored), from_uint8(images).flip(3))
