"""UNets in the layout of the library diffusers: `UNet2DModel`, and with transformers `UNet2DConditionModel`.

C channels, d channels of a head. Self-attention has three linear layers there where ours has one convolution
that gives query, key and value head by head, (heads * 3 * d, C, 1).
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.errors import CheckpointError
from ldm.models.attention import num_heads_of
from ldm.network_config import UNetConfig

RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
# Attention alone: level without it and with it; with transformers; with BigGAN's up and down.
BLOCKS = {
    "down": ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up": ("UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
}


def diffusers_unet_config(config: UNetConfig, *, sample_size: int) -> dict[str, Any]:
    """The library's form of a UNet's config.

    Raises:
        CheckpointError: the library has no such UNet; the message names the setting.
    """
    if config.channel_mult[0] != 1:
        raise CheckpointError(
            "diffusers has the width of the time embedding from the first level, so unet.channel_mult must "
            f"begin with 1, and this model has {list(config.channel_mult)}; export it with --format compvis"
        )
    if config.resblock_updown and config.context_dim is not None:
        raise CheckpointError(
            "a UNet of diffusers has no unet.resblock_updown together with transformers (context_dim "
            f"{config.context_dim}); export it with --format compvis"
        )
    widths = [config.model_channels * mult for mult in config.channel_mult]
    attends = [2**level in config.attention_factors for level in range(len(widths))]
    common = {
        "sample_size": sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": widths,
        "layers_per_block": config.num_res_blocks,
        "down_block_types": [block_type("down", config, attentive) for attentive in attends],
        "up_block_types": [block_type("up", config, attentive) for attentive in reversed(attends)],
        "dropout": config.dropout,
        "norm_num_groups": config.norm_groups,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
        "num_class_embeds": config.num_classes,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    if config.context_dim is not None:
        return common | {
            "_class_name": "UNet2DConditionModel",
            "cross_attention_dim": config.context_dim,
            "transformer_layers_per_block": config.transformer_depth,
            # the library's name for the number of heads
            "attention_head_dim": [
                1 if config.one_head_transformers else heads_of(config, width) for width in widths
            ],
        }
    kind = "resnet" if config.resblock_updown else "conv"
    return common | {
        "_class_name": "UNet2DModel",
        "attention_head_dim": head_channels(config, widths, attends),
        "attn_norm_num_groups": config.norm_groups,  # else the middle has no norm with scale_shift
        "downsample_type": kind,
        "upsample_type": kind,
    }


def block_type(side: str, config: UNetConfig, attentive: bool) -> str:
    """Class of a level."""
    plain, alone, crossed, resampled = BLOCKS[side]
    if attentive:
        return alone if config.context_dim is None else crossed
    return resampled if config.resblock_updown else plain


def heads_of(config: UNetConfig, width: int) -> int:
    """Heads of attention over features of this width."""
    return num_heads_of(width, head_channels=config.head_channels, num_heads=config.num_heads)


def head_channels(config: UNetConfig, widths: list[int], attends: list[bool]) -> int:
    """Channels of a head, which the library has the same everywhere.

    Raises:
        CheckpointError: they differ between levels.
    """
    everywhere = [width for width, attentive in zip(widths, attends, strict=True) if attentive] + widths[-1:]
    sizes = sorted({width // heads_of(config, width) for width in everywhere})
    if len(sizes) > 1:
        raise CheckpointError(
            "a UNet2DModel of diffusers has one number of channels per head, and this model, with "
            f"unet.num_heads {config.num_heads}, has {sizes}; export it with --format compvis"
        )
    return sizes[0]


def position_names(config: UNetConfig) -> dict[str, str]:
    """Our places of blocks -> the library's, such as `input_blocks.4.1` -> `down_blocks.1.attentions.0`."""
    names, last = {}, len(config.channel_mult) - 1
    blocks, place, between = config.num_res_blocks, 1, "" if config.resblock_updown else ".op"
    for level in range(last + 1):
        for j in range(blocks):
            names[f"input_blocks.{place}.0"] = f"down_blocks.{level}.resnets.{j}"
            names[f"input_blocks.{place}.1"] = f"down_blocks.{level}.attentions.{j}"
            place += 1
        if level < last:
            ending = "" if config.resblock_updown else ".conv"
            names[f"input_blocks.{place}.0{between}"] = f"down_blocks.{level}.downsamplers.0{ending}"
            place += 1
    middle = ("resnets.0", "attentions.0", "resnets.1")
    names |= {f"middle_block.{i}": f"mid_block.{there}" for i, there in enumerate(middle)}
    for place in range((last + 1) * (blocks + 1)):
        level, j = divmod(place, blocks + 1)
        names[f"output_blocks.{place}.0"] = f"up_blocks.{level}.resnets.{j}"
        attends = 2 ** (last - level) in config.attention_factors
        if attends:
            names[f"output_blocks.{place}.1"] = f"up_blocks.{level}.attentions.{j}"
        if j == blocks and level < last:
            names[f"output_blocks.{place}.{1 + attends}"] = f"up_blocks.{level}.upsamplers.0"
    return names


