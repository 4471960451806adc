from pathlib import Path

import pytest

from datasets.config import (
    CATALOG,
    DatasetConfig,
    Folder,
    RobohashCats,
    known_datasets,
    load_dataset,
    parse_dataset,
)
from datasets.errors import ConfigError

MINIMAL = {"name": "mine", "source": {"kind": "folder", "root": "/pictures"}, "image_size_px": 64}


def test_every_data_set_of_the_catalog_loads_under_its_own_name():
    names = known_datasets()
    assert names == (
        "cats",
        "celebahq",
        "ffhq",
        "imagenet",
        "laion",
        "landscapes",
        "lsun-bedrooms",
        "lsun-churches",
        "openimages",
        "places",
    )
    assert [load_dataset(name).name for name in names] == list(names)


def test_the_cats_name_their_artist_and_their_15_colours():
    cats = load_dataset("cats")
    assert cats.attribution == "cats by David Revoy, CC-BY 4.0, via robohash"
    assert cats.licence == "CC-BY-4.0"
    assert len(cats.classes) == 15


@pytest.mark.parametrize("name", known_datasets())
def test_a_data_set_says_what_is_in_it_and_whose_it_is(name: str):
    config = load_dataset(name)
    assert config.description
    assert config.licence
    assert config.attribution
    if isinstance(config.source, Folder):
        assert "pictures" in config.source.layout


def test_celebahq_keeps_5000_of_30000_apart():
    source = load_dataset("celebahq").source
    assert isinstance(source, Folder)
    assert source.expected_count == 30000
    assert round(source.held_out_share * 30000) == 5000


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"got 'dogs'; known names: cats, celebahq"):
        load_dataset("dogs")


def test_overrides_lie_over_the_file_key_by_key():
    cats = load_dataset("cats", overrides={"image_size_px": 64, "source": {"train": 7}})
    assert isinstance(cats.source, RobohashCats)
    assert (cats.image_size_px, cats.source.train, cats.source.held_out) == (64, 7, 800)


def test_an_override_of_another_kind_replaces_the_source():
    cats = load_dataset("cats", overrides={"source": {"kind": "folder", "root": "/pictures"}})
    assert cats.source == Folder(kind="folder", root="/pictures")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 64}, r"image_size: Extra inputs are not permitted, got 64"),
        ({"image_size_px": 0}, r"image_size_px: .*greater than or equal to 8, got 0"),
        ({"source": {"kind": "folder", "rot": "/x"}}, r"source\.rot: Extra inputs"),
        ({"source": {"kind": "ftp"}}, r"source: .*'robohash_cats', 'folder', 'url_list'"),
        ({"max_bad_share": float("nan")}, r"max_bad_share"),
        ({"classes": ["a", "b", "a"]}, r"classes must be distinct, got \['a'\]"),
        ({"name": "../x"}, r"name: "),
    ],
)
def test_a_wrong_key_or_value_is_named(change: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        parse_dataset({**MINIMAL, **change})


def test_a_root_makes_no_sense_without_a_folder():
    with pytest.raises(
        ConfigError, match="root is for sources of kind folder, this one is of kind robohash_cats"
    ):
        load_dataset("cats", overrides={"root": "/pictures"})


def test_root_at_the_top_wins_over_the_one_of_the_source():
    assert parse_dataset(MINIMAL).folder == "/pictures"
    assert parse_dataset({**MINIMAL, "root": "/others"}).folder == "/others"


def test_a_relative_root_starts_at_its_yaml(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nsource: {kind: folder, root: pictures}\nimage_size_px: 32\n")
    assert load_dataset(str(path)).folder == str(tmp_path / "pictures")


def test_addresses_and_absolute_paths_in_a_yaml_stay(tmp_path: Path):
    for root in ("s3://bucket/pictures", "/pictures"):
        path = tmp_path / "mine.yaml"
        path.write_text(f"name: mine\nsource: {{kind: folder, root: '{root}'}}\nimage_size_px: 32\n")
        assert load_dataset(str(path)).folder == root


@pytest.mark.parametrize("text", ["- a\n- b\n", "", "name: [", "!!python/object/apply:os.getcwd []\n"])
def test_a_yaml_that_is_no_mapping_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml must"):
        load_dataset(str(path))


def test_a_configuration_survives_its_own_json():
    for path in CATALOG.glob("*.yaml"):
        config = load_dataset(path.stem)
        assert DatasetConfig.model_validate_json(config.model_dump_json()) == config
