import hashlib
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datasets.config import DatasetConfig, load_dataset, parse_dataset
from datasets.errors import ConfigError, MissingDataError
from datasets.store import Store
from datasets.url_list import NO_CLASS, STAGE, Row, UrlList, plan_list, read_url_list

CATS = {"image_size_px": 16, "source": {"train": 12, "held_out": 4, "dead": 10}}
rows = st.builds(
    Row,
    url=st.text(),
    caption=st.text(),
    class_label=st.integers(-1, 1000),
    split=st.sampled_from(["train", "held_out"]),
    sha256=st.text("0123456789abcdef", max_size=64),
)


def folder_config(root: Path | str | None, **source: Any) -> DatasetConfig:
    given_source = {"kind": "folder", "root": None if root is None else str(root), **source}
    return parse_dataset({"name": "mine", "source": given_source, "image_size_px": 16})


def list_config(uri: Path, **source: Any) -> DatasetConfig:
    return parse_dataset(
        {"name": "mine", "source": {"kind": "url_list", "uri": str(uri), **source}, "image_size_px": 16}
    )


def write_pictures(root: Path, names: list[str]) -> None:
    for index, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (index % 256, 0, 0)).save(root / name)


def made(config: DatasetConfig, tmp_path: Path) -> UrlList:
    return plan_list(config).make(tmp_path / "spool")


@given(st.lists(rows, max_size=20), st.lists(st.text(), max_size=3))
def test_a_list_survives_its_parquet(given_rows: list[Row], classes: list[str]):
    url_list = UrlList(tuple(given_rows), tuple(classes))
    data = url_list.to_parquet()
    again = UrlList.from_parquet(data, classes=classes)
    assert again == url_list
    assert (again.identity(), again.to_parquet()) == (url_list.identity(), data)


@given(st.lists(rows, min_size=1, max_size=5), st.data())
def test_any_change_of_a_row_changes_the_identity(given_rows: list[Row], data: st.DataObject):
    index = data.draw(st.integers(0, len(given_rows) - 1))
    field = data.draw(st.sampled_from(Row._fields))
    value = getattr(given_rows[index], field)
    other = value + 1 if isinstance(value, int) else value + "x"
    changed = [*given_rows]
    changed[index] = changed[index]._replace(**{field: other})
    assert UrlList(tuple(changed), ()).identity() != UrlList(tuple(given_rows), ()).identity()


def test_the_list_of_the_cats_says_where_what_and_which_bytes(tmp_path: Path):
    config = load_dataset("cats", overrides=CATS)
    url_list = made(config, tmp_path)
    assert len(url_list.rows) == 26
    for row in url_list.rows:
        assert not row.url.startswith("http")
        assert config.classes[row.class_label] in row.caption
        offered = tmp_path / "spool" / row.url
        if row.url.startswith(("train", "held_out")):
            assert hashlib.sha256(offered.read_bytes()).hexdigest() == row.sha256
    assert [row.split for row in url_list.rows].count("held_out") == 4


def test_a_committed_list_is_found_and_not_made_again(tmp_path: Path):
    store, config = Store(tmp_path / "store"), load_dataset("cats", overrides=CATS)
    assert plan_list(config).find(store) is None
    manifest = plan_list(config).build(store, provenance={"run": "first"})
    assert plan_list(config).find(store) == manifest
    assert plan_list(config).build(store, provenance={"run": "second"}) == manifest
    assert manifest.stage == STAGE
    assert manifest.provenance["attribution"] == config.attribution
    url_list = read_url_list(store, manifest)
    assert url_list.identity() == manifest.content.statistics["identity"]
    assert url_list == made(config, tmp_path)


@pytest.mark.parametrize("change", [{"image_size_px": 32}, {"source": {"seed": 1}}, {"source": {"dead": 11}}])
def test_what_decides_the_rows_decides_the_key(change: dict[str, Any]):
    config = load_dataset("cats", overrides=CATS)
    document = config.model_dump() | change
    document["source"] = config.source.model_dump() | change.get("source", {})
    assert plan_list(parse_dataset(document)).key != plan_list(config).key


