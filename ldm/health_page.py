"""The page of a first stage's health: one PNG with a panel per idea, what healthy looks like, and verdicts.

Thresholds are those of ldm.training.verdicts; healthy regions are shaded green.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm.pictures import figure_png, new_figure, thousands
from ldm.training import verdicts
from ldm.training.first_stage_loss import MAX_ADAPTIVE_WEIGHT
from ldm.training.loop import GRADIENT, History, images_seen
from ldm.training.validation import LPIPS_DISTANCE, PSNR, RFID
from ldm.training.verdicts import Facts, Verdict, judge

OK_COLOUR, LOOK_COLOUR, QUIET = "#228833", "#cc3311", "#777777"
WIDTH_INCH, HEIGHT_INCH = 15.0, 10.5
MAX_POINTS = 400
LEGEND: dict[str, Any] = {"fontsize": 8, "framealpha": 0.75, "edgecolor": "none"}

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Panel:
    """Where an idea is drawn: its title, what healthy looks like in one line, and how."""

    title: str
    caption: str
    draw: Callable[[Any, History, Facts], None]


def thinned(points: Points) -> np.ndarray:
    """At most MAX_POINTS of the points, evenly chosen with both ends, (n, 2)."""
    values = np.array(points, dtype=np.float64).reshape(-1, 2)
    if len(values) <= MAX_POINTS:
        return values
    return values[np.linspace(0, len(values) - 1, MAX_POINTS).round().astype(int)]


def plot(axes: Any, series: Mapping[str, Points], *, log_y: bool = False, dashed: bool = False) -> None:
    """Draw labelled lines over images seen; those without points are left out."""
    for label, points in series.items():
        values = thinned(points)
        if log_y:
            values = values[values[:, 1] > 0]
        if len(values):
            marker = "o" if len(values) < 12 else None
            style = "--" if dashed else "-"
            axes.plot(
                values[:, 0], values[:, 1], style, label=label, linewidth=1.4, marker=marker, markersize=3
            )
    if axes.lines and log_y:
        axes.set_yscale("log")
        axes.minorticks_off()


def shade(axes: Any, low: float, high: float) -> None:
    """Mark the healthy region of the y axis."""
    axes.axhspan(low, high, color=OK_COLOUR, alpha=0.09, linewidth=0)


def beside(axes: Any, series: Mapping[str, Points], *, ylabel: str, top: float | None = None) -> None:
    """Draw dashed lines on an axis of their own at the right, from 0 to `top` where one is given."""
    if not any(series.values()):
        return
    right = axes.twinx()
    right.set_prop_cycle(color=["#aa3377", "#ee7733"])
    plot(right, series, dashed=True)
    right.set_ylabel(ylabel, fontsize=8)
    right.tick_params(labelsize=8)
    right.spines["top"].set_visible(False)
    if top is not None:
        right.set_ylim(0, top)


def draw_losses(axes: Any, history: History, facts: Facts) -> None:
    """Loss, L1 and LPIPS of the training batches."""
    del facts
    plot(axes, {name: history.get(name, []) for name in ("loss", "l1", "lpips", "discriminator")}, log_y=True)


def draw_gradients(axes: Any, history: History, facts: Facts) -> None:
    """Norm of each term's gradient."""
    del facts
    terms = sorted(
        name for name in history if name.startswith(GRADIENT)
    )  # a resumed history has its own order
    series = {name.removeprefix(GRADIENT): history[name] for name in terms}
    plot(axes, series, log_y=True)


def draw_weight(axes: Any, history: History, facts: Facts) -> None:
    """The adaptive weight below its limit."""
    del facts
    points = history.get("adaptive_weight", [])
    plot(axes, {"adaptive weight": points}, log_y=True)
    if points:
        axes.axhline(MAX_ADAPTIVE_WEIGHT, color=LOOK_COLOUR, linestyle="--", linewidth=1.2, label="limit")


def draw_discriminator(axes: Any, history: History, facts: Facts) -> None:
    """Margin of the logits, and the share of patches told apart."""
    del facts
    points = history.get("watch/discriminator_margin", [])
    plot(axes, {"margin (left)": points})
    if points:
        shade(axes, *verdicts.MARGIN)
    accuracy = {f"{side} (right)": history.get(f"watch/accuracy_{side}", []) for side in ("real", "fake")}
    beside(axes, accuracy, ylabel="share of patches told apart", top=1.03)


def draw_codes(axes: Any, history: History, facts: Facts) -> None:
    """Usage and perplexity of the codebook."""
    usage = history.get("code_usage", [])
    plot(axes, {"usage (left)": usage})
    if usage:
        axes.set_ylim(0, 1.03)
        shade(axes, verdicts.MIN_CODE_USAGE, 1.0)
    most = min(facts.num_codes, facts.positions_per_batch)
    points = history.get("code_perplexity", [])
    beside(axes, {f"perplexity (right), at most {most}": points}, ylabel="codes")


def draw_kl(axes: Any, history: History, facts: Facts) -> None:
    """KL of a picture's posterior."""
    plot(axes, {"KL per picture, nats": verdicts.per_picture_kl(history, facts)}, log_y=True)
    shade(axes, *(bound * facts.values_per_latent for bound in verdicts.KL_PER_VALUE))


