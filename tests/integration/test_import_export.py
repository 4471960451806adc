"""`ldm import` and `ldm export`: files of other programs become a model folder, and the other way round."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ldm
from ldm.first_stage_config import FirstStageModel
from ldm.model import Autoencoder, load_first_stage

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
VQ, KL = FIXTURES / "vq_first_stage", FIXTURES / "kl_first_stage"

Cli = Callable[..., tuple[int, str, str]]


def done(ended: tuple[int, str, str]) -> str:
    """What a run printed that ended well."""
    status, out, err = ended
    assert (status, err) == (0, "")
    return out


def refusal(ended: tuple[int, str, str]) -> str:
    """The message of a run that was refused: all of stderr."""
    status, out, err = ended
    assert (status, out) == (2, ""), err
    assert err.count("\n") == 1, err
    return err


def first_stage(folder: Path) -> FirstStageModel:
    """The config of the first stage in a folder."""
    autoencoder = ldm.load(folder)
    assert isinstance(autoencoder, Autoencoder)
    return autoencoder.config


def names(folder: Path) -> set[str]:
    """What is in a folder."""
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def imported(cli: Cli, tmp_path: Path) -> Path:
    """Model folder of the published VQ case."""
    folder = tmp_path / "models" / "vq"
    done(cli("import", str(VQ / "config.yaml"), str(VQ / "model.ckpt"), "--output", str(folder)))
    return folder


def test_an_import_says_what_it_found_and_can_be_loaded(cli: Cli, tmp_path: Path) -> None:
    arguments = [str(VQ / "config.yaml"), str(VQ / "model.ckpt"), "--output", str(tmp_path / "vq")]
    said = done(cli("import", *arguments))
    assert re.search(r"vq first stage, f = 4, c = 3, 32 codes, 1,368,670 parameters", said)
    assert re.search(r"from model.ckpt, sha256 [0-9a-f]{64}\nit says: .*global_step 1234", said)
    assert re.search(r"training state kept beside the model: 3 tensors, such as loss\.", said)
    assert first_stage(tmp_path / "vq").num_codes == 32


@pytest.mark.parametrize(
    ("format", "training_state"), [("compvis", "3 tensors written back"), ("diffusers", "is not exported")]
)
def test_an_export_reads_back_without_a_difference_and_says_so(
    cli: Cli, imported: Path, tmp_path: Path, format: str, training_state: str
) -> None:
    said = done(cli("export", str(imported), "--format", format, "--output", str(tmp_path / "out")))
    for name in ("latent", "reconstruction"):
        assert re.search(rf"read back, largest difference of the {name}: 0 \(values up to [1-9]", said)
    assert re.search(rf"training state:? {training_state}", said)
    report = json.loads((tmp_path / "out" / "parity.json").read_text("utf-8"))
    assert report["parity"]["largest_difference"] == {"latent": 0.0, "reconstruction": 0.0}
    assert {*report["files"], "parity.json"} == names(tmp_path / "out")

    again = [str(tmp_path / "out")] if format == "diffusers" else []
    again = again or [str(tmp_path / "out" / name) for name in ("config.yaml", "model.ckpt")]
    done(cli("import", *again, "--output", str(tmp_path / "again")))
    x = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ldm.load(tmp_path / "again").encode(x), ldm.load(imported).encode(x))


def test_a_trained_first_stage_is_exported_by_its_key(cli: Cli, vq_chain: Any, tmp_path: Path) -> None:
    store, manifest = vq_chain.store, vq_chain.first_stage
    arguments = ["--format", "diffusers", "--output", str(tmp_path / "out"), "--store", str(store.local_root)]
    said = done(cli("export", manifest.short, *arguments))
    assert "training state is not exported" in said
    done(cli("import", str(tmp_path / "out"), "--output", str(tmp_path / "back")))
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ldm.load(tmp_path / "back").encode(x), load_first_stage(store, manifest).encode(x))


def test_a_trained_first_stage_is_exported_by_its_registered_name(
    cli: Cli, tiny_store: Path, tmp_path: Path
) -> None:
    spec = "first-stage-cats-vq-f4@candidate"
    arguments = ["--format", "diffusers", "--output", str(tmp_path / "out"), "--store", str(tiny_store)]
    assert re.search(r"largest difference of the latent: 0 ", done(cli("export", spec, *arguments)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (f"import {VQ}/config.yaml", r"a published YAML comes with a checkpoint, got .*config.yaml alone"),
        (
            f"import {VQ}/config.yaml {KL}/model.ckpt",
            r"model.ckpt must hold exactly .* missing: encoder.down.0.block.1",
        ),
        (f"import {VQ}/config.yaml {VQ}/config.yaml", r"a checkpoint must be an undamaged zip of torch.save"),
        (f"import {VQ}/nope.yaml {VQ}/model.ckpt", r"nope.yaml must be a readable YAML"),
        (
            f"import {VQ} {VQ}/model.ckpt",
            r"a diffusers folder brings its own weights, got .*leave the latter",
        ),
        (f"import {VQ}", r"config.json must be a readable JSON"),
        (f"export {VQ} --format compvis", r"a model folder must hold a readable model.json"),
        (
            "export first-stage-x --format compvis",
            r"no model 'first-stage-x' in .*; known: none; make one w",
        ),
    ],
)
def test_what_cannot_be_transferred_is_refused_and_leaves_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(message, refusal(cli(*arguments.split(), "--output", "out")))
    assert names(tmp_path) <= {"artifacts"}


def test_nothing_is_overwritten(cli: Cli, imported: Path) -> None:
    arguments = ["import", str(KL / "config.yaml"), str(KL / "model.ckpt"), "--output", str(imported)]
    assert re.search(r"nothing is overwritten, and .* exists; name another folder", refusal(cli(*arguments)))
    assert first_stage(imported).kind == "vq"


def test_what_a_layout_cannot_express_is_named(cli: Cli, tmp_path: Path) -> None:
    kl = str(tmp_path / "kl")
    done(cli("import", str(KL / "config.yaml"), str(KL / "model.ckpt"), "--output", kl))
    said = refusal(cli("export", kl, "--format", "diffusers", "--output", str(tmp_path / "out")))
    assert re.search(r"embed_dim must equal z_channels, and this model has 6 and 8; export it with", said)
    assert names(tmp_path) == {"kl"}


CLASSES = FIXTURES / "ldm_class_crossattn"


@pytest.fixture
def diffusion_model(cli: Cli, tmp_path: Path) -> Path:
    """Model folder of the published class-conditional case."""
    folder = tmp_path / "models" / "classes"
    files = [str(CLASSES / name) for name in ("config.yaml", "model.ckpt")]
    said = done(cli("import", *files, "--output", str(folder)))
    assert re.search(r"latent diffusion model, conditioned on class_label, UNet 1,175,203 parameters", said)
    assert re.search(r"training state kept beside the model: 12 tensors, such as alphas_cumprod", said)
    return folder


def test_a_whole_model_is_imported_and_sampled_by_class(
    cli: Cli, diffusion_model: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "out.png"
    few = ["--num", "1", "--steps", "2", "--output", str(picture)]
    said = done(cli("sample", str(diffusion_model), "--classes", "3", "7", "--guidance", "2", *few))
    assert re.search(r"2\s+pictures\s+of\s+model", said)
    assert picture.read_bytes().startswith(b"\x89PNG")
    unknown = refusal(cli("sample", str(diffusion_model), "--classes", "10", *few))
    assert re.search(r"unknown class '10'; this model knows 0, 1, ", unknown)


@pytest.mark.parametrize("format", ["compvis", "diffusers"])
def test_a_whole_model_is_exported_without_a_difference(
    cli: Cli, diffusion_model: Path, tmp_path: Path, format: str
) -> None:
    said = done(cli("export", str(diffusion_model), "--format", format, "--output", str(tmp_path / "out")))
    for name in ("eps", "sample", "reconstruction"):
        assert re.search(rf"read back, largest difference of the {name}: 0 \(values up to [1-9]", said)


@pytest.mark.parametrize("format", ["compvis", "diffusers"])
@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        ("diffusion.learn_log_variance=true", "--classes 3"),
        ("conditioning={kind: caption, context_dim: 32, depth: 1}", "--prompt cat"),
        ("conditioning=null unet.context_dim=null sampling.guidance=1", ""),
    ],
    ids=["classes", "captions", "unconditional"],
)
def test_a_trained_model_is_exported_with_its_averaged_weights(
    cli: Cli,
    small_model: Callable[..., tuple[str, str]],
    tmp_path: Path,
    format: str,
    overrides: str,
    asked: str,
) -> None:
    changes = re.split(r" (?=[a-z_.]+=)", overrides)
    store, key = small_model("diffusion.objective=eps", *changes)
    out = tmp_path / "out"
    said = done(cli("export", key, "--store", store, "--format", format, "--output", str(out)))
    assert re.search(r"latent diffusion model, .* scale 1.5, vq first stage, f = 4", said)
    for name in ("eps", "sample", "latent", "reconstruction"):
        assert re.search(rf"read back, largest difference of the {name}: 0 \(values up to ", said)
    if format == "compvis":
        files = [str(out / name) for name in ("config.yaml", "model.ckpt")]
        done(cli("import", *files, "--output", str(tmp_path / "again")))
        few = ["--num", "1", "--steps", "3", "--guidance", "1", "--micro-batch", "2", *asked.split()]
        done(cli("sample", key, "--store", store, *few, "--output", str(tmp_path / "here")))
        done(cli("sample", str(tmp_path / "again"), *few, "--output", str(tmp_path / "there")))
        here, there = (Image.open(tmp_path / place / "00000.png") for place in ("here", "there"))
        assert here.tobytes() == there.tobytes()


def test_a_trained_model_is_exported_by_its_registered_name(
    cli: Cli, tiny_store: Path, tmp_path: Path
) -> None:
    arguments = ["ldm-demo@candidate", "--store", str(tiny_store), "--output", str(tmp_path / "out")]
    said = done(cli("export", *arguments, "--format", "diffusers"))
    assert re.search(r"largest difference of the sample: 0 \(values up to ", said)
    said = refusal(cli("export", *arguments[:3], "--format", "compvis", "--output", str(tmp_path / "no")))
    assert re.search(r"32 groups in every GroupNorm, .* export it with --format diffusers", said)


def test_an_imported_model_is_registered_and_found_by_its_name(cli: Cli, tmp_path: Path) -> None:
    files = [str(CLASSES / name) for name in ("config.yaml", "model.ckpt")]
    store = ["--store", str(tmp_path / "store")]
    arguments = [*files, "--output", str(tmp_path / "classes"), "--register", "cin.small", *store]
    said = done(cli("import", *arguments))
    key = re.search(r"registered as cin.small, version 1: key ([0-9a-f]{12}) in ", said)
    assert key is not None
    few = ["--classes", "3", "--num", "1", "--steps", "2"]
    made = []
    for place, model in enumerate((str(tmp_path / "classes"), "cin.small", "cin.small@candidate", key[1])):
        done(cli("sample", model, *few, *store, "--output", str(tmp_path / str(place))))
        made.append(Image.open(tmp_path / str(place) / "00000.png"))
    assert len({image.tobytes() for image in made}) == 1
    assert len({json.dumps(image.info) for image in made}) == 1
    done(cli("export", "cin.small", *store, "--format", "compvis", "--output", str(tmp_path / "back")))
    assert key[1][:8] in done(cli("list", *store))
    # the same model again is the same artifact, and the same version
    again = [*files, "--output", str(tmp_path / "again"), "--register", "cin.small", *store]
    assert re.search(rf"version 1: key {key[1]} in ", done(cli("import", *again)))
    said = refusal(cli("sample", "nope", *store))
    assert re.search(
        r"known: cin.small \(key [0-9a-f]{12}\); make one with `ldm train-ldm RECIPE` or `ldm", said
    )


def test_a_registered_first_stage_is_found_too_but_not_sampled(cli: Cli, tmp_path: Path) -> None:
    store = ["--store", str(tmp_path / "store")]
    files = [str(VQ / "config.yaml"), str(VQ / "model.ckpt"), "--output", str(tmp_path / "vq")]
    done(cli("import", *files, "--register", "published-vq", *store))
    done(cli("export", "published-vq", *store, "--format", "diffusers", "--output", str(tmp_path / "out")))
    said = refusal(cli("sample", "published-vq", *store, "--output", str(tmp_path / "x.png")))
    assert re.search(r"published-vq holds a first stage, which has no samples of its own", said)


@pytest.mark.parametrize("name", ["ldm-demo", "first-stage-x", "a/b", "a@b", "a b", ""])
def test_a_name_that_trained_models_may_have_is_refused_before_the_import(
    cli: Cli, tmp_path: Path, name: str
) -> None:
    files = [str(VQ / "config.yaml"), str(VQ / "model.ckpt"), "--output", str(tmp_path / "vq")]
    said = refusal(cli("import", *files, "--register", name, "--store", str(tmp_path / "store")))
    assert re.search(r"registered by a name of letters, digits .* choose another --register", said)
    assert names(tmp_path) == set()


def test_a_first_stage_is_not_sampled_and_has_no_heads_to_choose(
    cli: Cli, imported: Path, tmp_path: Path
) -> None:
    said = refusal(cli("sample", str(imported), "--output", str(tmp_path / "out.png")))
    assert re.search(r"holds a first stage, which has no samples of its own", said)
    files = [str(VQ / "config.yaml"), str(VQ / "model.ckpt"), "--output", str(tmp_path / "again")]
    assert re.search(
        r"--one-head is for latent diffusion models", refusal(cli("import", *files, "--one-head"))
    )
