"""The stage train-ldm: latent shards -> a trained UNet and conditioning encoder."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from datasets.keys import canonical_json
from datasets.manifest import Manifest
from datasets.stream import SampleReader
from ldm.conditions import reads_captions
from ldm.config import Recipe
from ldm.device import resolve
from ldm.evaluation.sets import asked_condition
from ldm.latent_diffusion import LatentDiffusion, assemble
from ldm.latents import check_contract, check_moments
from ldm.model import WEIGHTS, Denoising, build_denoising, load_first_stage
from ldm.pictures import grid, png
from ldm.range import to_uint8
from ldm.stages.stage import Job, Result, Stage, trained
from ldm.stages.train_first_stage import last_values, loss_curves
from ldm.stored_models import RAW
from ldm.training.checkpoint import num_kept
from ldm.training.diffusion import DiffusionTrainee
from ldm.training.ranks import Ranks
from ldm.training_config import NOT_WHAT

MIB = 2**20
MOMENT_SAMPLES = 512
MAX_GRID_CLASSES = 15
LOOK_STEPS = 10


def what(recipe: Recipe) -> dict[str, Any]:
    """Networks, forward process and training."""
    return {
        "unet": recipe.unet.model_dump(mode="json", exclude={"checkpoint_activations"}),
        "conditioning": recipe.conditioning.model_dump(mode="json") if recipe.conditioning else None,
        "diffusion": recipe.diffusion.model_dump(mode="json"),
        "training": recipe.training.model_dump(mode="json", exclude=NOT_WHAT),
        "threads": recipe.threads,
    }


def need_bytes(recipe: Recipe, inputs: Mapping[str, Manifest]) -> int:
    """Checkpoints of weights, averages and two Adam moments, and the result."""
    del inputs
    with torch.device("meta"):
        parameters = sum(
            p.numel() for p in build_denoising(recipe, num_classes=max(recipe.num_classes, 1)).parameters()
        )
    return 100 * MIB + num_kept(recipe.training) * 16 * parameters + 8 * parameters


def build(job: Job) -> Result:
    """Check the latents against their contract, train, store the averaged and the raw weights."""
    recipe, latents = job.recipe, job.inputs["latents"]
    contract = check_contract(latents, recipe, job.inputs["first_stage"])
    first_stage = load_first_stage(job.store, job.inputs["first_stage"])
    reader = latents_of(job, "train")
    count = min(MOMENT_SAMPLES, len(reader))
    first = reader.in_order(recipe.training.seed, position=0, count=count)["latent"]
    check_moments(torch.from_numpy(first), first_stage, contract)
    trainee, history = trained(job, recipe.training, make_trainee)
    for name, picture in {**trainee.look(history), **loss_curves(history)}.items():
        job.report.picture(name, recipe.training.num_images, picture)
    raw = {name: value.contiguous() for name, value in trainee.networks.state_dict().items()}
    files = (
        job.put(WEIGHTS, save({name: value.contiguous() for name, value in trainee.ema.averages.items()})),
        job.put(RAW, save(raw)),
        job.put("history.json", canonical_json(history)),
    )
    parameters = sum(p.numel() for p in trainee.networks.parameters())
    return Result(
        files=files,
        statistics=last_values(history)
        | {"num_parameters": parameters, "scale": contract.scale, "classes": list(classes_of(job))},
    )


def latents_of(job: Job, split: str) -> SampleReader:
    """The latents of a split, with captions where the model is asked by them."""
    captions = reads_captions(job.recipe.conditioning)
    return SampleReader(job.store, job.inputs["latents"], split=split, captions=captions)


def classes_of(job: Job) -> Sequence[str]:
    """The classes that the model is asked by, none without a condition."""
    return job.inputs["latents"].content.statistics["classes"] if job.recipe.conditioning else []


def make_trainee(job: Job, ranks: Ranks) -> DiffusionTrainee:
    """The diffusion model in training, as one of the ranks has it."""
    recipe, classes = job.recipe, classes_of(job)
    contract = check_contract(job.inputs["latents"], recipe, job.inputs["first_stage"])
    first_stage = load_first_stage(job.store, job.inputs["first_stage"])
    held_out = latents_of(job, "held_out")

    def look(networks: Denoising) -> dict[str, bytes]:
        model = assemble(recipe, networks, first_stage, scale=contract.scale, classes=classes)
        return {"samples": sample_grid(model, recipe, held_out, per_class=2, steps=LOOK_STEPS)}

    return DiffusionTrainee(
        recipe,
        latents_of(job, "train"),
        contract,
        first_stage,
        num_classes=len(classes),
        look=look,
        ranks=ranks,
        device=resolve(job.recipe.device),
    )


def grid_labels(num_classes: int, *, per_class: int) -> list[int]:
    """Labels of a grid, a row per class: the first classes, `per_class` times each; -1 without classes."""
    if num_classes == 0:
        return [-1] * per_class * 4
    return [label for label in range(min(num_classes, MAX_GRID_CLASSES)) for _ in range(per_class)]


def sample_grid(
    model: LatentDiffusion, recipe: Recipe, held_out: SampleReader, *, per_class: int, steps: int
) -> bytes:
    """PNG of samples, about as wide as high, as trackers show small pictures best.

    They are asked for class after class, or by what the first held-out pictures are asked by.
    """
    labels = grid_labels(len(model.classes), per_class=per_class)
    # DDIM, because a look on the way has few steps, with which some samplers make no sense
    few = {"micro_batch": len(labels), "steps": steps, "sampler": "ddim"}
    condition = asked_condition(model, labels, held_out)
    images = to_uint8(model.sample(condition, num=len(labels), **(dict(recipe.sampling) | few)))
    columns = per_class * max(1, round(math.sqrt(len(labels)) / per_class))
    return png(grid(images, columns=columns, scale=max(1, 96 // images.shape[1])))


def labelled_grid(
    images: np.ndarray, classes: Sequence[str], *, per_class: int, text: Mapping[str, str] | None = None
) -> bytes:
    """PNG of pictures (N, H, W, 3), `per_class` to a row, rows named by class; `text` is kept in the file."""
    rows = classes[: len(images) // per_class] if classes else ()
    scale = max(1, 128 // images.shape[1])
    return png(grid(images, columns=per_class, scale=scale, row_labels=rows), text=text)


TRAIN_LDM = Stage(
    name="train-ldm",
    code_version=3,
    inputs={"latents": "encode-latents", "first_stage": "train-first-stage"},
    what=what,
    build=build,
    need_bytes=need_bytes,
    make_trainee=make_trainee,
)
