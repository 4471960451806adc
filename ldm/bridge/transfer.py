"""Whole imports and exports: other programs' files to a model folder, and back with a report of parity."""

import json
from pathlib import Path
from typing import Literal

from datasets.keys import sha256_file
from ldm.bridge import compvis, compvis_ldm, diffusers, diffusers_ldm
from ldm.bridge.compvis_ldm_config import TARGETS, may_have_one_head
from ldm.bridge.parity import parity, said
from ldm.errors import CheckpointError
from ldm.first_stage_config import FirstStageModel
from ldm.latent_diffusion import LatentDiffusion
from ldm.model import Autoencoder
from ldm.model_folder import (
    AnyStored,
    StoredDiffusion,
    StoredModel,
    appearing_whole,
    autoencoder_of,
    latent_diffusion_of,
    write_model_folder,
)

Format = Literal["compvis", "diffusers"]
PARITY = "parity.json"


def read_foreign(
    config: Path, checkpoint: Path | None, *, one_head: bool = False
) -> tuple[AnyStored, list[str]]:
    """The model of a diffusers folder, or of a published YAML with its checkpoint, and notes on its reading.

    Raises:
        CheckpointError: the files cannot be read, do not fit each other, or one of them is not given.
    """
    if config.is_dir():
        if checkpoint is not None:
            raise CheckpointError(
                f"a diffusers folder brings its own weights, got {config} and {checkpoint}; leave the "
                "latter out"
            )
        refuse_one_head(one_head)
        return diffusers.read_first_stage(config), []
    if checkpoint is None:
        raise CheckpointError(
            f"a published YAML comes with a checkpoint, got {config} alone; name the .ckpt behind it, or "
            "give a folder that diffusers wrote"
        )
    section = compvis.read_model_section(config)
    if section.values.get("target") not in TARGETS:
        refuse_one_head(one_head)
        return compvis.read_first_stage(config, checkpoint), []
    model = compvis_ldm.read_latent_diffusion(section, checkpoint, one_head=one_head)
    open_question = may_have_one_head(section)
    return model, compvis_ldm.read_notes(section, model, one_head=one_head, may_have=open_question)


def refuse_one_head(one_head: bool) -> None:
    """Refuse a choice about transformers for a model without any."""
    if one_head:
        raise CheckpointError("--one-head is for latent diffusion models with transformers; leave it out")


def import_to_folder(
    config: Path, checkpoint: Path | None, *, output: Path, one_head: bool = False
) -> list[str]:
    """Write a foreign model as a model folder; returns what was found, line by line.

    Raises:
        CheckpointError: see `read_foreign`, or the output exists.
    """
    model, notes = read_foreign(config, checkpoint, one_head=one_head)
    write_model_folder(output, model)
    lines = [f"{output}: {described(model)}", f"from {model.origin.file}, sha256 {model.origin.sha256}"]
    if model.origin.facts:
        lines.append("it says: " + ", ".join(f"{name} {value}" for name, value in model.origin.facts.items()))
    if model.training_state:
        lines.append(
            f"training state kept beside the model: {len(model.training_state)} tensors, such as "
            f"{min(model.training_state)}"
        )
    return lines + notes


def described(model: AnyStored) -> str:
    """A model in a few words."""
    if isinstance(model, StoredModel):
        return first_stage_described(model.config, sum(tensor.numel() for tensor in model.weights.values()))
    config = model.config
    counts = {
        part: sum(tensor.numel() for name, tensor in model.weights.items() if name.startswith(part))
        for part in ("unet", "conditioner")
    }
    first_stage = sum(tensor.numel() for tensor in model.first_stage.values())
    asked = "unconditional" if config.conditioning is None else f"conditioned on {config.conditioning.kind}"
    return (
        f"latent diffusion model, {asked}, UNet {counts['unet']:,} parameters"
        f"{', averaged and raw' if config.has_ema else ''}, conditioning encoder {counts['conditioner']:,}, "
        f"scale {config.scale:g}, {first_stage_described(config.first_stage, first_stage)}"
    )


def first_stage_described(config: FirstStageModel, count: int) -> str:
    """A first stage in a few words."""
    codes = f", {config.num_codes} codes" if config.num_codes else ""
    return (
        f"{config.kind} first stage, f = {config.factor}, c = {config.embed_dim}{codes}, {count:,} parameters"
    )


def ready(model: AnyStored) -> Autoencoder | LatentDiffusion:
    """A stored model ready for use."""
    return autoencoder_of(model) if isinstance(model, StoredModel) else latent_diffusion_of(model)


def written_and_read(model: AnyStored, folder: Path, format: Format) -> AnyStored:
    """Write a model in a foreign layout into a folder; returns what is read from there.

    Raises:
        CheckpointError: the layout has no such model.
    """
    match format, model:
        case "compvis", StoredDiffusion():
            compvis_ldm.write_latent_diffusion(model, folder)
        case "compvis", StoredModel():
            compvis.write_first_stage(model, folder)
        case "diffusers", StoredDiffusion():
            diffusers_ldm.write_latent_diffusion(model, folder)
            return diffusers_ldm.read_back(model, folder)
        case "diffusers", StoredModel():
            diffusers.write_first_stage(model, folder)
            return read_foreign(folder, None)[0]
    return read_foreign(folder / compvis.CONFIG, folder / compvis.CHECKPOINT)[0]


def export_to_folder(model: AnyStored, output: Path, *, format: Format) -> list[str]:
    """Write a model in a foreign layout, read it back and compare; returns the report, line by line.

    The report is kept as `parity.json` in the output.

    Raises:
        CheckpointError: the layout has no such model, or the output exists.
    """
    with appearing_whole(output) as temporary:
        back = written_and_read(model, temporary, format)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        report = {
            "format": format,
            "files": {file.relative_to(temporary).as_posix(): sha256_file(file) for file in files},
            "origin": model.origin.model_dump(mode="json"),
            "parity": parity(ready(model), ready(back)),
        }
        (temporary / PARITY).write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    lines = [f"{output}: {described(model)}, as {format}", *said(report["parity"])]
    kept = len(model.training_state) if format == "compvis" else 0
    lines.append(f"training state: {kept} tensors written back" if kept else "training state is not exported")
    return lines
