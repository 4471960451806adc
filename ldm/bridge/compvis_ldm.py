"""Checkpoints of latent diffusion models of CompVis/latent-diffusion: their keys, both ways.

T time steps. A checkpoint holds, in one state dict:

    model.diffusion_model.*     the UNet                                  unet.*
    cond_stage_model.*          the conditioning encoder                  conditioner.*
    first_stage_model.*         the first stage, with its own loss        first stage
    model_ema.*                 the UNet's average, dots left out         unet.*
    betas and eleven more       noise levels (T,), kept as they are       training state
    scale_factor, logvar        see ldm.model_config, if they are there   training state

For inpainting, `cond_stage_model.*` is the first stage once more: it is compared, then left out.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from torch import Tensor

from ldm.bridge.compvis import CHECKPOINT, CONFIG, LOSS, require_same_shape
from ldm.bridge.compvis_ldm_config import effective_key, latent_diffusion_config
from ldm.bridge.compvis_ldm_output import published_diffusion_config
from ldm.bridge.foreign import read_checkpoint
from ldm.bridge.section import Section
from ldm.diffusion.schedule import Schedule, build_schedule
from ldm.errors import CheckpointError
from ldm.layout import Layout, first_stage_layout, listed, networks_layout, require_layout
from ldm.model_config import LatentDiffusionModel
from ldm.model_folder import LOG_VARIANCE, Origin, StoredDiffusion, dense
from ldm.network_config import EmbeddingsConditioning, HybridConditioning, MaskedImageConditioning

UNET, CONDITIONER, FIRST_STAGE, EMA = (
    "model.diffusion_model.",
    "cond_stage_model.",
    "first_stage_model.",
    "model_ema.",
)
EMA_STATE = ("model_ema.decay", "model_ema.num_updates")
SCALE = "scale_factor"
SMALLEST_VARIANCE = 1e-20
TOLERANCE = 1e-5
"""Largest relative difference between a noise level of a checkpoint and of its config, in float32."""


def read_latent_diffusion(section: Section, checkpoint: Path, *, one_head: bool) -> StoredDiffusion:
    """The latent diffusion model of a published config and checkpoint.

    Args:
        section: the `model` section of the config.
        checkpoint: the file.
        one_head: every transformer has one head (`compvis_ldm_config.may_have_one_head`).

    Raises:
        CheckpointError: the checkpoint cannot be read, or the two do not fit each other.
    """
    config = latent_diffusion_config(section, one_head=one_head)
    found = read_checkpoint(checkpoint)
    return stored(
        config,
        found.tensors,
        Origin(format="compvis", file=checkpoint.name, sha256=found.sha256, facts=found.facts),
        scale_in_checkpoint=section.section("params").value("scale_by_std", bool, False),
    )


def stored(
    config: LatentDiffusionModel, tensors: Mapping[str, Tensor], origin: Origin, *, scale_in_checkpoint: bool
) -> StoredDiffusion:
    """The tensors of a checkpoint sorted into what a model folder holds.

    Raises:
        CheckpointError: they are not those of the config, or contradict it.
    """
    has_ema = any(name.startswith(EMA) and name not in EMA_STATE for name in tensors)
    config = config.model_copy(update={"has_ema": has_ema})
    first_stage = under(tensors, FIRST_STAGE)
    leftover = {name: tensor for name, tensor in first_stage.items() if name.startswith(LOSS)}
    first_stage = {name: tensor for name, tensor in first_stage.items() if name not in leftover}
    require_same_shape(first_stage, config.first_stage, what=f"{origin.file} under {FIRST_STAGE}")
    layout = checkpoint_layout(config, scale_in_checkpoint=scale_in_checkpoint)
    kept_aside = {FIRST_STAGE + name for name in leftover}
    floating = {name: t for name, t in tensors.items() if name not in kept_aside and name not in EMA_STATE}
    require_layout(floating, layout, what=origin.file)
    require_noise_levels(tensors, build_schedule(config.diffusion), what=origin.file)
    require_duplicate(tensors, config, what=origin.file)
    names = our_names(config)
    if scale_in_checkpoint:
        config = config.model_copy(update={"scale": scale_of(tensors[SCALE], what=origin.file)})
    state = {*noise_levels(build_schedule(config.diffusion)), *kept_aside, *EMA_STATE, SCALE, LOG_VARIANCE}
    averaged = ema_names(config) if has_ema else {}
    return StoredDiffusion(
        config=config,
        weights={ours: tensors[theirs] for ours, theirs in names.items()},
        first_stage=first_stage,
        ema={ours: tensors[theirs] for ours, theirs in averaged.items()},
        origin=origin,
        training_state={name: tensor for name, tensor in tensors.items() if name in state},
    )


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def our_names(config: LatentDiffusionModel) -> dict[str, str]:
    """Our names of the networks' tensors -> the published ones."""
    return {
        name: UNET + name.removeprefix("unet.")
        if name.startswith("unet.")
        else CONDITIONER + name.removeprefix(conditioner_prefix(config))
        for name in networks_layout(config)
    }


