import math
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from ldm import pictures


def some_images(count: int, *, side_px: int = 8) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, side_px, side_px, 3), dtype=np.uint8)


def decoded(data: bytes) -> np.ndarray:
    with Image.open(BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def test_a_png_gives_back_the_same_pixels() -> None:
    image = some_images(1)[0]
    assert np.array_equal(decoded(pictures.png(image)), image)


def test_a_png_of_floats_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float64; use ldm\.range\.to_uint8"):
        pictures.png(np.zeros((4, 4, 3)))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("scale", "padding"), [(1, 0), (1, 2), (3, 2)])
def test_a_grid_holds_every_image_enlarged_without_smoothing(scale: int, padding: int) -> None:
    images, columns = some_images(5), 3
    sheet = np.asarray(pictures.grid(images, columns=columns, scale=scale, padding=padding))
    cell = 8 * scale
    assert sheet.shape == (padding + 2 * (cell + padding), padding + 3 * (cell + padding), 3)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = padding + row * (cell + padding), padding + column * (cell + padding)
        block = sheet[top : top + cell, left : left + cell]
        assert np.array_equal(block, image.repeat(scale, axis=0).repeat(scale, axis=1))


def test_labels_and_title_make_room_and_leave_the_images_whole() -> None:
    images = np.zeros((4, 16, 16, 3), dtype=np.uint8)
    plain = pictures.grid(images, columns=2, padding=2)
    labelled = pictures.grid(images, columns=2, padding=2, row_labels=["ivory", "sea green"], title="cats")
    assert labelled.width > plain.width
    assert labelled.height > plain.height
    corner = (labelled.width - plain.width, labelled.height - plain.height, labelled.width, labelled.height)
    assert np.array_equal(np.asarray(labelled.crop(corner)), np.asarray(plain))
    margin = np.asarray(labelled.crop((0, 0, corner[0], labelled.height)))
    assert (margin < 128).any(), "the labels are drawn in ink"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((0, 8, 8, 3), dtype=np.uint8)}, "N >= 1"),
        ({"images": np.zeros((2, 8, 8, 3))}, "float64"),
        ({"columns": 0}, "at least 1"),
        ({"row_labels": ["one"]}, "2 rows, got 1"),
    ],
)
def test_a_grid_says_what_does_not_fit(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"images": some_images(4), "columns": 2} | change
    images = arguments.pop("images")
    with pytest.raises(ValueError, match=message):
        pictures.grid(images, **arguments)  # pyright: ignore[reportArgumentType]


def test_each_reconstruction_lies_below_its_original() -> None:
    original, reconstruction = some_images(3), some_images(3)[::-1]
    sheet = np.asarray(pictures.side_by_side(original, reconstruction, columns=2))
    left = sheet.shape[1] - 2 - 2 * 10
    for index in range(3):
        row, column = divmod(index, 2)
        x = left + 2 + column * 10
        for offset, images in ((0, original), (1, reconstruction)):
            y = 2 + (2 * row + offset) * 10
            assert np.array_equal(sheet[y : y + 8, x : x + 8], images[index])


def test_a_missing_reconstruction_is_refused() -> None:
    with pytest.raises(ValueError, match="each original needs"):
        pictures.side_by_side(some_images(3), some_images(2), columns=2)


def test_plots_are_pngs_of_a_readable_size_and_keep_no_figure_open() -> None:
    import matplotlib.pyplot as plt

    series = {"train": [(0, 2.0), (64_000, 0.5), (128_000, math.nan), (192_000, 0.1)], "held out": [(0, 2.5)]}
    plain = pictures.curves(series, title="loss", ylabel="loss")
    scaled = pictures.curves(series | {"gone": [(0, -1.0)]}, title="loss", ylabel="loss", log_y=True)
    empty = pictures.curves({}, title="nothing yet", ylabel="loss", log_y=True)
    scores = pictures.bars({"samples": 106.2, "noise": math.inf}, title="n = 400", xlabel="FID", floor=22.0)
    for data in (plain, scaled, empty, scores):
        pixels = decoded(data)
        assert pixels.shape[1] >= 800
        assert (pixels < 100).any()
    assert plain != scaled
    assert plt.get_fignums() == []


def test_equal_series_give_equal_bytes() -> None:
    series = {"loss": [(0, 1.0), (10, 0.5)]}
    first, second = (pictures.curves(series, title="t", ylabel="loss") for _ in range(2))
    assert first == second


def test_text_is_kept_in_the_file_and_leaves_the_pixels_alone() -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    with Image.open(BytesIO(pictures.png(image, text={"seed": "7", "title": "na\u00efve"}))) as opened:
        assert opened.info == {"seed": "7", "title": "na\u00efve"}
        assert np.array_equal(np.asarray(opened), image)
    assert b"iTXt" not in pictures.png(image)