def diffusers_unet_name(name: str, places: Mapping[str, str]) -> str:
    """The library's name of one of our tensors; `qkv` is left for `to_diffusers_unet` to split."""
    for ours, theirs in OUTSIDE.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    match = re.fullmatch(r"((?:input|output)_blocks\.\d+\.\d+(?:\.op)?|middle_block\.\d+)\.(.+)", name)
    assert match is not None, name
    place, rest = places[match[1]], match[2]
    for ours, theirs in RESIDUAL.items():
        if rest.startswith(f"{ours}."):
            return f"{place}.{theirs}{rest.removeprefix(ours)}"
    if not is_alone(name, place):
        return f"{place}.{rest}"
    rest = re.sub(r"^norm\.", "group_norm.", rest)
    return f"{place}.{re.sub(r'^proj_out[.]', 'to_out.0.', rest)}"


def is_alone(name: str, place: str) -> bool:
    """Whether a tensor at a place of attention may be one of self-attention alone."""
    return ".attentions." in f".{place}." and "transformer_blocks" not in name and "proj_in" not in name


def to_diffusers_unet(weights: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The tensors of one of our UNets under the library's names and in its shapes."""
    places, made = position_names(config), dict[str, Tensor]()
    for name, tensor in weights.items():
        if config.context_dim is not None and re.search(r"\.\d+\.(norm|proj_out)\.", name):
            position, rest = re.fullmatch(r"(.+?)\.((?:norm|proj_out)\..+)", name).groups()  # pyright: ignore
            made[f"{places[position]}.{rest}"] = tensor
            continue
        there = diffusers_unet_name(name, places)
        if ".qkv." in there:
            made |= split_heads(there, tensor, config)
        else:
            made[there] = tensor.squeeze(2) if ".to_out.0.weight" in there and tensor.ndim == 3 else tensor
    return made


def split_heads(name: str, qkv: Tensor, config: UNetConfig) -> dict[str, Tensor]:
    """Query, key and value of a joint layer: (3C, C, 1) or (3C,) -> three of (C, C) or (C,)."""
    heads = heads_of(config, qkv.shape[0] // 3)
    flat = qkv.squeeze(2) if qkv.ndim == 3 else qkv
    parts = flat.unflatten(0, (heads, 3, -1)).unbind(1)  # three of (heads, d, ...)
    return {
        name.replace(".qkv.", f".to_{letter}."): part.flatten(0, 1)
        for letter, part in zip("qkv", parts, strict=True)
    }


def from_diffusers_unet(
    tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], config: UNetConfig
) -> dict[str, Tensor]:
    """Our tensors of the library's: the inverse of `to_diffusers_unet`, by the shapes of `like`."""
    places, made = position_names(config), dict[str, Tensor]()
    for name, wanted in like.items():
        if ".qkv." not in name:
            [there] = to_diffusers_unet({name: wanted}, config)
            made[name] = tensors[there].reshape(wanted.shape)
            continue
        there = diffusers_unet_name(name, places)
        heads = heads_of(config, wanted.shape[0] // 3)
        parts = [tensors[there.replace(".qkv.", f".to_{x}.")].unflatten(0, (heads, -1)) for x in "qkv"]
        made[name] = torch.stack(parts, dim=1).reshape(wanted.shape)
    return made
