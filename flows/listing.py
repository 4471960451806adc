"""What exists, what runs, what it said: the tables of `ldm list`, `status`, `logs` and `recipes`."""

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from datasets.errors import ConfigError
from datasets.store import Store
from flows.attempts import is_alive
from flows.progress import status_folder
from flows.tracking import print_waiting
from ldm.recipe import RECIPES, load_recipe, recipe_names

KEY_DIGITS = 8
STALE = "*"
NUMBERS = {"progress", "images/s", "wall s", "CPU s", "MB"}


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
    """A line per artifact, those that are stale marked; then why they are."""
    from flows.staleness import why_stale  # imports torch, which the other tables do without

    opened = Store(store)
    manifests = sorted(opened.manifests(), key=lambda m: str(m.provenance.get("made", "")))
    reasons = why_stale(manifests, elsewhere=opened.remembered())
    table = narrow(
        "stage", "key", "recipe", "made", "wall s", "CPU s", "MB", wrapping="made of", title=opened.uri
    )
    for m in manifests:
        p = m.provenance
        table.add_row(
            m.stage,
            m.key[:KEY_DIGITS] + (STALE if m.digest in reasons else ""),
            str(p.get("recipe", {}).get("name", "")),
            str(p.get("made", ""))[5:16].replace("T", " "),
            f"{p.get('wall_s', 0):,.0f}",
            f"{p.get('cpu_s', 0):,.0f}",
            f"{m.num_bytes / 1e6:,.1f}",
            " ".join(sorted(parent.key[:KEY_DIGITS] for parent in m.content.parents.values())),
        )
    show(table, empty=f"no artifacts in {opened.uri}; `ldm reproduce demo` makes some")
    stale = narrow("stage", "key", wrapping="why", title=f"{STALE} stale: the same command makes it anew")
    for m in manifests:
        if m.digest in reasons:
            stale.add_row(m.stage, m.key[:KEY_DIGITS], escape(reasons[m.digest]))
    if reasons:
        Console().print("", stale)


def print_status(store: str) -> None:
    """A line per piece of work that was started."""
    opened = Store(store)
    table = narrow(
        "stage",
        "key",
        "progress",
        "images/s",
        "wall s",
        "CPU s",
        wrapping="state",
        title=f"work in {opened.uri}",
    )
    for path in sorted(status_folder(opened).glob("*.json"), key=lambda path: path.stat().st_mtime):
        status = json.loads(path.read_text("utf-8"))
        table.add_row(
            status["stage"],
            status["key"][:KEY_DIGITS],
            f"{status['done']:,} of {status['total']:,}" if status["total"] else "",
            f"{status['images_per_s']:.1f}",
            f"{status['wall_s']:,.0f}",
            f"{status['cpu_s']:,.0f}",
            state_of(status),
        )
    show(table, empty=f"nothing was started in {opened.uri} yet; `ldm reproduce demo` is a beginning")
    print_waiting(opened)


def narrow(*columns: str, wrapping: str, title: str) -> Table:
    """A table that fits 80 characters: only the last column, `wrapping`, breaks its lines."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=0)
    for name in columns:
        table.add_column(name, no_wrap=True, justify="right" if name in NUMBERS else "left")
    table.add_column(wrapping)
    return table


def show(table: Table, *, empty: str) -> None:
    """Print a table, or what to say when it has no rows."""
    Console().print(table if table.row_count else empty, soft_wrap=not table.row_count)


def state_of(status: dict[str, Any]) -> str:
    """The state a status file claims, unless its process is gone."""
    if status["state"] == "running" and not is_alive(status):
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
