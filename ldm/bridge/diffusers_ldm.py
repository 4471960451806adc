"""Whole latent diffusion models as a pipeline folder of the library diffusers: written, and read back.

    model_index.json    names the classes; `DiffusionPipeline.from_pretrained` opens the folder
    unet/               UNet2DModel, or UNet2DConditionModel with transformers
    vqvae/              VQModel or AutoencoderKL
    scheduler/          DDIMScheduler
    conditioner/        our conditioning encoder under the published names; the library has no class for it

The UNet is the averaged one, where there is one.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ldm.bridge import diffusers
from ldm.bridge.diffusers_unet import diffusers_unet_config, from_diffusers_unet, to_diffusers_unet
from ldm.diffusion.schedule import build_schedule
from ldm.errors import CheckpointError
from ldm.model_config import LatentDiffusionModel
from ldm.model_folder import StoredDiffusion, StoredModel, dense

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
PIPELINE = "LDMPipeline"
CONDITIONER = "conditioner"
BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear"}
"""Our schedules -> the library's; others are given as a list of betas."""
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def write_latent_diffusion(model: StoredDiffusion, folder: Path) -> None:
    """Write a pipeline folder.

    Raises:
        CheckpointError: the library has no such model; the message names the setting.
    """
    config = model.config
    unet, scheduler = diffusers_unet_config(config.unet, sample_size=config.latent_size), ddim_config(config)
    for part in ("unet", "vqvae", "scheduler"):
        (folder / part).mkdir()
    facts = {diffusers.SCALING: config.scale}
    origin = model.origin.model_copy(update={"facts": facts})
    diffusers.write_first_stage(StoredModel(config.first_stage, model.first_stage, origin), folder / "vqvae")
    write_json(folder / "unet" / CONFIG, unet)
    tensors = to_diffusers_unet(unet_weights(model), config.unet)
    save_file(dense(tensors), folder / "unet" / diffusers.WEIGHTS, metadata={"format": "pt"})
    write_json(folder / "scheduler" / SCHEDULER, scheduler)
    encoder = {name: tensor for name, tensor in model.weights.items() if name.startswith(f"{CONDITIONER}.")}
    if encoder:
        (folder / CONDITIONER).mkdir()
        plain = {name.removeprefix(f"{CONDITIONER}."): tensor for name, tensor in encoder.items()}
        save_file(dense(plain), folder / CONDITIONER / diffusers.WEIGHTS, metadata={"format": "pt"})
    first_stage = diffusers.diffusers_config(config.first_stage, scaling=config.scale)["_class_name"]
    write_json(
        folder / INDEX,
        {
            "_class_name": PIPELINE,
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "unet": ["diffusers", unet["_class_name"]],
            "vqvae": ["diffusers", first_stage],
        },
    )


def unet_weights(model: StoredDiffusion) -> dict[str, Any]:
    """The tensors of the UNet under its own names: averaged, where they are."""
    chosen = model.ema or {name: t for name, t in model.weights.items() if name.startswith("unet.")}
    return {name.removeprefix("unet."): tensor for name, tensor in chosen.items()}


def ddim_config(config: LatentDiffusionModel) -> dict[str, Any]:
    """The library's DDIM with the published time steps and end.

    Raises:
        CheckpointError: the library has no such objective.
    """
    diffusion = config.diffusion
    if diffusion.objective not in PREDICTIONS:
        raise CheckpointError(
            f"diffusers has no diffusion.objective {diffusion.objective!r} for DDIM; known are "
            f"{', '.join(PREDICTIONS)}"
        )
    named = diffusion.schedule in BETAS
    betas = (
        {
            "beta_schedule": BETAS[diffusion.schedule],
            "beta_start": diffusion.linear_start,
            "beta_end": diffusion.linear_end,
        }
        if named
        else {"trained_betas": build_schedule(diffusion).betas.tolist()}
    )
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": diffusion.num_timesteps,
        **betas,
        "prediction_type": PREDICTIONS[diffusion.objective],
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }


def read_back(model: StoredDiffusion, folder: Path) -> StoredDiffusion:
    """The model that a pipeline folder holds, which was written from `model`: all weights from the folder."""
    first_stage = diffusers.read_first_stage(folder / "vqvae")
    tensors = load_file(folder / "unet" / diffusers.WEIGHTS)
    unet = from_diffusers_unet(tensors, unet_weights(model), model.config.unet)
    weights = {f"unet.{name}": tensor for name, tensor in unet.items()}
    if (encoder := folder / CONDITIONER / diffusers.WEIGHTS).exists():
        weights |= {f"{CONDITIONER}.{name}": tensor for name, tensor in load_file(encoder).items()}
    config = model.config.model_copy(update={"has_ema": False, "first_stage": first_stage.config})
    return StoredDiffusion(config, weights, first_stage.weights, {}, model.origin)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a config of the library."""
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
