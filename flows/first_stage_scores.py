"""Scores of first stages side by side: the rows, a table of them, and curves over f (as paper Tab. 8)."""

from collections.abc import Sequence
from typing import Any

from datasets.manifest import Manifest
from datasets.store import Store
from flows.produce import Receipt
from ldm.pictures import curves

COLUMNS = {
    "rFID": "rfid_same_pictures",
    "PSNR dB": "psnr_db",
    "SSIM": "ssim",
    "LPIPS": "lpips",
    "bicubic rFID": "bicubic_rfid_same_pictures",
    "bicubic PSNR dB": "bicubic_psnr_db",
}
HEADINGS = ("first stage", "kind", "f", "n", *COLUMNS)
KINDS = {"vq": "VQ", "kl": "KL", "identity": "identity"}


def scored(store: Store, receipts: Sequence[Receipt]) -> list[Manifest]:
    """The scores of first stages among what a run has made or reused."""
    found = [store.find(r.stage, r.key) for r in receipts if r.stage == "evaluate-first-stage"]
    return [manifest for manifest in found if manifest is not None]


def rows_of(manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    """Name, kind, f and scores of every scored first stage, in order of f."""
    rows = []
    for manifest in manifests:
        recipe = manifest.provenance["recipe"]["first_stage"]
        factor = 2 ** (len(recipe["model"]["channel_mult"]) - 1)
        about = {"name": recipe["name"], "kind": recipe["model"]["kind"], "f": factor}
        rows.append(about | manifest.content.statistics["scores"])
    return sorted(rows, key=lambda row: (row["f"], row["kind"], row["name"]))


def cells(row: dict[str, Any]) -> list[str]:
    """One row as text; a score that does not exist, such as the PSNR of the identity, is a dash."""
    scores = [f"{row[key]:.4g}" if key in row else "-" for key in COLUMNS.values()]
    return [row["name"], KINDS[row["kind"]], str(row["f"]), str(row["num_images"]), *scores]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|" + " --- |" * len(HEADINGS)]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """Curves of rFID and PSNR over f, a line per kind and one for bicubic scaling, as PNG."""
    wanted = {"rfid_over_f": ("rFID", "rfid_same_pictures"), "psnr_over_f": ("PSNR in dB", "psnr_db")}
    return {
        name: curves(
            lines_over_f(rows, key),
            title=f"{label} of first stages, n = {rows[0]['num_images']}",
            ylabel=label,
            xlabel="downsampling factor f",
        )
        for name, (label, key) in wanted.items()
    }


def lines_over_f(rows: Sequence[dict[str, Any]], key: str) -> dict[str, list[tuple[int, float]]]:
    """Points (f, score) of every kind, and of bicubic scaling, by f."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        found = {KINDS[row["kind"]]: row.get(key), "bicubic": row.get(f"bicubic_{key}")}
        for line, score in found.items():
            if score is not None and (row["f"], score) not in lines.get(line, []):
                lines.setdefault(line, []).append((row["f"], score))
    return {line: sorted(points) for line, points in lines.items()}
