"""First stages in the layout of the library diffusers: `AutoencoderKL` and `VQModel`, both ways.

A folder holds `config.json` and `diffusion_pytorch_model.safetensors`. Attention is made of linear layers
there, so its weights are (out, in) where ours are 1x1 convolutions, (out, in, 1, 1); levels of the decoder
are counted from the lowest resolution, ours from the highest. The library itself is not imported.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ldm.bridge.foreign import read_checkpoint
from ldm.bridge.section import Section, first_stage_model
from ldm.errors import CheckpointError
from ldm.first_stage_config import FirstStageModel
from ldm.layout import Layout, first_stage_layout, require_layout
from ldm.model_folder import Origin, StoredModel, dense

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASSES = {"AutoencoderKL": "kl", "VQModel": "vq"}
SCALING = "scaling_factor"
"""What a pipeline multiplies latents with; ours are unscaled, so it is kept as a fact of the origin."""
UNSCALED = 1.0
NORM_GROUPS = 32
SAMPLE_SIZE = 256
"""Nominal side of pictures in a config we write; the library uses it for tiling alone."""
BLOCKS = {
    "down": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}
"""Class of a level without attention and with it."""

# Settings that our first stages have in this one form; absent, they have it in the library too.
FIXED = {"act_fn": "silu", "in_channels": 3, "out_channels": 3}
FIXED_OF_KIND = {
    "kl": {
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    },
    "vq": {"norm_type": "group", "lookup_from_codebook": False},
}
# Settings that change nothing in float32.
WITHOUT_EFFECT = {"force_upcast", "sample_size"}
TRANSLATED = {
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "latent_channels",
    "mid_block_add_attention",
    "norm_num_groups",
    SCALING,
}
OF_KIND = {"kl": set[str](), "vq": {"num_vq_embeddings", "vq_embed_dim"}}

# Our names -> theirs, applied in this order, after the decoder's levels were counted from the other end.
RENAMED = [
    (r"\.(down|up)\.(\d+)\.block\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.(down|up)\.(\d+)\.attn\.(\d+)\.", r".\1_blocks.\2.attentions.\3."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.(q|k|v)\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
]
# Names of attention before diffusers 0.18 -> those of today.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_NAME = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=\.(?:weight|bias)$)")


def read_first_stage(folder: Path) -> StoredModel:
    """The first stage of a diffusers folder.

    Raises:
        CheckpointError: a file is missing or damaged, the config has what our first stages have not, or the
            weights are not those of the config.
    """
    section = read_config(folder / CONFIG)
    config = first_stage_config(section)
    found = read_checkpoint(folder / WEIGHTS)
    tensors = {OLD_NAME.sub(lambda old: OLD_ATTENTION[old[0]], name): t for name, t in found.tensors.items()}
    ours = first_stage_layout(config)
    theirs = diffusers_names(ours)
    require_layout(tensors, diffusers_layout(ours), what=str(folder / WEIGHTS))
    weights = {name: tensors[theirs[name]].reshape(shape) for name, shape in ours.items()}
    facts = {SCALING: section.value(SCALING, float, 0.18215)}
    origin = Origin(format="diffusers", file=WEIGHTS, sha256=found.sha256, facts=facts)
    return StoredModel(config, weights, origin)


def read_config(path: Path) -> Section:
    """A `config.json` without the keys that the library keeps for itself, except the name of the class.

    Raises:
        CheckpointError: the file cannot be read, or holds no mapping.
    """
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be a readable JSON ({error}); copy the folder again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a mapping of settings, got {type(raw).__name__}")
    return Section(
        str(path), "", {key: value for key, value in raw.items() if key == "_class_name" or key[0:1] != "_"}
    )


def first_stage_config(section: Section) -> FirstStageModel:
    """Our config of a diffusers config; absent settings have the library's defaults.

    Raises:
        CheckpointError: an unknown class or setting, or a value that our first stages do not have.
    """
    name = section.value("_class_name", str)
    if name not in CLASSES:
        raise CheckpointError(
            f"{section.place('_class_name')} must name a first stage, got {name!r}; known are "
            f"{', '.join(CLASSES)}"
        )
    kind = CLASSES[name]
    fixed = FIXED | FIXED_OF_KIND[kind]
    section.require_known({"_class_name", *TRANSLATED, *OF_KIND[kind], *WITHOUT_EFFECT, *fixed})
    section.require_equal(fixed)
    widths = section.many("block_out_channels", int, (64,))
    if not widths or min(widths) < 1 or any(width % widths[0] for width in widths):
        raise CheckpointError(
            f"{section.place('block_out_channels')} must be multiples of the first of them, got "
            f"{list(widths)}; our first stages have no other widths"
        )
    channels = section.value("latent_channels", int, 4 if kind == "kl" else 3)
    embed = channels if section.values.get("vq_embed_dim") is None else section.value("vq_embed_dim", int)
    return first_stage_model(
        section.source,
        kind=kind,
        channels=widths[0],
        channel_mult=[width // widths[0] for width in widths],
        num_res_blocks=section.value("layers_per_block", int, 1),
        attention_factors=attention_factors(section, len(widths)),
        mid_attention=section.value("mid_block_add_attention", bool, True),
        z_channels=channels,
        embed_dim=embed,
        num_codes=section.value("num_vq_embeddings", int, 256) if kind == "vq" else None,
        norm_groups=section.value("norm_num_groups", int, NORM_GROUPS),
    )


def attention_factors(section: Section, num_levels: int) -> tuple[int, ...]:
    """Downsampling factors of the levels whose blocks are of the class with attention.

    Raises:
        CheckpointError: a class of block is unknown, or encoder and decoder differ.
    """
    has_attention = {}
    for side, (plain, attentive) in BLOCKS.items():
        key = f"{side}_block_types"
        types = section.many(key, str, (plain,))
        if len(types) != num_levels or not set(types) <= {plain, attentive}:
            raise CheckpointError(
                f"{section.place(key)} must be {num_levels} of {plain} and {attentive}, one per level, "
                f"got {list(types)}; our first stages have no other levels"
            )
        has_attention[side] = [block == attentive for block in types]
    if has_attention["down"] != has_attention["up"][::-1]:
        raise CheckpointError(
            f"{section.place('up_block_types')} must have attention at the resolutions of down_block_types, "
            f"got {list(section.values['up_block_types'])}; our decoders mirror their encoders"
        )
    return tuple(2**level for level, attends in enumerate(has_attention["down"]) if attends)


def diffusers_names(layout: Layout) -> dict[str, str]:
    """Our names -> the library's."""
    last = max((int(m[1]) for name in layout if (m := re.match(r"decoder\.up\.(\d+)\.", name))), default=0)
    return {name: diffusers_name(name, last_level=last) for name in layout}


