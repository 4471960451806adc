import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from datasets.curate import FORMATS, Outcome, curate

SIZE = 16
GREY = 100


def flat(mode: str = "RGB", size: tuple[int, int] = (24, 24), colour: Any = (200, 100, 50)) -> Image.Image:
    return Image.new(mode, size, colour)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))


def pixels_of(result: bytes | Outcome) -> np.ndarray:
    assert isinstance(result, bytes), result
    with Image.open(io.BytesIO(result), formats=("PNG",)) as image:
        assert (image.mode, image.size, image.info) == ("RGB", (SIZE, SIZE), {})
        return np.asarray(image).astype(int)


def curated(data: bytes) -> np.ndarray:
    return pixels_of(curate(data, size_px=SIZE, crop="centre"))


def refused(data: bytes, *, crop: Any = "centre") -> Outcome:
    result = curate(data, size_px=SIZE, crop=crop)
    assert isinstance(result, Outcome)
    return result


def sixteen_bit() -> Image.Image:
    return Image.fromarray(np.full((24, 24), GREY * 257, np.uint16))


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


FLAT_PICTURES: dict[str, tuple[Callable[[], bytes], tuple[int, int, int]]] = {
    "RGB": (lambda: encoded(flat()), (200, 100, 50)),
    "WebP": (lambda: encoded(flat(), "WEBP", lossless=True), (200, 100, 50)),
    "grey": (lambda: encoded(flat("L", colour=GREY)), (GREY, GREY, GREY)),
    "black and white": (lambda: encoded(flat("1", colour=1)), (255, 255, 255)),
    "16-bit grey": (lambda: encoded(sixteen_bit()), (GREY, GREY, GREY)),
    "palette": (lambda: encoded(flat().quantize(4)), (200, 100, 50)),
    "half transparent": (lambda: encoded(flat("RGBA", colour=(0, 0, 0, 128))), (127, 127, 127)),
    "transparent": (lambda: encoded(flat("RGBA", colour=(9, 9, 9, 0))), (255, 255, 255)),
    "grey with alpha": (lambda: encoded(flat("LA", colour=(0, 0))), (255, 255, 255)),
    "transparent colour": (lambda: encoded(flat(), transparency=(200, 100, 50)), (255, 255, 255)),
    "sRGB profile": (lambda: encoded(flat(), icc_profile=srgb_profile()), (200, 100, 50)),
    "broken profile": (lambda: encoded(flat(), icc_profile=b"no profile"), (200, 100, 50)),
    "JPEG": (lambda: encoded(flat("L", colour=GREY), "JPEG"), (GREY, GREY, GREY)),
    "progressive JPEG": (
        lambda: encoded(flat("L", colour=GREY), "JPEG", progressive=True),
        (GREY, GREY, GREY),
    ),
    "CMYK JPEG": (lambda: encoded(flat("CMYK", colour=(0, 0, 0, 155)), "JPEG"), (GREY, GREY, GREY)),
}


@pytest.mark.parametrize("name", FLAT_PICTURES)
def test_every_kind_of_picture_keeps_its_colour(name: str):
    make, colour = FLAT_PICTURES[name]
    assert np.abs(curated(make()) - colour).max() <= 1


def test_a_picture_of_the_right_size_keeps_its_pixels():
    picture = noise((SIZE, SIZE))
    assert (curated(encoded(picture)) == np.asarray(picture)).all()


def test_curating_the_result_changes_nothing():
    once = curate(encoded(noise((50, 40))), size_px=SIZE, crop="centre")
    assert isinstance(once, bytes)
    assert curate(once, size_px=SIZE, crop="centre") == once


def test_the_middle_is_kept():
    picture = flat(size=(48, 24), colour=(0, 0, 0))
    picture.paste((255, 255, 255), (12, 0, 36, 24))
    assert (curated(encoded(picture)) == 255).all()
    assert (curated(encoded(picture.rotate(90, expand=True))) == 255).all()


def test_shrinking_averages_instead_of_dropping():
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    assert np.abs(curated(encoded(Image.fromarray(checks.astype(np.uint8))))[2:-2, 2:-2] - 127.5).max() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotation_recorded_by_the_camera_is_applied(orientation: int):
    upright = flat(size=(SIZE, SIZE), colour=(0, 0, 0))
    upright.paste((255, 255, 255), (0, 0, 8, 4))  # a mark at the top left, wider than high
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (curated(encoded(stored, exif=exif)) == np.asarray(upright)).all()


def test_metadata_stays_behind():
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "who took it")
    data = encoded(flat(size=(SIZE, SIZE)), pnginfo=text, icc_profile=srgb_profile(), dpi=(72, 72))
    result = curate(data, size_px=SIZE, crop="centre")
    assert isinstance(result, bytes)
    assert b"who took it" not in result
    assert b"iCCP" not in result


@pytest.mark.parametrize("format", FORMATS)
def test_a_cut_file_is_called_truncated(format: str):
    whole = encoded(noise(), format)
    assert refused(whole[: len(whole) // 2]) == Outcome.TRUNCATED
    assert refused(whole[:14]) == Outcome.TRUNCATED


@pytest.mark.parametrize("format", FORMATS)
def test_no_damage_is_an_exception(format: str):
    whole = bytearray(encoded(noise((24, 24)), format))
    random = np.random.default_rng(0)
    for _ in range(150):
        damaged = whole.copy()
        for place in random.integers(0, len(whole), 3):
            damaged[place] ^= 1 << int(random.integers(8))
        assert isinstance(curate(bytes(damaged), size_px=SIZE, crop="centre"), bytes | Outcome)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"<!doctype html><title>404</title>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        bytes(99),
    ],
)
def test_what_is_no_picture_is_called_so(data: bytes):
    assert refused(data) == Outcome.NOT_AN_IMAGE


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "ICO", "AVIF"])
def test_other_formats_are_called_unsupported(format: str):
    assert refused(encoded(flat(), format)) == Outcome.UNSUPPORTED_FORMAT


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_animations_are_refused(format: str):
    frames = [flat(colour=(shade, 0, 0)) for shade in (10, 200)]
    assert refused(encoded(frames[0], format, save_all=True, append_images=frames[1:])) == Outcome.ANIMATED


def test_a_bomb_is_refused_by_its_header():
    below_the_limit_of_pillow, above_it = 9_000, 20_000  # 81 and 400 Mpixel, as the header says
    for side in (below_the_limit_of_pillow, above_it):
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        whole = encoded(flat())
        bomb = whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
        assert refused(bomb) == Outcome.TOO_LARGE


def test_pictures_are_never_enlarged():
    assert refused(encoded(flat(size=(SIZE, SIZE - 1)))) == Outcome.TOO_SMALL
    assert isinstance(curate(encoded(flat(size=(SIZE, SIZE))), size_px=SIZE, crop="centre"), bytes)


def test_without_a_crop_only_squares_pass():
    assert refused(encoded(flat(size=(24, 25))), crop="none") == Outcome.NOT_SQUARE
    assert isinstance(curate(encoded(flat(size=(24, 24))), size_px=SIZE, crop="none"), bytes)
