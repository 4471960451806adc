import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ldm
from ldm.errors import CheckpointError, ContractError
from ldm.first_stage_config import FirstStageModel
from ldm.layout import first_stage_layout
from ldm.model import WEIGHTS, Autoencoder
from ldm.model_folder import (
    CARD,
    TRAINING_STATE,
    Origin,
    StoredModel,
    appearing_whole,
    autoencoder_of,
    read_model_folder,
    write_model_folder,
)
from ldm.models.first_stage import VQModel

CONFIG = FirstStageModel(
    kind="vq", channels=8, norm_groups=4, channel_mult=(1, 2), num_res_blocks=1, num_codes=16
)
ORIGIN = Origin(format="compvis", file="model.ckpt", sha256="0" * 64, facts={"global_step": 3, "who": "we"})


def some_model(**more: torch.Tensor) -> StoredModel:
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) for name, shape in first_stage_layout(CONFIG).items()
    }
    return StoredModel(CONFIG, weights, ORIGIN, dict(more))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    model = some_model(**{"loss.logvar": torch.tensor(2, dtype=torch.int64)})
    write_model_folder(tmp_path / "model", model)
    back = read_model_folder(tmp_path / "model")
    assert (back.config, back.origin) == (CONFIG, ORIGIN)
    assert all(torch.equal(back.weights[name], tensor) for name, tensor in model.weights.items())
    assert back.training_state["loss.logvar"].dtype == torch.int64
    assert names(tmp_path / "model") == [CARD, TRAINING_STATE, WEIGHTS]
    assert names(tmp_path) == ["model"]


def test_load_gives_an_autoencoder_that_checks_what_it_is_given(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "model", some_model())
    state = torch.get_rng_state()
    autoencoder = ldm.load(str(tmp_path / "model"))
    assert isinstance(autoencoder, Autoencoder)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(autoencoder.first_stage, VQModel)
    assert not autoencoder.first_stage.training
    x = torch.zeros(1, 3, 8, 8)
    assert torch.equal(autoencoder.encode(x), autoencoder_of(some_model()).encode(x))
    with pytest.raises(ContractError, match="divisible by 2"):
        autoencoder.encode(torch.zeros(1, 3, 7, 8))


def test_half_precision_stays_in_the_folder_and_computes_in_full(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in some_model().weights.items()}
    write_model_folder(tmp_path / "model", StoredModel(CONFIG, half, ORIGIN))
    assert read_model_folder(tmp_path / "model").weights["quant_conv.bias"].dtype == torch.float16
    assert ldm.load(tmp_path / "model").encode(torch.zeros(1, 3, 8, 8)).dtype == torch.float32


def test_two_names_for_one_tensor_are_written_as_two(tmp_path: Path) -> None:
    model = some_model()
    weights = dict(model.weights)
    weights["encoder.norm_out.bias"] = weights["encoder.norm_out.weight"]
    write_model_folder(tmp_path / "model", StoredModel(CONFIG, weights, ORIGIN))
    back = read_model_folder(tmp_path / "model").weights
    assert torch.equal(back["encoder.norm_out.bias"], back["encoder.norm_out.weight"])


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing is overwritten, and .* exists; name another folder"):
        write_model_folder(tmp_path, some_model())
    assert names(tmp_path) == []


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def cut_off() -> None:
        with appearing_whole(tmp_path / "model") as temporary:
            (temporary / "half").write_bytes(b"1")
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        cut_off()
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"must be a place that can be written .* name another with"):
        write_model_folder(tmp_path / "file" / "model", some_model())


def test_weights_of_another_config_are_not_written(tmp_path: Path) -> None:
    other = CONFIG.model_copy(update={"num_codes": 8})
    with pytest.raises(CheckpointError, match=r"quantize.embedding.weight \(16, 3\) instead of \(8, 3\)"):
        write_model_folder(tmp_path / "model", StoredModel(other, some_model().weights, ORIGIN))
    assert names(tmp_path) == []


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def edit(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        raw = json.loads((folder / CARD).read_text())
        (folder / CARD).write_text(json.dumps(raw | changes))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, r"weights.safetensors must have the sha256 of model.json, .*; it has "),
        (
            lambda folder: (folder / WEIGHTS).unlink(),
            r"model.json names .*weights.safetensors, which must be",
        ),
        (lambda folder: (folder / CARD).unlink(), r"a model folder must hold a readable model.json"),
        (lambda folder: (folder / CARD).write_text("{"), r"model.json must be what this version"),
        (edit(format=2), r"model.json must be what .* writes; .*format: Input should be 1"),
        (edit(kind="video"), r"expected tags: 'first_stage', 'latent_diffusion'"),
        (edit(files={"../../weights.safetensors": "0"}), r"files.*should be 'weights.safetensors', "),
        (edit(files={}), r"weights.safetensors must hold exactly .* missing: "),
        (edit(nope=1), r"nope: Extra inputs"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write_model_folder(tmp_path / "model", some_model())
    damage(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message):
        ldm.load(tmp_path / "model")
