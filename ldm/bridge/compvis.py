"""First stages in the layout of CompVis/latent-diffusion: a YAML that names classes, a `.ckpt` of their keys.

The names of a first stage's parameters are ours already (`ldm.models.autoencoder`). A checkpoint of one that
was trained alone also holds its loss under `loss.*`: LPIPS, the discriminator and, for KL, one scalar.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ldm.bridge.foreign import read_checkpoint
from ldm.bridge.section import Section, first_stage_model
from ldm.errors import CheckpointError
from ldm.first_stage_config import FirstStageModel
from ldm.layout import first_stage_layout, require_layout
from ldm.model_folder import Origin, StoredModel, dense
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.lpips import LEVELS, LPIPS

CONFIG = "config.yaml"
CHECKPOINT = "model.ckpt"
KINDS = {
    "ldm.models.autoencoder.AutoencoderKL": "kl",
    "ldm.models.autoencoder.VQModel": "vq",
    "ldm.models.autoencoder.VQModelInterface": "vq",  # the same network; its `encode` does not quantise
    "ldm.models.autoencoder.IdentityFirstStage": "identity",
}
"""Class named by a published config -> our kind. The names are compared, never imported."""
OF_TRAINING = {
    "ckpt_path",
    "ignore_keys",
    "image_key",
    "lossconfig",
    "monitor",
    "batch_resize_range",
    "lr_g_factor",
    "sane_index_shape",
    "scheduler_config",
}
"""Parameters that say nothing about the network."""
FIXED_PARAMETERS = {"colorize_nlabels": None, "remap": None, "use_ema": False}
FIXED_NETWORK = {
    "in_channels": 3,
    "out_ch": 3,
    "resamp_with_conv": True,
    "use_linear_attn": False,
    "give_pre_end": False,
    "tanh_out": False,
}
"""Settings of the published network whose other values our first stages do not have."""
NETWORK = {
    "attn_resolutions",
    "attn_type",
    "ch",
    "ch_mult",
    "double_z",
    "dropout",
    "num_res_blocks",
    "resolution",
    "z_channels",
}
NORM_GROUPS = 32
"""Groups of every GroupNorm, fixed in the published code."""
RESOLUTION = 256
"""Side in pixels of the pictures in a config we write: attention is named by its resolution there."""
BASE_LR = 4.5e-6
LOSS = "loss."
LEVEL = re.compile(r"encoder\.down\.(\d+)\.")
CODEBOOK = "quantize.embedding.weight"


def read_first_stage(config: Path, checkpoint: Path) -> StoredModel:
    """The first stage of a published config and checkpoint, its leftover training state apart.

    Raises:
        CheckpointError: one of the files cannot be read, or they do not fit each other.
    """
    translated = first_stage_config(read_model_section(config))
    found = read_checkpoint(checkpoint)
    training_state = {name: tensor for name, tensor in found.tensors.items() if name.startswith(LOSS)}
    weights = {name: tensor for name, tensor in found.tensors.items() if name not in training_state}
    require_same_shape(weights, translated, what=checkpoint.name)
    require_layout(weights, first_stage_layout(translated), what=checkpoint.name)
    origin = Origin(format="compvis", file=checkpoint.name, sha256=found.sha256, facts=found.facts)
    return StoredModel(translated, weights, origin, training_state)


def read_model_section(path: Path) -> Section:
    """The `model` section of a published YAML; what else there is (data, lightning) is of no use here.

    Raises:
        CheckpointError: the file cannot be read, or has no such section.
    """
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} must be a readable YAML ({said}); give the config published with the weights"
        ) from error
    return Section(path.name, "", raw if isinstance(raw, Mapping) else {}).section("model")


def first_stage_config(section: Section) -> FirstStageModel:
    """Our config of a section {target, params}, wherever it stands.

    Raises:
        CheckpointError: an unknown class or setting, or a value that our first stages do not have.
    """
    target = section.value("target", str)
    if target not in KINDS:
        raise CheckpointError(
            f"{section.place('target')} must name a first stage, got {target!r}; known are {', '.join(KINDS)}"
        )
    kind = KINDS[target]
    if kind == "identity":
        return FirstStageModel(kind="identity")
    parameters = section.section("params")
    of_kind = {"n_embed"} if kind == "vq" else set()
    parameters.require_known({"embed_dim", "ddconfig", *of_kind, *OF_TRAINING, *FIXED_PARAMETERS})
    parameters.require_equal(FIXED_PARAMETERS)
    network = parameters.section("ddconfig")
    network.require_known({*NETWORK, *FIXED_NETWORK})
    network.require_equal(FIXED_NETWORK | {"double_z": kind == "kl"})
    mult = network.many("ch_mult", int, (1, 2, 4, 8))
    attention = network.value("attn_type", str, "vanilla")
    if attention not in ("vanilla", "none"):
        raise CheckpointError(
            f"{network.place('attn_type')} must be 'vanilla' or 'none', got {attention!r}; "
            "our first stages have no other attention"
        )
    return first_stage_model(
        section.source,
        kind=kind,
        channels=network.value("ch", int),
        channel_mult=mult,
        num_res_blocks=network.value("num_res_blocks", int),
        attention_factors=attention_factors(network, len(mult)) if attention == "vanilla" else (),
        mid_attention=attention == "vanilla",
        z_channels=network.value("z_channels", int),
        embed_dim=parameters.value("embed_dim", int),
        num_codes=parameters.value("n_embed", int) if kind == "vq" else None,
        norm_groups=NORM_GROUPS,
        dropout=network.value("dropout", float, 0.0),
    )


def attention_factors(network: Section, num_levels: int) -> tuple[int, ...]:
    """Downsampling factors with attention; a published config names resolutions, also ones that never occur.

    Raises:
        CheckpointError: the resolution does not divide by f.
    """
    resolution, named = network.value("resolution", int), network.many("attn_resolutions", int)
    factors = [2**level for level in range(num_levels)]
    if resolution < 1 or any(resolution % factor for factor in factors):
        raise CheckpointError(
            f"{network.place('resolution')} ({resolution}) must be divisible by f "
            f"({max(factors, default=1)}), so that attn_resolutions mean the same in encoder and decoder"
        )
    return tuple(factor for factor in factors if resolution // factor in named)


def require_same_shape(weights: Mapping[str, Tensor], config: FirstStageModel, *, what: str) -> None:
    """Refuse a checkpoint of another f or codebook than its config, in words that say so.

    Raises:
        CheckpointError: one of them differs.
    """
    levels = {match[1] for name in weights if (match := LEVEL.match(name))}
    found = {"f": 2 ** (len(levels) - 1) if levels else config.factor}
    wanted = {"f": config.factor}
    if config.kind == "vq" and CODEBOOK in weights:
        found["codebook size"], wanted["codebook size"] = weights[CODEBOOK].shape[0], config.num_codes or 0
    different = [
        f"{name} {found[name]}, the config {wanted[name]}" for name in wanted if found[name] != wanted[name]
    ]
    if different:
        raise CheckpointError(
            f"a checkpoint must be of the same first stage as its config, but {what} has "
            f"{' and '.join(different)}; give the config published with it"
        )


def write_first_stage(model: StoredModel, folder: Path) -> None:
    """Write `config.yaml` and `model.ckpt` into a folder, training state and facts of an import included.

    Raises:
        CheckpointError: the published code has no such first stage.
    """
    (folder / CONFIG).write_text(yaml.safe_dump(published_config(model.config), sort_keys=False), "utf-8")
    state = dense({**model.weights, **model.training_state})
    facts = model.origin.facts if model.origin.format == "compvis" else {}
    torch.save({"state_dict": state, **facts}, folder / CHECKPOINT)


def published_config(config: FirstStageModel) -> dict[str, Any]:
    """The published form of a first stage's config; `beta`, of use in training alone, is fixed there.

    Raises:
        CheckpointError: the published code has no such first stage; the message names the setting.
    """
    levels_with_attention = [
        2**i for i in range(len(config.channel_mult)) if 2**i in config.attention_factors
    ]
    if config.kind == "identity":
        raise CheckpointError("an exported first stage must have weights, and kind identity has none")
    if config.norm_groups != NORM_GROUPS:
        raise CheckpointError(
            f"the published code has {NORM_GROUPS} groups in every GroupNorm, and this model has norm_groups "
            f"{config.norm_groups}; export it with --format diffusers"
        )
    if levels_with_attention and not config.mid_attention:
        raise CheckpointError(
            "the published code has attention in levels only where it has it in the middle too, and this "
            f"model has attention_factors {levels_with_attention} and mid_attention false; export it with "
            "--format diffusers"
        )
    resolution = max(RESOLUTION, config.factor)
    network = {
        "attn_type": "vanilla" if config.mid_attention else "none",
        "double_z": config.kind == "kl",
        "z_channels": config.z_channels,
        "resolution": resolution,
        "in_channels": 3,
        "out_ch": 3,
        "ch": config.channels,
        "ch_mult": list(config.channel_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [resolution // factor for factor in levels_with_attention],
        "dropout": config.dropout,
    }
    parameters = {"embed_dim": config.embed_dim} | (
        {"n_embed": config.num_codes} if config.kind == "vq" else {}
    )
    return {
        "model": {
            "base_learning_rate": BASE_LR,
            "target": next(target for target, kind in KINDS.items() if kind == config.kind),
            "params": parameters | {"ddconfig": network, "lossconfig": {"target": "torch.nn.Identity"}},
        }
    }


def published_loss(lpips: LPIPS, discriminator: PatchDiscriminator, *, kind: str) -> dict[str, Tensor]:
    """The training state of a first stage under its published names, `loss.*`.

    The published KL loss has one more parameter, the logarithm of a variance, that no optimiser moves from 0.
    """
    state = {"logvar": torch.zeros(())} if kind == "kl" else {}
    state |= {f"perceptual_loss.scaling_layer.{name}": getattr(lpips, name) for name in ("shift", "scale")}
    for i, (level, head) in enumerate(zip(lpips.levels, lpips.heads, strict=True)):
        convolutions = [layer for layer in level.children() if isinstance(layer, nn.Conv2d)]
        for position, convolution in zip(LEVELS[i], convolutions, strict=True):
            for name, tensor in convolution.state_dict().items():
                state[f"perceptual_loss.net.slice{i + 1}.{position}.{name}"] = tensor
        state[f"perceptual_loss.lin{i}.model.1.weight"] = head.data
    state |= {f"discriminator.{name}": tensor for name, tensor in discriminator.state_dict().items()}
    return {f"{LOSS}{name}": tensor for name, tensor in state.items()}
