"""Sends pictures through a first stage and back, scores them and shows them."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from datasets.curate import Outcome, curate, read_rgb
from datasets.errors import MissingDataError
from datasets.folder import find_pictures
from datasets.samples import decode_png
from flows.export import find_exportable
from ldm.config import Device, require_divisible
from ldm.device import full_float32, resolve
from ldm.errors import ContractError
from ldm.evaluation.roundtrip import RoundTrip, fitting, round_trip, sheet
from ldm.model_folder import autoencoder_of
from ldm.models.lpips import build_lpips
from ldm.pictures import png

COLUMNS = {"PSNR, dB": "psnr_db", "SSIM": "ssim", "LPIPS": "lpips"}


@full_float32()
def reconstruct_to_file(
    store: str,
    model: str,
    places: Sequence[Path],
    output: Path,
    *,
    size_px: int | None,
    crop: bool,
    memory_gib: float | None,
    device: Device = "auto",
) -> None:
    """Print a table of scores, a row per picture and the means, and write a sheet of pictures.

    Raises:
        ContractError: a size that the first stage does not take, a budget of memory that is too small,
            options that exclude each other, or an output that cannot be written.
        MissingDataError: a place that does not exist, or no picture that can be used.
        ModelNotFoundError: there is no such model.
        CheckpointError: a model folder is damaged.
        RecipeError: a device that is not there.
    """
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ContractError(
            f"{output} must be a file in a folder that exists; make it, or name another with --output"
        )
    if size_px is not None and crop:
        raise ContractError(f"--size {size_px} cuts a square already, and --crop was given; leave one out")
    where = resolve(device)
    files = find_pictures(places)
    autoencoder = autoencoder_of(find_exportable(store, model)).to(where)
    factor = autoencoder.config.factor
    if size_px is not None:
        require_divisible("--size", size_px, factor, "f of this first stage", error=ContractError)
    lpips = build_lpips().to(where)
    trips: dict[Path, RoundTrip] = {}
    refused: dict[Path, Outcome] = {}
    for file in track(files, f"reconstructing {len(files)} pictures", transient=True):
        picture = read_picture(file, size_px)
        if isinstance(picture, Outcome):
            refused[file] = picture
            continue
        fit = fitting(picture, factor, name=str(file), crop=crop)
        trips[file] = round_trip(autoencoder, fit, lpips, memory_gib=memory_gib)
    if not trips:
        said = ", ".join(f"{file}: {outcome}" for file, outcome in list(refused.items())[:3])
        raise MissingDataError(f"at least one picture must be usable, got {said}; name other pictures")
    output.write_bytes(png(sheet(list(trips.values()))))
    console = Console()
    console.print(table_of(trips, refused))
    console.print(f"{output}: {len(trips)} pictures through {model} and back")


def read_picture(file: Path, size_px: int | None) -> np.ndarray | Outcome:
    """A picture at its own size, or cut and shrunk to a square, (H, W, 3) uint8; or why there is none."""
    try:
        data = file.read_bytes()
    except OSError:
        return Outcome.UNREADABLE
    if size_px is None:
        return read_rgb(data)
    curated = curate(data, size_px=size_px, crop="centre")
    return curated if isinstance(curated, Outcome) else decode_png(curated)


def table_of(trips: dict[Path, RoundTrip], refused: dict[Path, Outcome]) -> Table:
    """A row per picture, the refused ones with their reason, and the means."""
    table = Table("picture", "pixels", *COLUMNS, show_footer=True)
    for file, trip in trips.items():
        height, width = trip.original.shape[:2]
        values = [f"{trip.scores[score]:.4g}" for score in COLUMNS.values()]
        table.add_row(file.name, f"{width}x{height}", *values)
    for file, outcome in refused.items():
        table.add_row(file.name, f"refused: {outcome}")
    table.columns[0].footer = "mean"
    for column, score in zip(table.columns[2:], COLUMNS.values(), strict=True):
        mean = math.fsum(trip.scores[score] for trip in trips.values()) / len(trips)
        column.justify, column.footer = "right", f"{mean:.4g}"
    return table
