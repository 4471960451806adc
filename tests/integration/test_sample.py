"""`ldm sample`: any model, asked by whatever it takes, into a grid or single files that say how they came."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

Cli = Callable[..., tuple[int, str, str]]
Small = Callable[..., tuple[str, str]]

CAPTION = ("conditioning={kind: caption, context_dim: 32, depth: 1}",)
BARE = ("conditioning=null", "unet.context_dim=null", "sampling.guidance=1")


def maps(kind: str, channels: int) -> tuple[str, ...]:
    """Overrides for a condition beside the latent."""
    unguided = "sampling.guidance=1"
    return (
        f"conditioning={{kind: {kind}}}",
        f"unet.in_channels={channels}",
        "unet.context_dim=null",
        unguided,
    )


@pytest.fixture(scope="module")
def classes(small_model: Small) -> list[str]:
    """A model of class labels, as arguments."""
    store, key = small_model()
    return [key, "--store", store]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A PNG of 40x48 px, grey rising from left to right."""
    ramp = np.linspace(0, 255, 40).astype(np.uint8)
    path = tmp_path / "ramp.png"
    Image.fromarray(np.tile(ramp, (48, 1))).save(path)
    return path


@pytest.fixture
def right(tmp_path: Path) -> Path:
    """A mask of 32x32 px whose right half is to be painted."""
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    path = tmp_path / "right.png"
    Image.fromarray(mask).save(path)
    return path


def done(ended: tuple[int, str, str]) -> str:
    status, out, err = ended
    assert (status, err) == (0, "")
    return out


def refusal(ended: tuple[int, str, str]) -> str:
    status, out, err = ended
    assert (status, out) == (2, ""), (out, err)
    assert err.count("\n") == 1, err
    return err


