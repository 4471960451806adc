"""What the Prefect UI shows of an artifact: a short page with its numbers and where it comes from."""

import json
from typing import Any

from prefect.artifacts import create_markdown_artifact
from prefect.context import get_run_context
from prefect.exceptions import MissingContextError

from datasets.manifest import Manifest
from flows.scores import ROWS

SHOWN = ("health", "last", "outcomes", "num_train", "num_held_out", "num_parameters", "scale", "warning")


def publish(manifest: Manifest, uri: str, *, reused: bool) -> None:
    """Attach a page to the current flow run; nothing outside of one."""
    try:
        get_run_context()
    except MissingContextError:
        return
    create_markdown_artifact(
        key=manifest.stage,
        markdown=page(manifest, uri, reused=reused),
        description=f"artifact {manifest.short}",
    )


def page(manifest: Manifest, uri: str, *, reused: bool) -> str:
    """The page as Markdown."""
    provenance = manifest.provenance
    made = "reused; made" if reused else "made"
    lines = [
        f"# {manifest.stage} `{manifest.short}`",
        "",
        f"{made} by MLflow run `{provenance.get('mlflow_run')}` in {provenance.get('wall_s', 0):,} s "
        f"({provenance.get('cpu_s', 0):,} CPU s), {manifest.num_bytes / 1e6:.1f} MB at `{uri}`",
        "",
        "| what | value |",
        "| --- | --- |",
        f"| content digest | `{manifest.digest}` |",
        *(f"| made of {role} | {p.stage} `{p.key[:12]}` |" for role, p in manifest.content.parents.items()),
        *(f"| {name} | {value} |" for name, value in score_rows(manifest.content.statistics)),
        *(f"| {name} | {value} |" for name, value in numbers(manifest.content.statistics)),
    ]
    return "\n".join(lines)


def score_rows(statistics: dict[str, Any]) -> list[tuple[str, str]]:
    """The scores as the summary shows them, and how many pictures are behind them."""
    scores = statistics.get("scores", {})
    rows = [(label, f"{scores[name]:.4g} ({note})") for label, name, note in ROWS if name in scores]
    return [*rows, ("pictures in every set", str(scores["num_images"]))] if scores else []


def numbers(statistics: dict[str, Any]) -> list[tuple[str, str]]:
    """The statistics worth a row."""
    rows = []
    for name in SHOWN:
        value = statistics.get(name)
        if isinstance(value, dict):
            rows += [
                (key, f"{inner:.5g}" if isinstance(inner, float) else str(inner))
                for key, inner in value.items()
            ]
        elif value is not None:
            rows.append((name, value if isinstance(value, str) else json.dumps(value)))
    return rows
