"""Draws samples of a trained model into a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from datasets.manifest import Manifest
from datasets.store import Store
from flows.models import find_model, recipe_of
from ldm.config import Recipe
from ldm.errors import ContractError
from ldm.range import to_uint8
from ldm.stages.train_ldm import labelled_grid, load_model


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
    opened = Store(store)
    manifest = find_model(opened, spec)
    recipe = recipe_of(manifest, [f"sampling.{name}={value}" for name, value in changes.items()])
    model = load_model(opened, manifest, recipe)
    labels, sampling = class_labels(classes, model.classes), recipe.sampling
    wanted = [label for label in labels for _ in range(per_class)]
    with Progress() as bar:
        task = bar.add_task(f"sampling {len(wanted)} pictures")
        pictures = model.sample(wanted, sampling, on_step=lambda i, n: bar.update(task, completed=i, total=n))
    names = [model.classes[label] for label in labels if label >= 0]
    text = origin(manifest, recipe)
    output.write_bytes(labelled_grid(to_uint8(pictures), names, per_class=per_class, text=text))
    Console().print(f"{output}: {len(wanted)} pictures of model {manifest.short}, seed {sampling.seed}")