def diffusers_name(name: str, *, last_level: int) -> str:
    """The library's name of one of our tensors; `last_level` is the number of the lowest resolution."""
    name = re.sub(r"(?<=\.up\.)\d+", lambda level: str(last_level - int(level[0])), name)
    for ours, theirs in RENAMED:
        name = re.sub(ours, theirs, name)
    return name


def diffusers_layout(layout: Layout) -> Layout:
    """Names and shapes in the library of the tensors of one of our first stages."""
    return {
        theirs: layout[ours][:2] if re.search(r"\.attentions\.\d+\.to_", theirs) else layout[ours]
        for ours, theirs in diffusers_names(layout).items()
    }


def write_first_stage(model: StoredModel, folder: Path) -> None:
    """Write `config.json` and the weights into a folder; the scaling factor is that of the origin, or 1.

    Raises:
        CheckpointError: the library has no such first stage.
    """
    scaling = float(model.origin.facts.get(SCALING, UNSCALED))
    config = diffusers_config(model.config, scaling=scaling)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_file(to_diffusers(model.weights), folder / WEIGHTS, metadata={"format": "pt"})


def to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the library's names and in its shapes."""
    layout = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    names, shapes = diffusers_names(layout), diffusers_layout(layout)
    return dense({names[name]: tensor.reshape(shapes[names[name]]) for name, tensor in weights.items()})


def diffusers_config(config: FirstStageModel, *, scaling: float) -> dict[str, Any]:
    """The library's form of a first stage's config, every setting written out.

    What training alone uses is left out: `dropout`, and `beta`, which is fixed there.

    Raises:
        CheckpointError: the library has no such first stage; the message names the setting.
    """
    if config.kind == "identity":
        raise CheckpointError("an exported first stage must have weights, and kind identity has none")
    if config.channel_mult[0] != 1:
        raise CheckpointError(
            "diffusers has the width of the first level right behind the picture, so channel_mult must begin "
            f"with 1, and this model has channel_mult {list(config.channel_mult)}; export it with "
            "--format compvis"
        )
    if config.kind == "kl" and config.embed_dim != config.z_channels:
        raise CheckpointError(
            "a KL model of diffusers has one number of latent channels, so embed_dim must equal z_channels, "
            f"and this model has {config.embed_dim} and {config.z_channels}; export it with --format compvis"
        )
    attends = [2**level in config.attention_factors for level in range(len(config.channel_mult))]
    of_kind = {
        "kl": {"force_upcast": True},
        "vq": {
            "force_upcast": False,
            "num_vq_embeddings": config.num_codes,
            "vq_embed_dim": config.embed_dim,
        },
    }
    return {
        "_class_name": next(name for name, kind in CLASSES.items() if kind == config.kind),
        "block_out_channels": [config.channels * mult for mult in config.channel_mult],
        "down_block_types": [BLOCKS["down"][a] for a in attends],
        "up_block_types": [BLOCKS["up"][a] for a in reversed(attends)],
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.z_channels,
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": config.norm_groups,
        "sample_size": SAMPLE_SIZE,
        SCALING: scaling,
        **FIXED,
        **FIXED_OF_KIND[config.kind],
        **of_kind[config.kind],
    }