def draw_held_out(axes: Any, history: History, facts: Facts) -> None:
    """PSNR, LPIPS and rFID of held-out pictures."""
    plot(axes, {"PSNR, dB (left)": history.get(PSNR, [])})
    if facts.judged_after > 0 and history.get(PSNR):
        axes.axvline(facts.judged_after, color=QUIET, linestyle=":", linewidth=1.0, label="all terms on")
    right = {"LPIPS (right)": history.get(LPIPS_DISTANCE, [])}
    if history.get(RFID):
        right = {"rFID (right)": history[RFID]}
    beside(axes, right, ylabel="lower is better")


def deviations_panel(deviations: Sequence[float]) -> Panel:
    """Bars of each channel's deviation."""

    def draw(axes: Any, history: History, facts: Facts) -> None:
        del history, facts
        axes.bar(np.arange(len(deviations)), deviations, width=0.7, color="#4477aa")
        axes.xaxis.get_major_locator().set_params(integer=True)
        largest = max(deviations)
        shade(axes, verdicts.MIN_STD_SHARE * largest, largest)
        axes.set_xlabel("channel of the latent (held-out pictures, averaged weights)", fontsize=8)

    caption = "healthy: no channel below a tenth of the largest; a dead one is wasted"
    return Panel("latents", caption, draw)


def panels(facts: Facts, deviations: Sequence[float]) -> list[Panel]:
    """The panels of a page, in reading order."""
    latent = Panel("codes", "healthy: usage above half, perplexity rises; dead codes are wasted", draw_codes)
    if not facts.num_codes:
        latent = Panel("KL", "healthy: inside; below, the latent is empty, above, it is a point", draw_kl)
    return [
        Panel(
            "losses",
            "healthy: fall, then flatten; steps where LPIPS or the discriminator join in",
            draw_losses,
        ),
        Panel("gradients", "healthy: every term has one; none a thousandth of the others", draw_gradients),
        Panel("adaptive weight", "healthy: well below the limit, without jumps of decades", draw_weight),
        Panel("discriminator", "healthy: margin small and positive, accuracy below 0.95", draw_discriminator),
        latent,
        deviations_panel(deviations),
        Panel("held-out", "healthy: better, then flat; dotted: all loss terms have joined in", draw_held_out),
    ]


def draw_panel(axes: Any, panel: Panel, verdict: Verdict | None, history: History, facts: Facts) -> None:
    """One panel with its title, verdict and caption."""
    word, colour = (verdict.word, OK_COLOUR if verdict.ok else LOOK_COLOUR) if verdict else ("no data", QUIET)
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", pad=18)
    axes.set_title(word, loc="right", fontsize=11, fontweight="bold", color=colour, pad=18)
    axes.text(0, 1.025, panel.caption, transform=axes.transAxes, fontsize=8, color=QUIET)
    axes.tick_params(labelsize=8)
    axes.spines["top"].set_visible(False)
    if panel.title != "latents":
        axes.xaxis.set_major_formatter(thousands)
    panel.draw(axes, history, facts)
    axes.grid(visible=True, alpha=0.25)
    if verdict is None:
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", color=QUIET)
    front = axes.figure.axes[-1]  # the axis at the right, where there is one
    lines = [*axes.lines, *(front.lines if front is not axes else [])]
    if lines:
        front.legend(lines, [line.get_label() for line in lines], **LEGEND)


def write_verdicts(axes: Any, found: Sequence[Verdict], *, images: int) -> None:
    """The verdicts in words, after so many images seen."""
    axes.set_axis_off()
    num_look = sum(not verdict.ok for verdict in found)
    state = f"{num_look} of {len(found)} want a look" if num_look else "ok"
    title = f"First-stage health after {images:,} images: {state}"
    axes.text(0, 1.0, title, fontsize=16, fontweight="bold", va="top", transform=axes.transAxes)
    for row, verdict in enumerate(found):
        y = 0.84 - 0.105 * row
        colour = OK_COLOUR if verdict.ok else LOOK_COLOUR
        at = {"va": "top", "transform": axes.transAxes, "fontsize": 10}
        axes.text(0.0, y, verdict.word, color=colour, fontweight="bold", **at)
        axes.text(0.05, y, verdict.panel, **at)
        axes.text(0.19, y, verdict.words, **at)


def health_page(history: History, facts: Facts, *, deviations: Sequence[float]) -> bytes:
    """The page as PNG, readable in a minute.

    Args:
        history: every logged metric.
        facts: what they are judged by.
        deviations: of each channel of the latent, over held-out pictures.
    """
    found = judge(history, facts)
    by_panel = {verdict.panel: verdict for verdict in found}
    figure = new_figure(width_inch=WIDTH_INCH, height_inch=HEIGHT_INCH, layout=None)
    cells = figure.add_gridspec(3, 3, left=0.045, right=0.955, bottom=0.05, top=0.95, wspace=0.3, hspace=0.42)
    write_verdicts(figure.add_subplot(cells[0, :2]), found, images=images_seen(history))
    for number, panel in enumerate(panels(facts, deviations), start=2):
        axes = figure.add_subplot(cells[number // 3, number % 3])
        draw_panel(axes, panel, by_panel.get(panel.title), history, facts)
    return figure_png(figure)
