"""Charts with one row per label: marks with their intervals, side by side in panels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from camtrain.reporting.evaluation_svg import COLOURS, PIXELS, fitted, text_width

Point = tuple[float, float | None, float | None]  # mean, low, high

_SIZE: Final = 11.0
_SMALL: Final = 10.0
_GUTTER: Final = 230.0  # widest column of label names
_GAP: Final = 22.0
_LINE: Final = 18.0
_MANY: Final = 24  # rows from which on the axis is repeated above


@dataclass(frozen=True, slots=True)
class Marks:
    """One series of a panel.

    Attributes:
        name: For the legend.
        colour: Name in `COLOURS`.
        marker: Of matplotlib.
        points: Row -> mean and interval.
        ticks: Row -> a short upright line, e.g. the chance level.
        hollow: Draw open symbols.
    """

    name: str
    colour: str
    marker: str
    points: Mapping[str, Point]
    ticks: Mapping[str, float] = field(default_factory=dict)
    hollow: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One column of the chart.

    Attributes:
        title: Above it.
        marks: Series.
        limits: Ends of the axis; None = what the data need.
        reference: Where an upright line is drawn.
        beside: Row -> text to the right, e.g. a p-value.
        dodge: Give each series a height of its own within a row.
    """

    title: str
    marks: Sequence[Marks]
    limits: tuple[float, float] | None = None
    reference: float | None = None
    beside: Mapping[str, str] = field(default_factory=dict)
    dodge: bool = True


def forest_figure(rows: Sequence[str], panels: Sequence[Panel]) -> Figure:
    """A row per label, a panel per measure.

    Args:
        rows: Labels from top to bottom; long ones are shortened, their tooltip is not.
        panels: Columns.

    Returns:
        A figure as high as the rows need.

    Example:
        >>> marks = Marks("gradcam", "s0", "o", {"nodule": (0.7, 0.6, 0.8)})
        >>> figure = forest_figure(["nodule"], [Panel("OrganIoU", [marks], (0.0, 1.0))])
        >>> [text.get_text() for text in figure.texts]
        ['OrganIoU']
    """
    gutter = min(_GUTTER, max(text_width(row, _SIZE) for row in rows) + 6) + 10
    width = 300.0 if len(panels) == 1 else 240.0 if len(panels) == 2 else 195.0
    sides = [58.0 if panel.beside else 0.0 for panel in panels]
    whole = gutter + sum(sides) + len(panels) * (width + _GAP)
    legend = legend_lines([mark for panel in panels for mark in panel.marks], whole)
    series = max((len(panel.marks) if panel.dodge else 1) for panel in panels)
    body = len(rows) * max(16.0, 6.5 * series + 7.0)
    top = _LINE * len(legend) + _LINE + (16.0 if len(rows) >= _MANY else 4.0)
    height = top + body + 24.0
    figure = empty_figure(whole, height)
    draw_legend(figure, legend, whole, height)
    _names(figure, rows, (0.0, 24.0 / height, 1.0, body / height), (gutter - 8) / whole)
    left = gutter
    for panel, side in zip(panels, sides, strict=True):
        axes = bare_axes(figure, (left / whole, 24.0 / height, width / whole, body / height))
        _draw_panel(axes, rows, panel, width)
        figure.text(left / whole, 1 - (top - 16 * (len(rows) >= _MANY) - 8) / height, panel.title, **words("bold"))
        left += width + side + _GAP
    return figure


def empty_figure(width: float, height: float) -> Figure:
    """A figure of that size in pixels, without ground, whose parts stay where they are put."""
    figure = Figure(figsize=(width / PIXELS, height / PIXELS), dpi=PIXELS, facecolor="none")
    figure.set_layout_engine("none")
    return figure


def words(weight: str = "normal", colour: str = "ink", size: float = _SIZE) -> dict[str, Any]:
    """How all text of the charts is drawn, whatever the user's settings say."""
    return {"color": COLOURS[colour], "fontsize": size, "fontweight": weight, "parse_math": False, "usetex": False}


def _names(figure: Figure, rows: Sequence[str], place: tuple[float, float, float, float], right: float) -> None:
    """Names at the left, and a pale band behind every other row."""
    axes = bare_axes(figure, place)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for index, row in enumerate(rows):
        if index % 2:
            axes.axhspan(index - 0.5, index + 0.5, facecolor=COLOURS["band"], edgecolor="none", linewidth=0)
        text = fitted(row, _SIZE, _GUTTER)
        gid = row if text != row else None
        axes.text(right, index, text, ha="right", va="center", gid=gid, clip_on=False, **words())


def bare_axes(figure: Figure, place: tuple[float, float, float, float]) -> Axes:
    """Axes without frame, ticks and ground."""
    axes = figure.add_axes(place)
    axes.set_axis_off()
    return axes


def draw_grid(axes: Axes, ticks: Sequence[float], limits: tuple[float, float], above: bool = False) -> None:
    """Upright grid lines with their values below, and above where the chart is long.

    matplotlib's own ticks are not used: they follow the user's settings, and take a third of the time.
    """
    axes.set_xlim(*limits)
    height, place = float(axes.bbox.height), axes.get_xaxis_transform()
    x = [v for tick in ticks for v in (tick, tick, np.nan)]
    y = [0.0, 1.0, np.nan] * len(ticks)
    axes.plot(x, y, "-", color=COLOURS["grid"], linewidth=1, marker="none", zorder=0.5, transform=place)
    for tick in ticks:
        for high in (-14 / height, *((1 + 5 / height,) if above else ())):
            axes.text(tick, high, axis_number(tick), transform=place, ha="center", **words(colour="faint", size=_SMALL))


