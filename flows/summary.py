"""What a person reads at the end of a run: what was made, what it cost, the scores, and where to look."""

import json
import os
from collections.abc import Sequence

import psutil
from rich.console import Console
from rich.table import Table

from flows.first_stage_scores import HEADINGS, cells, rows_of, scored
from flows.produce import Receipt
from flows.progress import cpu_seconds
from flows.request import Request
from flows.scores import ROWS
from ldm.tracking import tracking_uri


def total_cpu_seconds() -> float:
    """CPU time of this process, its finished children, and those still alive such as Prefect's server."""
    alive = 0.0
    for child in psutil.Process(os.getpid()).children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:
            continue
        alive += times.user + times.system
    return cpu_seconds() + alive


def print_summary(request: Request, receipts: Sequence[Receipt]) -> None:
    """Print what was made and what to look at."""
    console = Console()
    table = Table(title=f"{request.recipe.name}: {request.recipe.description}", title_justify="left")
    for column in ("stage", "artifact", "state", "wall s", "CPU s", "MB"):
        table.add_column(column, justify="left" if column in {"stage", "artifact", "state"} else "right")
    for r in receipts:
        state = "reused" if r.reused else "made"
        table.add_row(
            r.stage, r.key[:12], state, f"{r.wall_s:,.0f}", f"{r.cpu_s:,.0f}", f"{r.bytes / 1e6:,.1f}"
        )
    console.print(table)
    console.print(f"CPU time of this run, servers included: {total_cpu_seconds():,.0f} s")
    print_scores(console, request, receipts)
    print_first_stages(console, request, receipts)
    print_pointers(console, request, receipts)


def print_scores(console: Console, request: Request, receipts: Sequence[Receipt]) -> None:
    """The scores, when the run has any."""
    manifest = request.find("evaluate") if any(r.stage == "evaluate" for r in receipts) else None
    if manifest is None:
        return
    document = json.loads(request.store.read(manifest, "scores.json"))
    scores = document["scores"]
    table = Table(title=f"scores, n = {scores['num_images']} pictures in every set", title_justify="left")
    table.add_column("score")
    table.add_column("value", justify="right")
    table.add_column("")
    for label, name, note in ROWS:
        if name in scores:
            table.add_row(label, f"{scores[name]:.4g}", note)
    console.print(table)
    if "warning" in document:
        console.print(f"[yellow]{document['warning']}[/yellow]")


def print_first_stages(console: Console, request: Request, receipts: Sequence[Receipt]) -> None:
    """The scores of first stages, side by side, when the run has any."""
    rows = rows_of(scored(request.store, receipts))
    if not rows:
        return
    table = Table(title="first stages on held-out pictures", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)


def print_pointers(console: Console, request: Request, receipts: Sequence[Receipt]) -> None:
    """Where to look next."""
    store, recipe = request.store, request.recipe
    manifest = request.find("evaluate") if any(r.stage == "evaluate" for r in receipts) else None
    console.print("[bold]Look at[/bold]")
    if manifest is not None and store.is_local:
        folder = store.uri_of(manifest)
        for name in ("samples.png", "reconstructions.png", "fid.png"):
            console.print(f"  {folder}/{manifest.file(name).path}", soft_wrap=True)
    uri = tracking_uri(store.local_root)
    console.print(
        f"  mlflow ui --backend-store-uri {uri}    curves, pictures over training, models, lineage",
        soft_wrap=True,
    )
    if any(r.stage in {"train-ldm", "evaluate"} for r in receipts):
        option = "" if store.uri.rstrip("/").endswith("/artifacts") else f" --store {store.uri}"
        console.print(f"  ldm sample ldm-{recipe.name}{option}    draw more samples", soft_wrap=True)
    if recipe.dataset.attribution:
        console.print(f"Pictures: {recipe.dataset.attribution}")
