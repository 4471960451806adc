import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from ldm.bridge.compvis import first_stage_config, published_config, read_first_stage
from ldm.bridge.section import Section
from ldm.errors import CheckpointError
from ldm.first_stage_config import FirstStageModel
from ldm.layout import first_stage_layout

SMALL = {"channels": 32, "channel_mult": (1, 1, 1), "num_res_blocks": 1, "z_channels": 4}
VQ = FirstStageModel(kind="vq", num_codes=16, **SMALL)
KL = FirstStageModel(kind="kl", **SMALL)


def translated(raw: dict[str, Any]) -> FirstStageModel:
    return first_stage_config(Section("config.yaml", "", raw).section("model"))


def changed(config: FirstStageModel, place: str, value: object) -> dict[str, Any]:
    """The published form of a config with one value changed; `place` is dotted, below `model`."""
    raw = copy.deepcopy(published_config(config))
    *path, last = place.split(".")
    section = raw["model"]
    for key in path:
        section = section[key]
    section[last] = value
    return raw


def written(
    folder: Path, tensors: dict[str, Tensor], config: FirstStageModel, **facts: object
) -> tuple[Path, Path]:
    """A published pair of files."""
    (folder / "config.yaml").write_text(yaml.safe_dump(published_config(config)))
    torch.save({"state_dict": tensors, **facts}, folder / "model.ckpt")
    return folder / "config.yaml", folder / "model.ckpt"


def zeros(config: FirstStageModel) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in first_stage_layout(config).items()}


@pytest.mark.parametrize(
    ("resolution", "named", "factors"),
    [(256, [], ()), (256, [64], (4,)), (32, [16, 8], (2, 4)), (256, [256, 16], (1,)), (64, [256], ())],
)
def test_attention_is_named_by_resolution_there_and_by_factor_here(
    resolution: int, named: list[int], factors: tuple[int, ...]
) -> None:
    raw = changed(KL, "params.ddconfig.attn_resolutions", named)
    raw["model"]["params"]["ddconfig"]["resolution"] = resolution
    assert translated(raw).attention_factors == factors


def test_attention_of_type_none_is_none_in_the_middle_and_in_levels() -> None:
    raw = changed(KL, "params.ddconfig.attn_type", "none")
    raw["model"]["params"]["ddconfig"]["attn_resolutions"] = [64]
    config = translated(raw)
    assert (config.mid_attention, config.attention_factors) == (False, ())


@pytest.mark.parametrize("name", ["VQModel", "VQModelInterface"])
def test_both_classes_of_a_vq_model_are_one_network(name: str) -> None:
    assert translated(changed(VQ, "target", f"ldm.models.autoencoder.{name}")) == VQ


def test_the_identity_is_read_from_its_class_alone() -> None:
    raw = {"model": {"target": "ldm.models.autoencoder.IdentityFirstStage"}}
    assert translated(raw) == FirstStageModel(kind="identity")


