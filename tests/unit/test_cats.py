import hashlib
import io
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.cats import (
    ACCESSORY,
    DEAD,
    EYES,
    FUR,
    MOUTH,
    NUM_COMBINATIONS,
    NUM_PARTS,
    CatPainter,
    Combination,
    draw_combinations,
    listed_digest,
    offered_paths,
    paint_folder,
    parts_digest,
)
from datasets.config import load_dataset
from datasets.errors import ConfigError, MissingDataError

BODIES = load_dataset("cats").classes
CAT = Combination(8, 3, 11, 2, 5)


@pytest.fixture(scope="module")
def painter() -> CatPainter:
    return CatPainter(32)


def test_there_are_360000_combinations_and_a_word_for_each_part():
    assert NUM_COMBINATIONS == 360_000
    assert (len(BODIES), len(FUR), len(EYES), len(MOUTH), len(ACCESSORY)) == NUM_PARTS


def test_a_file_name_holds_the_combination():
    assert CAT.file_name == "b08-f03-e11-m02-a05.png"
    for cat in draw_combinations(200, seed=3):
        assert Combination.from_file_name(cat.file_name) == cat


@pytest.mark.parametrize(
    "name", ["cat.png", "b15-f00-e00-m00-a00.png", "b8-f3-e11-m2-a5.png", "../b08-f03-e11-m02-a05.png"]
)
def test_other_file_names_are_refused(name: str):
    with pytest.raises(ValueError, match="a cat's file name is like"):
        Combination.from_file_name(name)


def test_a_caption_names_the_parts():
    assert CAT.caption(BODIES) == "a swirly blue cat with narrow eyes and a small mouth, wearing a black hat"
    assert (
        CAT._replace(accessory=15).caption(BODIES) == "a swirly blue cat with narrow eyes and a small mouth"
    )


def test_captions_tell_all_parts_apart():
    for kind, count in enumerate(NUM_PARTS):
        captions = {
            CAT._replace(**{Combination._fields[kind]: part}).caption(BODIES) for part in range(count)
        }
        assert len(captions) == count


def test_no_combination_is_offered_twice():
    paths = offered_paths(train=600, held_out=80, dead=20, seed=0)
    names = [path.split("/")[1] for path in paths]
    assert len(set(names)) == len(names) == 700


def test_the_counts_asked_for_are_offered_and_the_dead_vary():
    folders = Counter(path.split("/")[0] for path in offered_paths(train=600, held_out=80, dead=20, seed=0))
    assert folders == {"train": 600, "held_out": 80, "gone": 12, "page": 4, "cut": 2, "changed": 2}
    assert folders["gone"] == 2 * DEAD.count("gone")


def test_dead_rows_lie_between_usable_ones():
    paths = offered_paths(train=600, held_out=80, dead=20, seed=0)
    places = [place for place, path in enumerate(paths) if path.split("/")[0] in DEAD]
    assert min(places) < 200
    assert max(places) > 500


def test_another_seed_offers_other_cats():
    first, second = (offered_paths(train=50, held_out=5, dead=5, seed=seed) for seed in (0, 1))
    assert first == offered_paths(train=50, held_out=5, dead=5, seed=0)
    assert len(set(first) & set(second)) < 3


def test_colours_are_as_even_as_chance_makes_them():
    counts = Counter(cat.body for cat in draw_combinations(6000, seed=0))
    expected, deviation = 400, (6000 * (1 / 15) * (14 / 15)) ** 0.5
    assert len(counts) == 15
    assert all(abs(count - expected) < 5 * deviation for count in counts.values())


def test_more_cats_than_combinations_are_refused():
    with pytest.raises(ConfigError, match=r"at most 360000 .* got 360001"):
        draw_combinations(NUM_COMBINATIONS + 1, seed=0)


def test_a_picture_is_rgb_on_white_and_mostly_of_its_colour(painter: CatPainter):
    pixels = np.asarray(painter.paint(Combination(8, 2, 2, 2, 15)))  # plain blue
    assert pixels.shape == (32, 32, 3)
    assert (pixels[0, -1] == 255).all()
    red, green, blue = np.median(pixels[12:20, 12:20].reshape(-1, 3), axis=0)
    assert blue > green > red


def test_painting_again_gives_the_same_bytes(painter: CatPainter):
    assert painter.png(CAT) == CatPainter(32).png(CAT)


def test_pixels_are_those_that_were_recorded(painter: CatPainter):
    # sha256 of painter.paint(cat).tobytes() for draw_combinations(20, seed=0) at 32 px, joined;
    # another value means that lists made before no longer match: raise url_list.CODE_VERSION
    pixels = b"".join(painter.paint(cat).tobytes() for cat in draw_combinations(20, seed=0))
    assert (
        hashlib.sha256(pixels).hexdigest()
        == "514b61f8af25a1b7756e27bf62b9b2c850bf3fd197a17ead79ba15ba5053f0f3"
    )


def test_what_is_offered_differs_from_what_is_listed_only_where_it_should(
    tmp_path: Path, painter: CatPainter
):
    paths = offered_paths(train=3, held_out=2, dead=10, seed=0)
    paint_folder(tmp_path, dict.fromkeys(paths, ""), painter=painter)
    for path in paths:
        kind, name = path.split("/")
        digest = listed_digest(tmp_path, path, painter=painter)
        whole = hashlib.sha256(painter.png(Combination.from_file_name(name))).hexdigest()
        offered = (tmp_path / path).read_bytes() if (tmp_path / path).exists() else None
        if kind == "gone":
            assert (offered, digest) == (None, "")
            continue
        assert offered is not None
        assert (digest == hashlib.sha256(offered).hexdigest()) == (kind != "changed")
        assert (digest == whole) == (kind in {"train", "held_out", "changed"})
        assert offered.startswith(b"<!doctype html>") == (kind == "page")
        if kind != "page":
            assert Image.open(io.BytesIO(offered), formats=("PNG",)).size == (32, 32)


def test_pictures_that_are_there_are_kept_and_damaged_ones_are_painted_again(
    tmp_path: Path, painter: CatPainter
):
    paths = offered_paths(train=3, held_out=1, dead=0, seed=0)
    paint_folder(tmp_path, dict.fromkeys(paths, ""), painter=painter)
    digests = {path: listed_digest(tmp_path, path, painter=painter) for path in paths}
    damaged, kept = tmp_path / paths[0], tmp_path / paths[1]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:50])
    before = kept.stat().st_mtime_ns, kept.stat().st_ino
    paint_folder(tmp_path, digests, painter=painter)
    assert damaged.read_bytes() == whole
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == before


def test_a_missing_package_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "robohash", None)
    with pytest.raises(MissingDataError, match=r"package robohash, which is missing; run `make setup`"):
        parts_digest()
