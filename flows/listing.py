"""What exists, what runs, what it said: the tables of `ldm list`, `status`, `logs` and `recipes`."""

import json
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from datasets.errors import ConfigError
from datasets.store import Store
from flows.progress import status_folder
from ldm.recipe import RECIPES, load_recipe, recipe_names

STALE_S = 60.0


def print_recipes() -> None:
    """A line per recipe."""
    table = Table("recipe", "data set", "first stage", "f", "description", title="ldm reproduce RECIPE")
    for name in recipe_names(RECIPES):
        recipe = load_recipe(name)
        model = recipe.first_stage.model
        table.add_row(
            name, recipe.dataset.name, recipe.first_stage.name, str(model.factor), recipe.description
        )
    Console().print(table)


def print_artifacts(store: str) -> None:
    """A line per artifact."""
    opened = Store(store)
    table = Table("stage", "key", "recipe", "made", "wall s", "CPU s", "MB", "made of", title=opened.uri)
    for m in sorted(opened.manifests(), key=lambda m: str(m.provenance.get("made", ""))):
        p = m.provenance
        parents = ", ".join(f"{role} {parent.key[:12]}" for role, parent in m.content.parents.items())
        table.add_row(
            m.stage,
            m.short,
            str(p.get("recipe", {}).get("name", "")),
            str(p.get("made", "")),
            f"{p.get('wall_s', 0):,.0f}",
            f"{p.get('cpu_s', 0):,.0f}",
            f"{m.num_bytes / 1e6:,.1f}",
            parents,
        )
    Console().print(table)


def print_status(store: str) -> None:
    """A line per piece of work that was started."""
    table = Table("stage", "key", "state", "progress", "images/s", "wall s", "CPU s", title="work")
    for path in sorted(status_folder(Store(store)).glob("*.json"), key=lambda path: path.stat().st_mtime):
        status = json.loads(path.read_text("utf-8"))
        share = f"{status['done']:,} of {status['total']:,}" if status["total"] else ""
        table.add_row(
            status["stage"],
            status["key"][:12],
            state_of(status),
            share,
            f"{status['images_per_s']:.1f}",
            f"{status['wall_s']:,.0f}",
            f"{status['cpu_s']:,.0f}",
        )
    Console().print(table)


def state_of(status: dict[str, object]) -> str:
    """The state a status file claims, unless its process is gone."""
    alive = (
        psutil.pid_exists(int(str(status["pid"]))) and time.time() - float(str(status["updated"])) < STALE_S
    )
    if status["state"] == "running" and not alive:
        return "cut off; run the same command to continue"
    return str(status["state"])


def print_log(store: str, stage: str | None, lines: int) -> None:
    """The last lines of the newest log, of one stage if asked.

    Raises:
        ConfigError: there is no such log.
    """
    folder = Store(store).local_root / "logs"
    found = sorted(folder.glob(f"{stage or ''}*.log"), key=lambda path: path.stat().st_mtime)
    if not found:
        stages = sorted({path.stem.rpartition("-")[0] for path in Path(folder).glob("*.log")})
        raise ConfigError(
            f"no log of {stage or 'any stage'} in {folder}; there are logs of: {', '.join(stages) or 'none'}"
        )
    console = Console()
    console.print(f"[bold]{found[-1]}[/bold]", soft_wrap=True)
    for line in found[-1].read_text("utf-8").splitlines()[-lines:]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
