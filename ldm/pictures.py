"""Pictures for people: grids of samples, pairs before and after, curves and bars, as PNG.

Images here are uint8 in [0, 255], channels last: N images, H height, W width.
"""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

PAPER = (255, 255, 255)
INK = (40, 40, 40)
LABEL_SIZE_PX = 13
TITLE_SIZE_PX = 15
MARGIN_PX = 6
DOTS_PER_INCH = 110


def png(image: NDArray[np.uint8] | Image.Image, *, text: Mapping[str, str] | None = None) -> bytes:
    """Returns the PNG bytes of one uint8 image, (H, W), (H, W, 1), (H, W, 3) or a Pillow image.

    `text` is written into it, a chunk for each key; picture viewers show it as information on the file.
    """
    if not isinstance(image, Image.Image):
        if image.dtype != np.uint8:
            raise ValueError(
                f"a PNG is made of uint8 values, got {image.dtype}; use ldm.range.to_uint8 first"
            )
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
    chunks = PngInfo()
    for key, value in (text or {}).items():
        chunks.add_itxt(key, value)
    buffer = BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def grid(
    images: NDArray[np.uint8],
    *,
    columns: int,
    scale: int = 1,
    padding: int = 2,
    row_labels: Sequence[str] = (),
    title: str | None = None,
) -> Image.Image:
    """Returns the images in rows of `columns`, in reading order.

    Args:
        images: (N, H, W, 3), at least one.
        columns: images per row.
        scale: whole factor of enlargement; each pixel becomes a square, nothing is smoothed.
        padding: pixels between images and around them.
        row_labels: one text per row, written to its left; empty for none.
        title: a line above the grid.

    Raises:
        ValueError: a wrong shape or type, or another number of labels than of rows.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) == 0:
        raise ValueError(f"a grid takes uint8 (N >= 1, H, W, 3), got {images.dtype} {images.shape}")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1, got {columns} and {scale}")
    num_rows = math.ceil(len(images) / columns)
    if row_labels and len(row_labels) != num_rows:
        raise ValueError(f"row_labels must name each of the {num_rows} rows, got {len(row_labels)}")
    cell_h, cell_w = images.shape[1] * scale, images.shape[2] * scale
    font = ImageFont.load_default(LABEL_SIZE_PX)
    left = math.ceil(max((font.getlength(label) for label in row_labels), default=-MARGIN_PX)) + MARGIN_PX
    top = TITLE_SIZE_PX + MARGIN_PX if title else 0
    size = (left + padding + columns * (cell_w + padding), top + padding + num_rows * (cell_h + padding))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((padding, MARGIN_PX // 2), title, INK, font=ImageFont.load_default(TITLE_SIZE_PX))
    for row, label in enumerate(row_labels):
        middle = top + padding + row * (cell_h + padding) + cell_h // 2
        draw.text((left - MARGIN_PX // 2, middle), label, INK, font=font, anchor="rm")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        cell = Image.fromarray(image.repeat(scale, axis=0).repeat(scale, axis=1))
        sheet.paste(
            cell, (left + padding + column * (cell_w + padding), top + padding + row * (cell_h + padding))
        )
    return sheet


def side_by_side(
    original: NDArray[np.uint8], reconstruction: NDArray[np.uint8], *, columns: int, scale: int = 1
) -> Image.Image:
    """Returns a grid in which every row of originals has its reconstructions directly below.

    Args:
        original: (N, H, W, 3).
        reconstruction: the same shape and order.
        columns: pairs per row; the last rows are filled with white.
        scale: whole factor of enlargement.

    Raises:
        ValueError: the shapes differ.
    """
    if original.shape != reconstruction.shape:
        raise ValueError(
            f"each original needs its reconstruction, got {original.shape} and {reconstruction.shape}"
        )
    num_rows = math.ceil(len(original) / columns)
    missing = num_rows * columns - len(original)
    blank = np.full((missing, *original.shape[1:]), 255, dtype=np.uint8)
    above, below = (np.concatenate([half, blank]) for half in (original, reconstruction))
    rows = np.stack([part.reshape(num_rows, columns, *part.shape[1:]) for part in (above, below)], axis=1)
    labels = ["original", "decoded"] * num_rows
    return grid(rows.reshape(-1, *original.shape[1:]), columns=columns, scale=scale, row_labels=labels)


def curves(
    series: Mapping[str, Sequence[tuple[int, float]]],
    *,
    title: str,
    ylabel: str,
    xlabel: str = "images seen",
    log_y: bool = False,
) -> bytes:
    """Returns a plot as PNG, one line per entry of `series` (label -> points x, y); NaN leaves a gap.

    With `log_y` values that are not positive leave a gap too.
    """
    figure, axes = _axes(title=title, width_inch=8.0, height_inch=4.5)
    for label, points in series.items():
        x = np.array([point[0] for point in points], dtype=np.float64)
        y = np.array([point[1] for point in points], dtype=np.float64)
        y[~np.isfinite(y) | (log_y & (y <= 0))] = np.nan
        axes.plot(x, y, label=label, linewidth=1.6, marker="o" if len(points) < 25 else None, markersize=3.5)
    if log_y and any(value > 0 for points in series.values() for _, value in points):
        axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_formatter(thousands)
    axes.grid(visible=True, which="both", alpha=0.25)
    if series:
        axes.legend(frameon=False)
    return figure_png(figure)


def bars(
    values: Mapping[str, float],
    *,
    title: str,
    xlabel: str,
    floor: float | None = None,
    floor_label: str = "floor",
) -> bytes:
    """Returns a horizontal bar chart as PNG, one bar per label with its number, in the order given.

    Args:
        values: label -> value; a value that is not finite is written without a bar.
        title: line above the chart.
        xlabel: what the values are, with their unit or direction ("FID, lower is better").
        floor: a value to compare with, drawn as a dashed line.
        floor_label: what that line is, for example "two halves of real pictures".
    """
    figure, axes = _axes(title=title, width_inch=8.0, height_inch=1.4 + 0.42 * max(len(values), 1))
    places = np.arange(len(values))
    drawn = [value if math.isfinite(value) else 0.0 for value in values.values()]
    rectangles = axes.barh(places, drawn, height=0.62, color="#4477aa")
    axes.bar_label(rectangles, [f"{value:.4g}" for value in values.values()], padding=4)
    axes.set_yticks(places, list(values))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(xlabel)
    if floor is not None:
        axes.axvline(
            floor, color="#cc3311", linestyle="--", linewidth=1.4, label=f"{floor_label}: {floor:.4g}"
        )
        figure.legend(frameon=False, loc="outside upper right")
    return figure_png(figure)


def thousands(value: float, _position: int) -> str:
    """Label of a tick: 3200 -> "3.2k"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def new_figure(*, width_inch: float, height_inch: float, layout: Literal["constrained"] | None) -> Any:
    """Returns a new figure on matplotlib's Agg canvas; pyplot would keep it in memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inch, height_inch), dpi=DOTS_PER_INCH, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def figure_png(figure: Any) -> bytes:
    """Returns a figure as PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _axes(*, title: str, width_inch: float, height_inch: float) -> tuple[Any, Any]:
    """Returns a new figure and its only axes."""
    figure = new_figure(width_inch=width_inch, height_inch=height_inch, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes
