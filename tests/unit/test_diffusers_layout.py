import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.bridge.diffusers import (
    CONFIG,
    WEIGHTS,
    diffusers_config,
    diffusers_layout,
    first_stage_config,
    read_first_stage,
    write_first_stage,
)
from ldm.bridge.section import Section
from ldm.errors import CheckpointError
from ldm.first_stage_config import FirstStageModel
from ldm.layout import first_stage_layout
from ldm.model_folder import Origin, StoredModel

SMALL = {"channels": 8, "norm_groups": 4, "channel_mult": (1, 2, 4), "num_res_blocks": 1}
KL = FirstStageModel.model_validate(SMALL | {"kind": "kl", "attention_factors": (4,)})
VQ = FirstStageModel.model_validate(
    SMALL | {"kind": "vq", "num_codes": 16, "z_channels": 5, "mid_attention": False}
)
ORIGIN = Origin(format="artifact", file="0" * 64, sha256="0" * 64)


def translated(raw: dict[str, Any]) -> FirstStageModel:
    return first_stage_config(Section("config.json", "", raw))


def model_of(config: FirstStageModel, **facts: float) -> StoredModel:
    weights = {name: torch.rand(shape) for name, shape in first_stage_layout(config).items()}
    return StoredModel(config, weights, ORIGIN.model_copy(update={"facts": facts}))


@pytest.mark.parametrize("config", [KL, VQ])
def test_a_config_comes_back_from_its_diffusers_form(config: FirstStageModel) -> None:
    written = json.loads(json.dumps(diffusers_config(config, scaling=1.0)))
    assert translated(written) == config


def test_names_are_those_of_the_library() -> None:
    layout = diffusers_layout(first_stage_layout(KL))
    for name, shape in {
        "encoder.down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3),
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (16, 8, 1, 1),
        "encoder.down_blocks.0.downsamplers.0.conv.weight": (8, 8, 3, 3),
        "encoder.down_blocks.2.attentions.0.to_q.weight": (32, 32),
        "encoder.mid_block.attentions.0.to_out.0.bias": (32,),
        "encoder.mid_block.attentions.0.group_norm.weight": (32,),
        "decoder.up_blocks.0.attentions.1.to_v.weight": (32, 32),
        "decoder.up_blocks.2.resnets.1.norm2.bias": (8,),
        "decoder.up_blocks.0.upsamplers.0.conv.weight": (32, 32, 3, 3),
        "decoder.conv_norm_out.weight": (8,),
        "quant_conv.weight": (6, 6, 1, 1),
    }.items():
        assert layout[name] == shape
    assert len(layout) == len(first_stage_layout(KL))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "_class_name",
            "AutoencoderTiny",
            r"_class_name must name a first stage, got 'AutoencoderTiny'; known are AutoencoderKL, VQModel",
        ),
        ("spatial", 1, r"unknown in the file: spatial; known are .*block_out_channels"),
        ("num_vq_embeddings", 16, r"unknown in the file: num_vq_embeddings"),
        ("act_fn", "relu", r"config.json, act_fn must be 'silu', got 'relu'"),
        ("use_quant_conv", False, r"use_quant_conv must be True, got False"),
        ("shift_factor", 0.1, r"shift_factor must be None, got 0.1"),
        ("block_out_channels", [8, 12, 32], r"multiples of the first of them, got \[8, 12, 32\]"),
        ("block_out_channels", [], r"multiples of the first of them, got \[\]"),
        ("down_block_types", ["DownEncoderBlock2D"], r"down_block_types must be 3 of .*, one per level"),
        ("down_block_types", ["DownBlock2D"] * 3, r"got \['DownBlock2D', 'DownBlock2D', 'DownBlock2D'\]"),
        (
            "up_block_types",
            ["UpDecoderBlock2D"] * 3,
            r"up_block_types must have attention at the resolutions of down_block_types",
        ),
        ("layers_per_block", "2", r"layers_per_block must be of type int, got '2'"),
        ("norm_num_groups", 5, r"must be divisible by norm_groups \(5\)"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        translated(diffusers_config(KL, scaling=1.0) | {key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 6}, r"embed_dim must equal z_channels, and this model has 6 and 3; export .* compvis"),
        ({"channel_mult": (2, 4)}, r"channel_mult must begin with 1, and this model has .*\[2, 4\]"),
        ({"kind": "identity", "channel_mult": (1,)}, r"must have weights, and kind identity has none"),
    ],
)
def test_what_the_library_has_not_is_not_exported(changes: dict[str, Any], message: str) -> None:
    config = FirstStageModel.model_validate(KL.model_dump() | changes)
    with pytest.raises(CheckpointError, match=message):
        diffusers_config(config, scaling=1.0)


@pytest.mark.parametrize(("facts", "scaling"), [({}, 1.0), ({"scaling_factor": 0.18215}, 0.18215)])
def test_latents_are_unscaled_unless_the_origin_says_otherwise(
    tmp_path: Path, facts: dict[str, float], scaling: float
) -> None:
    write_first_stage(model_of(KL, **facts), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["scaling_factor"] == scaling
    assert read_first_stage(tmp_path).origin.facts == {"scaling_factor": scaling}


def test_weights_that_are_not_those_of_the_config_are_refused(tmp_path: Path) -> None:
    write_first_stage(model_of(VQ), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["quantize.embedding.weight"] = torch.zeros(24, 3)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"quantize.embedding.weight \(24, 3\) instead of \(16, 3\)"):
        read_first_stage(tmp_path)


@pytest.mark.parametrize(
    ("missing", "message"),
    [(CONFIG, r"config.json must be a readable JSON"), (WEIGHTS, r"diffusion_pytorch_model.safetensors")],
)
def test_a_folder_without_a_file_is_refused(tmp_path: Path, missing: str, message: str) -> None:
    write_first_stage(model_of(KL), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=message):
        read_first_stage(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", r"must be a readable JSON"), ("[1]", r"must hold a mapping of settings, got list")],
)
def test_a_config_that_is_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_first_stage(tmp_path)