def conditioner_prefix(config: LatentDiffusionModel) -> str:
    """Where the tensors of the one encoder stand in our networks."""
    conditioning = config.conditioning
    if not isinstance(conditioning, HybridConditioning):
        return "conditioner."
    given = isinstance(conditioning.tokens, EmbeddingsConditioning)
    return "conditioner.maps." if given else "conditioner.tokens."


def ema_names(config: LatentDiffusionModel) -> dict[str, str]:
    """Our names of the UNet's tensors -> those of their averages."""
    return {
        ours: EMA + theirs.removeprefix("model.").replace(".", "")
        for ours, theirs in our_names(config).items()
        if theirs.startswith(UNET)
    }


def repeats_first_stage(config: LatentDiffusionModel) -> bool:
    """Whether the checkpoint holds the first stage twice, as conditioning encoder too."""
    conditioning = config.conditioning
    maps = conditioning.maps if isinstance(conditioning, HybridConditioning) else conditioning
    return isinstance(maps, MaskedImageConditioning)


def checkpoint_layout(config: LatentDiffusionModel, *, scale_in_checkpoint: bool) -> Layout:
    """Every tensor of a published checkpoint but the two scalars of the average and leftovers of losses."""
    networks, names = networks_layout(config), our_names(config)
    first_stage = first_stage_layout(config.first_stage)
    layout = dict.fromkeys(noise_levels(build_schedule(config.diffusion)), (config.diffusion.num_timesteps,))
    layout |= {theirs: networks[ours] for ours, theirs in names.items()}
    layout |= {FIRST_STAGE + name: shape for name, shape in first_stage.items()}
    if repeats_first_stage(config):
        layout |= {CONDITIONER + name: shape for name, shape in first_stage.items()}
    if config.has_ema:
        layout |= {theirs: networks[ours] for ours, theirs in ema_names(config).items()}
    if scale_in_checkpoint:
        layout[SCALE] = ()
    if config.diffusion.learn_log_variance:
        layout[LOG_VARIANCE] = (config.diffusion.num_timesteps,)
    return layout


def noise_levels(schedule: Schedule) -> dict[str, Tensor]:
    """The twelve published buffers of a schedule, each (T,) float32."""
    alpha_bar, variance = schedule.alpha_bar, schedule.posterior_variance
    of_x_0, of_x_t = schedule.posterior_coefficients
    values = {
        "betas": schedule.betas,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": schedule.alpha_bar_before,
        "sqrt_alphas_cumprod": alpha_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1.0 - alpha_bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1.0 - alpha_bar).log(),
        "sqrt_recip_alphas_cumprod": (1.0 / alpha_bar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1.0 / alpha_bar - 1.0).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=SMALLEST_VARIANCE).log(),
        "posterior_mean_coef1": of_x_0,
        "posterior_mean_coef2": of_x_t,
    }
    return {name: value.float() for name, value in values.items()}