@pytest.mark.parametrize(
    "change", [{"name": "other"}, {"max_bad_share": 0.5}, {"allow_private_addresses": False}]
)
def test_what_decides_no_row_leaves_the_key(change: dict[str, Any]):
    config = load_dataset("cats", overrides=CATS)
    assert plan_list(parse_dataset(config.model_dump() | change)).key == plan_list(config).key


def test_a_folder_without_folders_has_no_classes(tmp_path: Path):
    write_pictures(tmp_path, [f"{index}.png" for index in range(10)])
    url_list = made(folder_config(tmp_path), tmp_path)
    assert url_list.classes == ()
    assert {row.class_label for row in url_list.rows} == {NO_CLASS}
    assert [row.url for row in url_list.rows] == [f"{index}.png" for index in range(10)]


def test_the_first_folder_is_the_class(tmp_path: Path):
    write_pictures(tmp_path, ["b/0.png", "a/1.JPG", "a/deep/2.webp", "3.png"])
    url_list = made(folder_config(tmp_path), tmp_path)
    assert url_list.classes == ("a", "b")
    assert [(row.url, row.class_label) for row in url_list.rows] == [
        ("3.png", NO_CLASS),
        ("a/1.JPG", 0),
        ("a/deep/2.webp", 0),
        ("b/0.png", 1),
    ]


def test_classes_named_give_the_order_and_must_cover_the_folders(tmp_path: Path):
    write_pictures(tmp_path, ["b/0.png", "a/1.png"])
    config = folder_config(tmp_path)
    named = config.model_copy(update={"classes": ("c", "b", "a")})
    assert [row.class_label for row in made(named, tmp_path).rows] == [2, 1]
    with pytest.raises(ConfigError, match=r"must be one of classes, got \['a'\]"):
        plan_list(config.model_copy(update={"classes": ("b",)}))


def test_folders_may_mean_nothing(tmp_path: Path):
    write_pictures(tmp_path, ["b/0.png", "a/1.png"])
    assert made(folder_config(tmp_path, classes_from_folders=False), tmp_path).classes == ()


def test_captions_lie_beside_the_pictures(tmp_path: Path):
    write_pictures(tmp_path, ["0.png", "1.png"])
    (tmp_path / "0.txt").write_text("a red\n square \n")
    assert [row.caption for row in made(folder_config(tmp_path), tmp_path).rows] == ["a red square", ""]


def test_hidden_files_and_other_files_are_passed_over(tmp_path: Path):
    write_pictures(tmp_path, ["0.png", "1.png", ".2.png", ".cache/3.png"])
    (tmp_path / "notes.md").write_text("x")
    assert [row.url for row in made(folder_config(tmp_path), tmp_path).rows] == ["0.png", "1.png"]


@pytest.mark.parametrize(
    ("count", "share", "expected"), [(30, 1 / 6, 5), (200, 0.1, 20), (3, 0.1, 1), (10, 0.0, 0)]
)
def test_the_share_asked_for_is_held_out(tmp_path: Path, count: int, share: float, expected: int):
    write_pictures(tmp_path, [f"{index}.png" for index in range(count)])
    config = folder_config(tmp_path, held_out_share=share)
    splits = [row.split for row in made(config, tmp_path).rows]
    assert splits.count("held_out") == expected
    assert splits.count("train") == count - expected


def test_the_same_picture_name_has_the_same_split_wherever_the_folder_lies(tmp_path: Path):
    names = [f"{index}.png" for index in range(20)]
    for root in (tmp_path / "here", tmp_path / "there"):
        write_pictures(root, names)
    here, there = (plan_list(folder_config(tmp_path / place)) for place in ("here", "there"))
    assert here.key == there.key
    assert here.make(tmp_path) == there.make(tmp_path)


