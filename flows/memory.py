"""Says what training a recipe takes on each GPU, and what to set where it does not fit."""

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from ldm.config import Recipe
from ldm.errors import RecipeError
from ldm.recipe import load_recipe
from ldm.training.memory import (
    GIB,
    HEADROOM,
    TrainingStage,
    Way,
    largest_at_once,
    networks_of_stage,
    require_memory,
    way_of,
)

PARTS = {
    "parameters": "weights that are trained",
    "averages": "averages of them",
    "moments": "Adam moments",
    "frozen": "weights that are not trained",
    "gradients": "gradients",
    "activations": "activations",
}


def print_memory(recipe: str, overrides: Sequence[str], *, gpus: int, gib: float | None) -> None:
    """Print a table of what each training of a recipe takes; with `gib` also what fits.

    Args:
        recipe: name or YAML path.
        overrides: `key=value` each.
        gpus: ranks that share out a batch.
        gib: memory of each GPU.

    Raises:
        RecipeError: the recipe is not valid.
    """
    resolved, console = load_recipe(recipe, overrides), Console()
    if resolved.first_stage.training is not None:
        print_stage(console, resolved, "train-first-stage", gpus=gpus, gib=gib)
    print_stage(console, resolved, "train-ldm", gpus=gpus, gib=gib)


def print_stage(
    console: Console,
    recipe: Recipe,
    stage: TrainingStage,
    *,
    gpus: int,
    gib: float | None,
) -> None:
    """The table of one stage, and what fits."""
    networks = networks_of_stage(recipe, stage)
    way = way_of(recipe, stage, ranks=gpus)
    need = networks.need(way)
    kept = "made again" if way.checkpointing else "kept"
    table = Table(f"{stage} {recipe.name}", "GiB", title_justify="left")
    for name, value in vars(need).items():
        of = f" of {way.at_once} pictures at once, {way.precision}, {kept}" if name == "activations" else ""
        table.add_row(f"{PARTS[name]}{of}", f"{value / GIB:.2f}")
    table.add_section()
    table.add_row(f"on each of {gpus}", f"{need.total / GIB:.2f}")
    table.columns[1].justify = "right"
    console.print(table)
    if gib is None:
        return
    for checkpointing in sorted({way.checkpointing, True}):
        one: Way = replace(way, checkpointing=checkpointing)
        most = largest_at_once(networks, one, (1 - HEADROOM) * gib * GIB)
        how = "made again in the backward pass" if checkpointing else "kept"
        console.print(f"At most {most} pictures at once fit into {gib:g} GiB with activations {how}.")
    try:
        require_memory(recipe, stage, available_bytes=int(gib * GIB), ranks=gpus)
        console.print(f"It fits: {way.at_once} pictures at once on each of {gpus}.")
    except RecipeError as error:
        console.print(f"It does not fit: {error}.")
