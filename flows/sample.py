"""Draws samples of a trained model into a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress

import ldm
from datasets.manifest import Manifest
from datasets.store import Store
from flows.models import find_model, recipe_of
from ldm.config import Recipe, Sampling
from ldm.diffusion_model import DiffusionModel
from ldm.errors import CheckpointError, ContractError, RecipeError
from ldm.model import LatentDiffusion
from ldm.model_folder import read_card
from ldm.range import to_uint8
from ldm.stages.train_ldm import MAX_GRID_CLASSES, labelled_grid, load_model

FOLDER_MICRO_BATCH = 4
"""Latents per forward pass of a model folder: published models are large."""
SHORT_KEY = 12


def class_labels(asked: Sequence[str] | None, known: Sequence[str]) -> list[int]:
    """Indices of classes given by name or number; all of them by default, [-1] for an unconditional model.

    Raises:
        ContractError: a class the model does not know.
    """
    if asked is None:
        return list(range(len(known))) or [-1]
    labels = []
    for name in asked:
        if name in known:
            labels.append(list(known).index(name))
        elif name.isdigit() and int(name) < len(known):
            labels.append(int(name))
        else:
            raise ContractError(
                f"unknown class {name!r}; this model knows {', '.join(known) or 'no classes'}"
            )
    return labels


def origin(model: Manifest, recipe: Recipe) -> dict[str, str]:
    """What a file of samples says of itself: recipe, model key, seed and all that they were drawn with."""
    return {
        "recipe": recipe.name,
        "model": model.key,
        "seed": str(recipe.sampling.seed),
        "sampling": recipe.sampling.model_dump_json(),
    }


def stored_model(
    store: str, spec: str, changes: Mapping[str, Any]
) -> tuple[LatentDiffusion, Sampling, dict[str, str]]:
    """A model of the store, how it is sampled, and what a file of its samples says of itself.

    Raises:
        ModelNotFoundError: there is no such model.
        RecipeError: a setting out of its range.
    """
    opened = Store(store)
    manifest = find_model(opened, spec)
    recipe = recipe_of(manifest, [f"sampling.{name}={value}" for name, value in changes.items()])
    return load_model(opened, manifest, recipe), recipe.sampling, origin(manifest, recipe)


def folder_model(folder: str, changes: Mapping[str, Any]) -> tuple[LatentDiffusion, Sampling, dict[str, str]]:
    """The model of a model folder, how it is sampled, and what a file of its samples says of itself.

    Raises:
        CheckpointError: the folder is damaged, or holds a first stage.
        ContractError: the model is asked by something else than class labels.
        RecipeError: a setting out of its range.
    """
    model, card = ldm.load(folder), read_card(Path(folder))
    if not isinstance(model, DiffusionModel):
        raise CheckpointError(
            f"{folder} holds a first stage, which has no samples of its own; name a folder of a latent "
            "diffusion model"
        )
    try:
        sampling = Sampling.model_validate({"micro_batch": FOLDER_MICRO_BATCH} | dict(changes))
    except ValidationError as error:
        raise RecipeError(f"sampling: {'; '.join(e['msg'] for e in error.errors())}") from None
    text = {"model": card.origin.sha256, "seed": str(sampling.seed), "sampling": sampling.model_dump_json()}
    return model.labelled(), sampling, {"file": card.origin.file} | text


def sample_to_file(
    store: str,
    spec: str,
    output: Path,
    *,
    classes: Sequence[str] | None,
    per_class: int,
    changes: Mapping[str, Any],
) -> None:
    """Write a grid with a row per class.

    Raises:
        ModelNotFoundError: there is no such model.
        ContractError: a class that the model does not know, or a folder that does not exist.
        RecipeError: a setting out of its range.
    """
    if not output.absolute().parent.is_dir():
        raise ContractError(f"the folder of {output} must exist; make it, or name another with --output")
    in_folder = Path(spec).is_dir()
    model, sampling, text = folder_model(spec, changes) if in_folder else stored_model(store, spec, changes)
    if in_folder and classes is None and len(model.classes) > MAX_GRID_CLASSES:
        raise ContractError(
            f"a grid of all {len(model.classes)} classes would be too large; name some with --classes, by "
            "number"
        )
    labels = class_labels(classes, model.classes)
    wanted = [label for label in labels for _ in range(per_class)]
    with Progress() as bar:
        task = bar.add_task(f"sampling {len(wanted)} pictures")
        pictures = model.sample(wanted, sampling, on_step=lambda i, n: bar.update(task, completed=i, total=n))
    names = [model.classes[label] for label in labels if label >= 0]
    output.write_bytes(labelled_grid(to_uint8(pictures), names, per_class=per_class, text=text))
    who = spec if in_folder else text["model"][:SHORT_KEY]
    Console().print(f"{output}: {len(wanted)} pictures of model {who}, seed {sampling.seed}")