def test_settings_that_the_published_code_has_by_default_may_be_left_out() -> None:
    raw = published_config(KL)
    for key in ("attn_type", "double_z", "dropout"):
        del raw["model"]["params"]["ddconfig"][key]
    assert translated(raw) == KL


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            "target",
            "os.system",
            r"target must name a first stage, got 'os.system'; known are .*AutoencoderKL",
        ),
        ("target", 3, r"config.yaml, model.target must be of type str, got 3"),
        ("params", None, r"model.params must be a mapping, got None"),
        ("params.nope", 1, r"unknown in model.params: nope; known are .*ddconfig"),
        ("params.remap", "x.npy", r"model.params.remap must be None, got 'x.npy'"),
        ("params.embed_dim", "3", r"model.params.embed_dim must be of type int, got '3'"),
        ("params.embed_dim", True, r"embed_dim must be of type int, got True"),
        ("params.embed_dim", 0, r"config.yaml must describe .*embed_dim: .*greater than or equal to 1"),
        ("params.ddconfig.ch_mults", [1], r"unknown in model.params.ddconfig: ch_mults; known are .*ch_mult"),
        ("params.ddconfig.ch_mult", 4, r"ddconfig.ch_mult must be a list, got 4"),
        ("params.ddconfig.ch_mult", [1, "2"], r"ddconfig.ch_mult\[1\] must be of type int, got '2'"),
        ("params.ddconfig.ch_mult", [], r"channel_mult: .*at least 1 item"),
        ("params.ddconfig.ch_mult", [1, 0], r"channel_mult.1: .*greater than or equal to 1"),
        ("params.ddconfig.ch", 30, r"must be divisible by norm_groups \(32\)"),
        ("params.ddconfig.in_channels", 4, r"ddconfig.in_channels must be 3, got 4"),
        ("params.ddconfig.tanh_out", True, r"ddconfig.tanh_out must be False, got True"),
        ("params.ddconfig.double_z", False, r"ddconfig.double_z must be True, got False"),
        ("params.ddconfig.attn_type", "linear", r"attn_type must be 'vanilla' or 'none', got 'linear'"),
        ("params.ddconfig.resolution", 30, r"resolution \(30\) must be divisible by f \(4\)"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(place: str, value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        translated(changed(KL, place, value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", r"config.yaml must be a readable YAML"),
        ("- 1", r"config.yaml, model must be a mapping, got None"),
        ("model: !!python/object/apply:os.system ['true']", r"must be a readable YAML \(could not determine"),
    ],
)
def test_a_file_that_is_no_published_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_first_stage(tmp_path / "config.yaml", tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_groups": 8}, r"32 groups in every GroupNorm, .* norm_groups 8; export it with --format diff"),
        (
            {"attention_factors": (2,), "mid_attention": False},
            r"attention_factors \[2\] and mid_attention false",
        ),
        ({"kind": "identity", "channel_mult": (1,)}, r"must have weights, and kind identity has none"),
    ],
)
def test_what_the_published_code_has_not_is_not_exported(changes: dict[str, Any], message: str) -> None:
    config = FirstStageModel.model_validate(KL.model_dump() | changes)
    with pytest.raises(CheckpointError, match=message):
        published_config(config)


def test_leftover_training_state_is_kept_apart(tmp_path: Path) -> None:
    tensors = zeros(VQ) | {"loss.discriminator.main.3.num_batches_tracked": torch.tensor(7)}
    model = read_first_stage(*written(tmp_path, tensors, VQ, global_step=5))
    assert model.config == VQ
    assert model.weights.keys() == zeros(VQ).keys()
    assert {name: int(t) for name, t in model.training_state.items()} == {
        "loss.discriminator.main.3.num_batches_tracked": 7
    }
    assert model.origin.facts == {"global_step": 5}


def test_a_checkpoint_of_another_f_is_refused_in_words(tmp_path: Path) -> None:
    other = KL.model_copy(update={"channel_mult": (1, 1, 1, 1)})
    with pytest.raises(CheckpointError, match=r"model.ckpt has f 8, the config 4; give the config published"):
        read_first_stage(*written(tmp_path, zeros(other), KL))


def test_a_checkpoint_of_another_codebook_is_refused_in_words(tmp_path: Path) -> None:
    other = VQ.model_copy(update={"num_codes": 24})
    with pytest.raises(CheckpointError, match=r"model.ckpt has codebook size 24, the config 16"):
        read_first_stage(*written(tmp_path, zeros(other), VQ))


def test_keys_that_do_not_fit_are_listed_with_their_shapes(tmp_path: Path) -> None:
    tensors = zeros(KL) | {"model_ema.decay": torch.zeros(()), "quant_conv.bias": torch.zeros(3)}
    tensors["decoder.conv_in.bias"] = tensors.pop("encoder.conv_in.bias").long()
    with pytest.raises(CheckpointError) as refused:
        read_first_stage(*written(tmp_path, tensors, KL))
    said = str(refused.value)
    assert "missing: encoder.conv_in.bias (32,);" in said
    assert "unexpected: model_ema.decay ();" in said
    assert "misshapen: quant_conv.bias (3,) instead of (6,);" in said
    assert "not floating: decoder.conv_in.bias torch.int64;" in said


def test_many_keys_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in zeros(KL).items() if not name.startswith("decoder.")}
    missing = len(zeros(KL)) - len(tensors)
    with pytest.raises(
        CheckpointError, match=rf"missing: (\S+ \([\d, ]*\),? ){{10}}and {missing - 10} more; "
    ):
        read_first_stage(*written(tmp_path, tensors, KL))


def test_a_kl_checkpoint_under_a_vq_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing: quantize.embedding.weight \(16, 3\)"):
        read_first_stage(*written(tmp_path, zeros(KL), VQ))


def test_messages_name_the_file_and_not_its_folder() -> None:
    with pytest.raises(CheckpointError) as refused:
        translated(changed(KL, "params.embed_dim", None))
    assert re.match(r"config.yaml, model.params.embed_dim must be", str(refused.value))
