"""Pictures of one's own: a folder and a YAML of ten lines, trained by one command."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from datasets.store import Store
from flows.preflight import check_data
from ldm.recipe import load_recipe

FLAT = """
base: demo
description: my pictures, unconditional
dataset:
  name: my-pictures
  source: {kind: folder, root: pictures}
  image_size_px: 32
conditioning: null
unet: {context_dim: null}
sampling: {guidance: 1}
"""
BY_CLASS = """
base: demo
description: my pictures, one folder per class
dataset:
  name: my-classes
  source: {kind: folder, root: pictures}
  image_size_px: 32
"""

Pictures = list[tuple[str, bytes]]


def write_own(folder: Path, text: str, pictures: Pictures, *, by_class: bool) -> str:
    """A YAML with a folder of pictures beside it; the YAML's path."""
    for name, png in pictures:
        path = folder / "pictures" / (name.replace("-", "/") if by_class else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
    yaml = folder / "my-run.yaml"
    yaml.write_text(text.lstrip())
    return str(yaml)


def test_a_recipe_of_ones_own_changes_only_what_it_says(tmp_path: Path, cat_pictures: Pictures) -> None:
    own = load_recipe(write_own(tmp_path, BY_CLASS, cat_pictures[:1], by_class=True))
    demo = load_recipe("demo")
    said = {"name": "my-run", "description": "my pictures, one folder per class"}
    assert own.model_copy(update={"dataset": demo.dataset}) == demo.model_copy(update=said)
    assert own.dataset.name == "my-classes"


def test_paths_in_a_yaml_start_at_the_yaml(
    tmp_path: Path, cat_pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_own(tmp_path, FLAT, cat_pictures[:1], by_class=False).rpartition("/")[0])
    assert load_recipe("my-run.yaml").dataset.folder == str(tmp_path / "pictures")
    (tmp_path / "data.yaml").write_text(
        "name: apart\nsource: {kind: folder, root: pictures}\nimage_size_px: 64\n"
    )
    (tmp_path / "apart.yaml").write_text("base: my-run.yaml\ndataset: data.yaml\n")
    (tmp_path / "my-run.yaml").write_text("base: demo\ndataset: data.yaml\nfirst_stage: fs.yaml\n")
    (tmp_path / "fs.yaml").write_text(Path("ldm/recipes").as_posix() and "model: {kind: identity}\n")
    monkeypatch.chdir("/")
    recipe = load_recipe(str(tmp_path / "my-run.yaml"), ["unet.in_channels=3", "unet.out_channels=3"])
    assert (recipe.dataset.name, recipe.dataset.folder) == ("apart", str(tmp_path / "pictures"))
    assert recipe.first_stage.name == "fs"


def test_values_of_the_base_can_be_changed_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "base: demo\ndataset: {image_size_px: 64}\nfirst_stage: {training: {num_images: 320}}\n"
    )
    recipe, demo = load_recipe(str(tmp_path / "a.yaml")), load_recipe("demo")
    assert (recipe.dataset.name, recipe.dataset.image_size_px) == ("cats", 64)
    assert recipe.first_stage.training is not None
    assert recipe.first_stage.training.num_images == 320
    assert recipe.first_stage.model == demo.first_stage.model


@pytest.mark.parametrize(("text", "by_class"), [(FLAT, False), (BY_CLASS, True)])
def test_pictures_suit_their_recipe(
    tmp_path: Path, cat_pictures: Pictures, text: str, by_class: bool
) -> None:
    check_data(load_recipe(write_own(tmp_path, text, cat_pictures, by_class=by_class)))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("text", "by_class"), [(FLAT, False), (BY_CLASS, True)])
def test_200_pictures_and_ten_lines_train_through_the_whole_chain(
    tmp_path: Path,
    cat_pictures: Pictures,
    text: str,
    by_class: bool,
    ldm: Callable[..., subprocess.CompletedProcess[str]],
    tiny_model: list[str],
    options: Callable[[list[str]], list[str]],
) -> None:
    recipe = write_own(tmp_path, text, cat_pictures, by_class=by_class)
    ended = ldm("reproduce", recipe, "--store", str(tmp_path / "store"), *options(tiny_model))
    assert ended.returncode == 0, ended.stderr
    store = Store(tmp_path / "store")
    (shards,) = store.manifests("download-shards")
    assert shards.content.statistics["num_train"] == 180
    assert shards.content.statistics["classes"] == (["dark", "light"] if by_class else [])
    (evaluation,) = store.manifests("evaluate")
    assert json.loads(store.read(evaluation, "scores.json"))["scores"]["num_images"] == 4
    grid = ldm(
        "sample", "ldm-my-run", "--store", str(tmp_path / "store"), "--output", str(tmp_path / "grid.png")
    )
    assert grid.returncode == 0, grid.stderr