def axis_number(tick: float) -> str:
    """A tick's value.

    Example:
        >>> axis_number(-0.5)
        '−0.5'
    """
    return f"{tick:g}".replace("-", "−")


def _draw_panel(axes: Axes, rows: Sequence[str], panel: Panel, width: float) -> None:
    limits = panel.limits or needed_limits(panel)
    draw_grid(axes, round_ticks(*limits), limits, above=len(rows) >= _MANY)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    if panel.reference is not None:
        axes.axvline(panel.reference, color=COLOURS["faint"], linewidth=1, linestyle=(0, (3, 2)), marker="none")
    step = 0.72 / len(panel.marks) if panel.dodge else 0.0
    for index, marks in enumerate(panel.marks):
        _draw_marks(axes, rows, marks, (index - (len(panel.marks) - 1) / 2) * step, max(step, 0.5) / 2)
    for index, row in enumerate(rows):
        if not any(row in marks.points for marks in panel.marks):
            x = limits[0] + 4 / width * (limits[1] - limits[0])
            axes.text(x, index, "–", va="center", **words(colour="faint"))
        if row in panel.beside:
            x = limits[1] + 8 / width * (limits[1] - limits[0])
            axes.text(x, index, panel.beside[row], va="center", **words(colour="faint", size=_SMALL))


def round_ticks(low: float, high: float) -> list[float]:
    """At most six round numbers within the limits, evenly spaced.

    Example:
        >>> round_ticks(-0.02, 1.02), round_ticks(-0.07, 0.13)
        ([0.0, 0.25, 0.5, 0.75, 1.0], [-0.05, 0.0, 0.05, 0.1])
    """
    size = 10.0 ** math.floor(math.log10(high - low))
    steps = (size * factor for factor in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 2.5))
    step = next(step for step in steps if (high - low) / step <= 5)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [float(f"{(first + n) * step:.10g}") + 0.0 for n in range(count)]


def _draw_marks(axes: Axes, rows: Sequence[str], marks: Marks, shift: float, half: float) -> None:
    at = [(index + shift, marks.points[row]) for index, row in enumerate(rows) if row in marks.points]
    colour = COLOURS[marks.colour]
    # All intervals are one line with gaps: one element of the page, not one per label.
    x = [v for _, (_, low, high) in at if low is not None and high is not None for v in (low, high, np.nan)]
    y = [v for h, (_, low, high) in at if low is not None and high is not None for v in (h, h, np.nan)]
    axes.plot(x, y, "-", color=colour, linewidth=1.6, marker="none", solid_capstyle="butt")
    face = "none" if marks.hollow else colour
    symbol: dict[str, Any] = {
        "marker": marks.marker,
        "markersize": 5.0,
        "markerfacecolor": face,
        "markeredgecolor": colour,
    }
    axes.plot([p[0] for _, p in at], [h for h, _ in at], linestyle="none", markeredgewidth=1.2, **symbol)
    ticks = [(index + shift, marks.ticks[row]) for index, row in enumerate(rows) if row in marks.ticks]
    x = [v for _, t in ticks for v in (t, t, np.nan)]
    y = [v for h, _ in ticks for v in (h - half, h + half, np.nan)]
    axes.plot(x, y, "-", color=COLOURS["ink"], linewidth=1.4, marker="none")


def needed_limits(panel: Panel) -> tuple[float, float]:
    """Limits with room for every mark, interval and the reference.

    Example:
        >>> needed_limits(Panel("AUROC", [Marks("", "ink", "o", {"nodule": (0.5, 0.0, 1.0)})]))
        (-0.06, 1.06)
    """
    values = [v for marks in panel.marks for p in marks.points.values() for v in p if v is not None]
    values += [] if panel.reference is None else [panel.reference]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    return low - room, high + room


Legend = list[list[tuple[float, Marks]]]


def legend_lines(marks: Sequence[Marks], width: float) -> Legend:
    """Entries of a legend with their position from the left, wrapped to a width; a name appears once.

    Example:
        >>> both = [Marks(name, "s0", "o", {}) for name in ("gradcam", "hirescam", "gradcam")]
        >>> [[mark.name for _, mark in line] for line in legend_lines(both, 1000.0)]
        [['gradcam', 'hirescam']]
    """
    lines: Legend = []
    left = width
    named: dict[str, Marks] = {}
    for mark in marks:
        named.setdefault(mark.name, mark)
    for mark in (mark for name, mark in named.items() if name):
        need = 34 + text_width(mark.name, _SIZE)
        if left + need > width or not lines:
            lines.append([])
            left = 0.0
        lines[-1].append((left, mark))
        left += need
    return lines


def draw_legend(figure: Figure, legend: Legend, width: float, height: float) -> None:
    """The legend at the top left of a figure of that size in pixels."""
    if not legend:
        return
    high = _LINE * len(legend)
    axes = bare_axes(figure, (0.0, 1 - high / height, 1.0, high / height))
    axes.set_xlim(0, width)
    axes.set_ylim(len(legend) - 0.5, -0.5)
    for index, line in enumerate(legend):
        for left, mark in line:
            colour = COLOURS[mark.colour]
            face = "none" if mark.hollow else colour
            axes.plot([left + 1, left + 15], [index, index], "-", color=colour, linewidth=1.6, marker="none")
            symbol: dict[str, Any] = {
                "marker": mark.marker,
                "markersize": 5.0,
                "markerfacecolor": face,
                "markeredgecolor": colour,
            }
            axes.plot([left + 8], [index], linestyle="none", markeredgewidth=1.2, **symbol)
            axes.text(left + 20, index, mark.name, va="center", **words())