def test_a_changed_picture_or_caption_changes_the_key(tmp_path: Path):
    write_pictures(tmp_path, ["0.png", "1.png"])
    keys = {plan_list(folder_config(tmp_path)).key}
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "0.png")
    keys.add(plan_list(folder_config(tmp_path)).key)
    (tmp_path / "1.txt").write_text("words")
    keys.add(plan_list(folder_config(tmp_path)).key)
    assert len(keys) == 3


def test_a_missing_folder_says_what_is_expected_and_how_to_name_it(tmp_path: Path):
    celebahq = load_dataset("celebahq")
    cure = r"`--set dataset\.root=/path/to/pictures`.* 30000 PNG.*25000 train, 5000 val"
    with pytest.raises(MissingDataError, match=f"its folder is not set.*{cure}"):
        plan_list(celebahq)
    with pytest.raises(MissingDataError, match=f"nowhere does not exist or is empty.*{cure}"):
        plan_list(celebahq.model_copy(update={"root": str(tmp_path / "nowhere")}))
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(MissingDataError, match="holds no picture"):
        plan_list(celebahq.model_copy(update={"root": str(tmp_path)}))


def test_another_count_than_expected_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_pictures(tmp_path, ["0.png", "1.png"])
    plan_list(load_dataset("celebahq", overrides={"root": str(tmp_path)}))
    assert "a complete copy has 30000 pictures" in caplog.text
    assert "holds 2; going on" in caplog.text


def test_a_folder_may_lie_in_any_file_system(tmp_path: Path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for index in range(3):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16)).save(buffer, "PNG")
        memory.pipe_file(f"/pictures/a/{index}.png", buffer.getvalue())
    url_list = made(folder_config("memory://pictures"), tmp_path)
    assert [row.url for row in url_list.rows] == ["a/0.png", "a/1.png", "a/2.png"]


def write_list(path: Path, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


URLS = [f"https://example.com/{index}.jpg" for index in range(10)]


def test_a_list_of_ones_own_keeps_rows_and_order(tmp_path: Path):
    path = write_list(tmp_path / "list.parquet", URL=URLS, TEXT=[None, *"abcdefghi"], kind=["y", "x"] * 5)
    config = list_config(path, url_column="URL", caption_column="TEXT", class_column="kind")
    url_list = made(config, tmp_path)
    assert [row.url for row in url_list.rows] == URLS
    assert [row.caption for row in url_list.rows] == ["", *"abcdefghi"]
    assert [row.class_label for row in url_list.rows] == [1, 0] * 5
    assert url_list.classes == ("x", "y")
    assert [row.split for row in url_list.rows].count("held_out") == 1


def test_numbers_in_a_class_column_are_labels(tmp_path: Path):
    path = write_list(tmp_path / "list.parquet", url=URLS, label=[0, 2, None, -1, *[1] * 6])
    url_list = made(list_config(path, class_column="label"), tmp_path)
    assert [row.class_label for row in url_list.rows] == [0, 2, -1, -1, *[1] * 6]
    assert url_list.classes == ("0", "1", "2")
    named = list_config(path, class_column="label").model_copy(update={"classes": ("a", "b")})
    with pytest.raises(ConfigError, match=r"from -1 to 1, got \[2\]"):
        made(named, tmp_path)


def test_one_address_is_in_one_split(tmp_path: Path):
    path = write_list(tmp_path / "list.parquet", url=URLS * 3)
    rows = made(list_config(path, held_out_share=0.5), tmp_path).rows
    assert not {row.url for row in rows if row.split == "train"} & {
        row.url for row in rows if row.split == "held_out"
    }


def test_a_missing_column_or_list_is_named(tmp_path: Path):
    path = write_list(tmp_path / "list.parquet", address=URLS)
    with pytest.raises(ConfigError, match=r"lacks \['url'\]; it has \['address'\]"):
        made(list_config(path), tmp_path)
    with pytest.raises(MissingDataError, match=r"none\.parquet cannot be read"):
        plan_list(list_config(tmp_path / "none.parquet"))
    (tmp_path / "page.parquet").write_text("<html>")
    with pytest.raises(ConfigError, match="must be a Parquet file"):
        made(list_config(tmp_path / "page.parquet"), tmp_path)