def require_noise_levels(tensors: Mapping[str, Tensor], schedule: Schedule, *, what: str) -> None:
    """Refuse a checkpoint that was trained on other noise than its config says.

    Raises:
        CheckpointError: a buffer differs; the message says where, and by how much.
    """
    for name, wanted in noise_levels(schedule).items():
        found = tensors[name]
        tolerance = max(TOLERANCE, 4 * torch.finfo(found.dtype).eps)
        different = (found.float() - wanted).abs() > tolerance * wanted.abs() + 1e-8
        different |= ~found.isfinite()
        if bool(different.any()):
            t = int(different.nonzero()[0])
            raise CheckpointError(
                f"the noise levels of {what} must be those of its config, but {name}[{t}] is "
                f"{float(found[t]):.7g} there and {float(wanted[t]):.7g} by the config's schedule; give the "
                "config published with the checkpoint"
            )


def require_duplicate(tensors: Mapping[str, Tensor], config: LatentDiffusionModel, *, what: str) -> None:
    """Refuse an encoder of masked pictures that is not the first stage, bit for bit.

    Raises:
        CheckpointError: they differ; the message lists where.
    """
    if not repeats_first_stage(config):
        return
    first = {name: tensors[FIRST_STAGE + name] for name in first_stage_layout(config.first_stage)}
    wrong = [name for name, tensor in first.items() if not same_bits(tensor, tensors[CONDITIONER + name])]
    if wrong:
        raise CheckpointError(
            f"the encoder of masked pictures must be the first stage itself, but in {what} these tensors of "
            f"{CONDITIONER}* differ from {FIRST_STAGE}*: {listed(wrong)}; such a model is unknown"
        )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, NaN included."""
    return a.dtype == b.dtype and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


def scale_of(buffer: Tensor, *, what: str) -> float:
    """The scale in a checkpoint.

    Raises:
        CheckpointError: it is no positive number.
    """
    scale = float(buffer)
    if not 0 < scale < float("inf"):
        raise CheckpointError(f"{SCALE} in {what} must be a positive number, got {scale}")
    return scale


def write_latent_diffusion(model: StoredDiffusion, folder: Path) -> None:
    """Write `config.yaml` and `model.ckpt` into a folder, training state and facts of an import included.

    Raises:
        CheckpointError: the published code has no such model.
    """
    in_checkpoint = SCALE in model.training_state
    config = published_diffusion_config(
        model.config, scale_in_checkpoint=in_checkpoint, use_ema=model.config.has_ema
    )
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    facts = model.origin.facts if model.origin.format == "compvis" else {}
    torch.save({"state_dict": dense(published_state(model)), **facts}, folder / CHECKPOINT)


def published_state(model: StoredDiffusion) -> dict[str, Tensor]:
    """The whole state dict under the published names."""
    config = model.config
    state = {**noise_levels(build_schedule(config.diffusion)), **model.training_state}
    state |= {theirs: model.weights[ours] for ours, theirs in our_names(config).items()}
    if config.has_ema:
        state |= {theirs: model.ema[ours] for ours, theirs in ema_names(config).items()}
    state |= {FIRST_STAGE + name: tensor for name, tensor in model.first_stage.items()}
    if repeats_first_stage(config):
        state |= {CONDITIONER + name: tensor for name, tensor in model.first_stage.items()}
    return state


def read_notes(section: Section, model: StoredDiffusion, *, one_head: bool, may_have: bool) -> list[str]:
    """What a user should know about how a config was read, line by line."""
    notes = []
    if may_have and not one_head:
        notes.append(
            "note: this config leaves open how many heads its transformers have; they are read as "
            "num_head_channels says. Checkpoints trained before April 2022 (cin256, text2img256, "
            "layout2img-openimages256) have one head: import those with --one-head"
        )
    if section.section("params").value("use_ema", bool, True) and not model.config.has_ema:
        notes.append("note: the checkpoint holds no averaged weights, though its config has use_ema")
    if effective_key(section.section("params")) is not None:
        notes.append(f"conditions: see {model.config.conditioning.kind} in ldm/conditions.py")  # pyright: ignore
    return notes
