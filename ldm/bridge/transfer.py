"""Whole imports and exports: other programs' files to a model folder, and back with a report of parity.

B batch, H W height and width of pictures in [-1, 1].
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load
from torch import Tensor

from datasets.keys import sha256_file
from datasets.manifest import Manifest
from datasets.store import Store
from ldm.bridge import compvis, diffusers
from ldm.config import FirstStageModel
from ldm.errors import CheckpointError
from ldm.model import WEIGHTS, Autoencoder
from ldm.model_folder import Origin, StoredModel, appearing_whole, autoencoder_of, write_model_folder

Format = Literal["compvis", "diffusers"]
WRITERS = {"compvis": compvis.write_first_stage, "diffusers": diffusers.write_first_stage}
PARITY = "parity.json"
SIDE_PX = 64
"""Least side of the picture that parity is measured on."""
SEED = 0


def read_foreign(config: Path, checkpoint: Path | None) -> StoredModel:
    """The model of a diffusers folder, or of a published YAML with its checkpoint.

    Raises:
        CheckpointError: the files cannot be read, do not fit each other, or one of them is not given.
    """
    if config.is_dir():
        if checkpoint is not None:
            raise CheckpointError(
                f"a diffusers folder brings its own weights, got {config} and {checkpoint}; leave the "
                "latter out"
            )
        return diffusers.read_first_stage(config)
    if checkpoint is None:
        raise CheckpointError(
            f"a published YAML comes with a checkpoint, got {config} alone; name the .ckpt behind it, or "
            "give a folder that diffusers wrote"
        )
    return compvis.read_first_stage(config, checkpoint)


def import_to_folder(config: Path, checkpoint: Path | None, *, output: Path) -> list[str]:
    """Write a foreign model as a model folder; returns what was found, line by line.

    Raises:
        CheckpointError: see `read_foreign`, or the output exists.
    """
    model = read_foreign(config, checkpoint)
    write_model_folder(output, model)
    lines = [f"{output}: {described(model)}", f"from {model.origin.file}, sha256 {model.origin.sha256}"]
    if model.origin.facts:
        lines.append("it says: " + ", ".join(f"{name} {value}" for name, value in model.origin.facts.items()))
    if model.training_state:
        lines.append(
            f"training state kept beside the model: {len(model.training_state)} tensors, such as "
            f"{min(model.training_state)}"
        )
    return lines


def described(model: StoredModel) -> str:
    """A model in a few words."""
    config = model.config
    codes = f", {config.num_codes} codes" if config.num_codes else ""
    count = sum(tensor.numel() for tensor in model.weights.values())
    return (
        f"{config.kind} first stage, f = {config.factor}, c = {config.embed_dim}{codes}, {count:,} parameters"
    )


def of_artifact(store: Store, manifest: Manifest) -> StoredModel:
    """The first stage that our own training left in a store, with its averaged weights.

    Raises:
        CheckpointError: it is the identity, which has no weights.
    """
    config = FirstStageModel.model_validate(manifest.content.what["model"])
    if config.kind == "identity":
        raise CheckpointError("an exported first stage must have weights, and kind identity has none")
    data = store.read(manifest, WEIGHTS)
    [file] = [file for file in manifest.content.files if file.name == WEIGHTS]
    return StoredModel(config, load(data), Origin(format="artifact", file=manifest.key, sha256=file.sha256))


def export_to_folder(model: StoredModel, output: Path, *, format: Format) -> list[str]:
    """Write a model in a foreign layout, read it back and compare; returns the report, line by line.

    The report is kept as `parity.json` in the output.

    Raises:
        CheckpointError: the layout has no such model, or the output exists.
    """
    with appearing_whole(output) as temporary:
        WRITERS[format](model, temporary)
        back = (
            (temporary, None)
            if format == "diffusers"
            else (temporary / compvis.CONFIG, temporary / compvis.CHECKPOINT)
        )
        report = {
            "format": format,
            "files": {file.name: sha256_file(file) for file in sorted(temporary.iterdir())},
            "origin": model.origin.model_dump(mode="json"),
            "parity": parity(autoencoder_of(model), autoencoder_of(read_foreign(*back))),
        }
        (temporary / PARITY).write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    lines = [f"{output}: {described(model)}, as {format}", *said(report["parity"])]
    kept = len(model.training_state) if format == "compvis" else 0
    lines.append(f"training state: {kept} tensors written back" if kept else "training state is not exported")
    return lines


def parity(model: Autoencoder, exported: Autoencoder) -> dict[str, Any]:
    """Largest differences between two autoencoders that ought to be one, on a fixed random picture."""
    side = max(SIDE_PX, model.config.factor)
    x = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(SEED)) * 2.0 - 1.0
    outputs = [latent_and_reconstruction(autoencoder, x) for autoencoder in (model, exported)]
    return {
        "picture": f"uniform in [-1, 1], {side} px, seed {SEED}",
        "largest_difference": {
            name: float((outputs[0][name] - outputs[1][name]).abs().amax()) for name in outputs[0]
        },
        "largest_value": {name: float(tensor.abs().amax()) for name, tensor in outputs[0].items()},
    }


def latent_and_reconstruction(autoencoder: Autoencoder, x: Tensor) -> dict[str, Tensor]:
    """What an autoencoder makes of pictures (B, 3, H, W): both its outputs."""
    latent = autoencoder.encode(x)
    return {"latent": latent, "reconstruction": autoencoder.decode(latent)}


def said(report: dict[str, Any]) -> Sequence[str]:
    """A parity report for people, a line per output."""
    return [
        f"read back, largest difference of the {name}: {difference:g} "
        f"(values up to {report['largest_value'][name]:.3g})"
        for name, difference in report["largest_difference"].items()
    ]