def opened(path: Path) -> tuple[np.ndarray, dict[str, str]]:
    """Pixels of a PNG and what it says of itself."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int), {
            str(name): text for name, text in image.info.items()
        }


def single(cli: Cli, folder: Path, *arguments: str) -> list[np.ndarray]:
    """Draw into a folder; the pictures in it."""
    done(cli("sample", *arguments, "--output", str(folder)))
    return [opened(path)[0] for path in sorted(folder.iterdir())]


def test_single_files_say_how_each_was_drawn(cli: Cli, classes: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = done(
        cli("sample", *classes, "--classes", "red", "3", "--num", "2", "--seed", "5", "--output", str(out))
    )
    assert re.search(rf"4\s+pictures\s+of\s+model\s+{classes[0][:8]}", said)
    assert [path.name for path in sorted(out.iterdir())] == [f"0000{i}.png" for i in range(4)]
    pixels, text = opened(out / "00002.png")
    assert pixels.shape == (32, 32, 3)
    assert (text["recipe"], text["seed"], text["index"], text["weights"]) == ("demo", "5", "2", "ema")
    assert text["model"].startswith(classes[0])
    assert len(text["model"]) == 64
    sampling = json.loads(text["sampling"])
    assert (sampling["steps"], sampling["micro_batch"], sampling["seed"]) == (3, 2, 5)
    assert {opened(path)[1]["asked"] for path in out.iterdir()} == {
        "red",
        opened(out / "00003.png")[1]["asked"],
    }


def test_a_grid_has_a_row_for_each_class_and_says_which(cli: Cli, classes: list[str], tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    done(cli("sample", *classes, "--classes", "red", "3", "--num", "3", "--output", str(out)))
    pixels, text = opened(out)
    assert pixels.shape[0] == 2 + 2 * (128 + 2)
    assert pixels.shape[1] > 2 + 3 * (128 + 2)
    assert json.loads(text["asked"])[0] == "red"


def test_pictures_of_one_seed_are_the_same_at_any_number(
    cli: Cli, classes: list[str], tmp_path: Path
) -> None:
    few = single(cli, tmp_path / "few", *classes, "--classes", "red", "--num", "1", "--guidance", "2")
    many = single(cli, tmp_path / "many", *classes, "--classes", "red", "--num", "5", "--guidance", "2")
    assert np.array_equal(few[0], many[0])
    assert not np.array_equal(many[0], many[1])


@pytest.mark.parametrize(
    "option", ["--steps 5", "--seed 1", "--sampler unipc", "--guidance 4", "--eta 1", "--weights raw"]
)
def test_every_setting_tells(cli: Cli, classes: list[str], tmp_path: Path, option: str) -> None:
    arguments = [*classes, "--classes", "red", "--num", "1"]
    plain = single(cli, tmp_path / "plain", *arguments)
    assert not np.array_equal(plain, single(cli, tmp_path / "other", *arguments, *option.split()))


def test_guidance_has_an_interval_and_a_rescale(cli: Cli, classes: list[str], tmp_path: Path) -> None:
    arguments = [*classes, "--classes", "red", "--num", "1", "--guidance", "20"]
    plain = single(cli, tmp_path / "plain", *arguments)
    for name, option in {
        "a": ("--guidance-interval", "0", "400"),
        "b": ("--guidance-rescale", "0.9"),
    }.items():
        assert not np.array_equal(plain, single(cli, tmp_path / name, *arguments, *option))


def test_prompts_get_a_row_each(cli: Cli, small_model: Small, tmp_path: Path) -> None:
    store, key = small_model(*CAPTION)
    prompts = ["a red cat", "a cat that is blue and sleeps on a garden wall in the sun"]
    arguments = [key, "--store", store, "--prompt", *prompts, "--num", "1"]
    both = single(cli, tmp_path / "both", *arguments)
    alone = single(cli, tmp_path / "alone", key, "--store", store, "--prompt", prompts[0], "--num", "1")
    assert np.array_equal(both[0], alone[0])
    assert opened(tmp_path / "both" / "00001.png")[1]["asked"] == prompts[1]
    done(cli("sample", *arguments, "--output", str(tmp_path / "grid.png")))
    assert json.loads(opened(tmp_path / "grid.png")[1]["asked"]) == prompts
    assert re.search(
        r"this model \(caption\) must be given caption; name it with --prompt, or --condition FILE",
        refusal(cli("sample", key, "--store", store, "--output", str(tmp_path / "x.png"))),
    )


def test_an_unconditional_model_is_just_drawn_from(cli: Cli, small_model: Small, tmp_path: Path) -> None:
    store, key = small_model(*BARE)
    assert len(single(cli, tmp_path / "out", key, "--store", store, "--num", "3")) == 3
    done(cli("sample", key, "--store", store, "--num", "3", "--output", str(tmp_path / "grid.png")))
    assert opened(tmp_path / "grid.png")[0].shape == (262, 262, 3)


def test_a_picture_is_changed_by_its_strength(
    cli: Cli, classes: list[str], tmp_path: Path, picture: Path
) -> None:
    arguments = [*classes, "--classes", "red", "--num", "1", "--steps", "20"]
    [none] = single(cli, tmp_path / "none", *arguments)
    [little] = single(cli, tmp_path / "little", *arguments, "--image", str(picture), "--strength", "0.1")
    [much] = single(cli, tmp_path / "much", *arguments, "--image", str(picture))
    text = opened(tmp_path / "little" / "00000.png")[1]
    assert re.fullmatch(r"ramp.png, sha256 [0-9a-f]{64}", text["image"])
    assert text["strength"] == "0.1"
    assert len({image.tobytes() for image in (none, little, much)}) == 3


def test_a_part_of_a_picture_is_painted(
    cli: Cli, classes: list[str], tmp_path: Path, picture: Path, right: Path
) -> None:
    arguments = [*classes, "--classes", "red", "--num", "2", "--image", str(picture), "--mask", str(right)]
    first, second = single(cli, tmp_path / "out", *arguments)
    assert np.array_equal(first[:, :16], second[:, :16])
    assert not np.array_equal(first[:, 16:], second[:, 16:])
    columns = first[:, :16].mean((0, 2))
    assert (np.diff(columns) > 0).all()  # the ramp


def test_samples_are_drawn_towards_a_picture(
    cli: Cli, classes: list[str], tmp_path: Path, picture: Path
) -> None:
    arguments = [*classes, "--classes", "red", "--num", "1"]
    plain = single(cli, tmp_path / "plain", *arguments)
    guided = single(cli, tmp_path / "guided", *arguments, "--guide", str(picture), "--guide-scale", "3")
    assert not np.array_equal(plain, guided)
    assert opened(tmp_path / "guided" / "00000.png")[1]["guide_scale"] == "3"


def test_pictures_are_the_condition_of_models_that_take_them(
    cli: Cli, small_model: Small, tmp_path: Path, picture: Path, right: Path
) -> None:
    store, key = small_model(*maps("low_res", 7))
    image = ["--image", str(picture)]
    assert len(single(cli, tmp_path / "small", key, "--store", store, "--num", "2", *image)) == 2
    assert re.search(
        r"this model \(low_res\) must be given low_res; name it with --image, or --condition FILE",
        refusal(cli("sample", key, "--store", store)),
    )
    assert re.search(
        r"--strength is for a picture to change, and this model \(low_res\) takes --image as its condition",
        refusal(cli("sample", key, "--store", store, *image, "--strength", "0.5")),
    )
    store, key = small_model(*maps("masked_image", 9))
    both = [*image, "--mask", str(right)]
    assert len(single(cli, tmp_path / "painted", key, "--store", store, "--num", "2", *both)) == 2
    assert re.search(
        r"must be given mask; name it with --mask", refusal(cli("sample", key, "--store", store, *image))
    )


def test_any_condition_can_come_from_a_file(cli: Cli, small_model: Small, tmp_path: Path) -> None:
    store, key = small_model("conditioning={kind: layout, context_dim: 32, depth: 1, drop_rate: 0.1}")
    draws = torch.Generator().manual_seed(0)
    save_file({"layout": torch.randint(8000, (3, 92), generator=draws)}, tmp_path / "boxes.safetensors")
    given = ["--condition", str(tmp_path / "boxes.safetensors")]
    drawn = single(cli, tmp_path / "out", key, "--store", store, *given, "--num", "2")
    assert len(drawn) == 6
    assert opened(tmp_path / "out" / "00005.png")[1]["asked"] == "2"
    assert re.search(
        r"this model \(layout\) must be given layout; name it with --condition FILE",
        refusal(cli("sample", key, "--store", store)),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--prompt cat", r"--prompt is not what this model \(class_label\) is asked by; leave it out"),
        ("--classes purple-ish", r"unknown class 'purple-ish'; this model knows .*red"),
        ("--strength 0.5", r"--strength needs --image, got --strength alone; give both or neither"),
        ("--mask {right}", r"--mask needs --image, got --mask alone"),
        ("--guide-scale 2", r"--guide-scale needs --guide, got --guide-scale alone"),
        ("--image {picture} --strength 2", r"strength \(2.0\) must be above 0 and at most 1"),
        ("--image nowhere.png", r"nowhere.png must be a readable picture"),
        ("--image {small}", r"small.png must be a PNG, .* of at least 32 px a side, found: too_small"),
        ("--condition {picture}", r"ramp.png must be a readable safetensors file of conditions"),
        ("--steps 5000", r"sampling.steps \(5000\) must be below diffusion.num_timesteps \(1000\)"),
        ("--guidance-rescale 0.5 --guidance 1", r"guidance_rescale .* need guidance"),
        ("--sampler magic", r"sampling.sampler: .*'magic'"),
        ("--output {tmp}/no/x.png", r"the folder of .*x.png must exist; make it"),
        ("--output {tmp}/x.jpg", r"--output must be a .png for a grid or a folder for a file per picture"),
        ("--output {tmp}", r"nothing is overwritten, and .* exists; name another folder with --output"),
    ],
)
def test_what_makes_no_sense_is_refused(
    cli: Cli, classes: list[str], tmp_path: Path, picture: Path, right: Path, arguments: str, message: str
) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "small.png")
    places = {"picture": picture, "right": right, "tmp": tmp_path, "small": tmp_path / "small.png"}
    wanted = [argument.format(**places) for argument in arguments.split()]
    output = [] if "--output" in wanted else ["--output", str(tmp_path / "out.png")]
    assert re.search(message, refusal(cli("sample", *classes, *wanted, *output)))
    assert not (tmp_path / "out.png").exists()


def test_too_many_classes_are_not_drawn_unasked(cli: Cli, small_model: Small, tmp_path: Path) -> None:
    store, key = small_model(
        "conditioning={kind: class_vector}", "unet.context_dim=null", "unet.num_classes=101"
    )
    said = refusal(cli("sample", key, "--store", store, "--output", str(tmp_path / "x.png")))
    assert re.search(r"a grid of all 100 classes would be too large; name some with --classes", said)
    assert len(single(cli, tmp_path / "out", key, "--store", store, "--classes", "99", "--num", "2")) == 2
