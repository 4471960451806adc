"""`ldm reconstruct`: pictures of one's own through a first stage and back."""

import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.cats import CatPainter, draw_combinations
from ldm.evaluation.reconstruction import psnr, ssim
from ldm.evaluation.sets import nchw
from ldm.model import load_first_stage
from ldm.model_folder import write_model_folder
from ldm.models.lpips import build_lpips
from ldm.range import from_uint8, to_uint8
from ldm.stored_models import stored_first_stage

Cli = Callable[..., tuple[int, str, str]]


def cat(number: int = 0, size_px: int = 32) -> Image.Image:
    """A painted cat."""
    return CatPainter(size_px).paint(draw_combinations(number + 1, seed=5)[number])


def save(folder: Path, **pictures: Image.Image) -> Path:
    """A folder with these pictures."""
    folder.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
    return folder


def pixels(path: Path) -> np.ndarray:
    """A picture's values as whole numbers."""
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def rows_of(said: str) -> dict[str, list[str]]:
    """The table's rows: name, then cells."""
    cells = [re.split(r"\s*[│┃]\s*", line.strip("│┃ ")) for line in said.splitlines()]
    return {row[0].strip(): row[1:] for row in cells if len(row) > 1}


def refusal(ended: tuple[int, str, str]) -> str:
    """The message of a run that was refused."""
    status, _, err = ended
    assert status == 2, err
    return err.splitlines()[-1]


@pytest.fixture
def run(cli: Cli, vq_chain: Any, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Runs `ldm reconstruct` with the first stage of the tiny chain, into `out.png`."""
    common = ["--model", vq_chain.first_stage.key[:12], "--store", str(vq_chain.store.root)]
    return lambda *arguments: cli(
        "reconstruct", *map(str, arguments), *common, "--output", str(tmp_path / "out.png")
    )


def test_the_table_has_the_scores_of_each_picture_and_their_means(
    run: Callable[..., tuple[int, str, str]], vq_chain: Any, tmp_path: Path
) -> None:
    folder = save(tmp_path / "cats", a=cat(0), b=cat(1))
    status, said, err = run(folder)
    assert (status, err) == (0, "")
    model = load_first_stage(vq_chain.store, vq_chain.first_stage)
    originals = np.stack([np.asarray(cat(0)), np.asarray(cat(1))])
    x = from_uint8(originals)
    decoded = to_uint8(model.decode(model.latent(model.encode(x), None)))
    expected = torch.stack(
        [
            psnr(nchw(decoded), nchw(originals)),
            ssim(nchw(decoded), nchw(originals)),
            build_lpips()(from_uint8(decoded), x).double(),
        ],
        dim=1,
    )
    rows = rows_of(said)
    for name, scores in (("a.png", expected[0]), ("b.png", expected[1]), ("mean", expected.mean(0))):
        assert [float(cell) for cell in rows[name][1:4]] == pytest.approx(scores.tolist(), rel=2e-3)
    assert rows["a.png"][0] == "32x32"
    assert pixels(tmp_path / "out.png").shape[0] > 2 * 128  # two rows of cats, enlarged


def test_a_model_folder_does_as_well_and_bands_change_nothing_to_see(
    cli: Cli, run: Callable[..., tuple[int, str, str]], vq_chain: Any, tmp_path: Path
) -> None:
    write_model_folder(tmp_path / "model", stored_first_stage(vq_chain.store, vq_chain.first_stage))
    cats = save(tmp_path / "cats", large=cat(0, 256), tall=cat(1, 160).crop((20, 0, 100, 160)))
    plain = rows_of(run(cats)[1])
    arguments = ["reconstruct", str(cats), "--model", str(tmp_path / "model"), "--memory", "0.02"]
    status, said, err = cli(*arguments, "--output", str(tmp_path / "banded.png"))
    assert (status, err) == (0, "")
    banded = rows_of(said)
    assert banded["tall.png"][0] == "80x160"
    for name in ("large.png", "tall.png", "mean"):
        for one, other in zip(banded[name][1:4], plain[name][1:4], strict=True):
            assert float(one) == pytest.approx(float(other), rel=2e-3)
    found, expected = (pixels(tmp_path / name) for name in ("banded.png", "out.png"))
    assert found.shape[1] >= 3 * 256  # original, decoded, difference
    seen = np.abs(found - expected) > 4  # a level of the difference shows fourfold
    assert seen.mean() < 0.01  # a latent halfway between two codes may take the other


def test_every_kind_of_picture_is_brought_to_rgb(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    grey16 = Image.fromarray((np.asarray(cat().convert("L")).astype(np.uint16)) * 257)
    folder = save(
        tmp_path / "kinds",
        alpha=cat().convert("RGBA"),
        grey=cat().convert("L"),
        palette=cat().convert("P"),
        sixteen=grey16,
    )
    status, said, _ = run(folder)
    rows = rows_of(said)
    assert status == 0
    assert {"alpha.png", "grey.png", "palette.png", "sixteen.png"} <= rows.keys()
    assert rows["sixteen.png"][1:4] == rows["grey.png"][1:4]


def test_pictures_that_cannot_be_used_are_named_and_left_out(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    folder = save(tmp_path / "mixed", good=cat())
    data = BytesIO()
    cat(0, 64).save(data, format="PNG")
    (folder / "cut.png").write_bytes(data.getvalue()[:900])
    (folder / "text.png").write_text("no picture")
    status, said, _ = run(folder)
    rows = rows_of(said)
    assert status == 0
    assert rows["cut.png"][0] == "refused: truncated"
    assert rows["text.png"][0] == "refused: not_an_image"
    assert rows["mean"][1:4] == rows["good.png"][1:4]
    message = refusal(run(folder / "text.png"))
    assert re.search(
        r"at least one picture must be usable, got .*text.png: not_an_image; name other", message
    )


def test_sizes_that_f_does_not_divide_are_refused_with_both_cures(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    folder = save(tmp_path / "odd", odd=cat(0, 64).crop((0, 0, 61, 46)))
    message = refusal(run(folder))
    assert re.search(
        r"the height of .*odd.png \(46\) must be divisible by 4 .*--crop .*; use 44 or 48", message
    )
    assert rows_of(run(folder, "--crop")[1])["odd.png"][0] == "60x44"
    assert rows_of(run(folder, "--size", "32")[1])["odd.png"][0] == "32x32"
    assert "refused: too_small" in run(folder, save(tmp_path / "more", large=cat(0, 64)), "--size", "48")[1]
    assert re.search(r"--size \(34\) must be divisible by 4", refusal(run(folder, "--size", "34")))
    assert "leave one out" in refusal(run(folder, "--size", "32", "--crop"))


def test_what_cannot_be_done_is_one_message(
    run: Callable[..., tuple[int, str, str]], cli: Cli, tmp_path: Path
) -> None:
    folder = save(tmp_path / "cats", a=cat())
    small = save(tmp_path / "small", tiny=cat().crop((0, 0, 12, 32)))
    assert re.search(r"at least 16 px on a side for LPIPS, .*tiny.png has 12x32", refusal(run(small)))
    assert "does not exist" in refusal(run(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "holds none" in refusal(run(tmp_path / "empty"))
    assert re.search(r"smallest, needs .* GiB .*give at least", refusal(run(folder, "--memory", "1e-6")))
    unknown = ["reconstruct", str(folder), "--model", "nobody", "--store", str(tmp_path / "store")]
    assert "no model 'nobody'" in refusal(cli(*unknown))
    assert "must be a file in a folder" in refusal(cli(*unknown, "--output", str(tmp_path / "no" / "o.png")))
