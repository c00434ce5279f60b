"""The charts of an evaluation: plain rows in, matplotlib figures with their words out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from matplotlib.figure import Figure

from camtrain.reporting.evaluation_forest import (
    Marks,
    Panel,
    Point,
    axis_number,
    bare_axes,
    draw_grid,
    draw_legend,
    empty_figure,
    forest_figure,
    legend_lines,
    needed_limits,
    words,
)
from camtrain.reporting.evaluation_numbers import number, p_value
from camtrain.reporting.evaluation_rows import ComparisonRow, Curve, SanityRow, ScoreRow, is_average
from camtrain.reporting.evaluation_scores import FREE, Scores, Series, average_name, series_name, title_of, unique
from camtrain.reporting.evaluation_svg import COLOURS

_SERIES: Final = ("s0", "s1", "s2", "s3", "s4", "s5")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
_FOREST: Final = (
    "organ_iou",
    "energy_inside",
    "auroc",
    "pointing_game",
    "relevance_rank",
    "mask_iou",
    "class_sensitivity",
    "average_drop",
)
_COMPARED: Final = ("auroc", "organ_iou", "energy_inside", "shortcut_reliance", "outside_effect", *_FOREST[3:])
_UNIT: Final = frozenset(
    {"auroc", "organ_iou", "energy_inside", "pointing_game", "relevance_rank", "mask_iou", "shortcut_reliance"}
)
_PANELS: Final = 4
_ALPHA: Final = 0.05


@dataclass(frozen=True, slots=True)
class Plot:
    """A chart and what it says.

    Attributes:
        figure: To be drawn.
        title: Heading, also the name for screen readers.
        description: What is to be seen, for screen readers.
        caption: How to read it.
    """

    figure: Figure
    title: str
    description: str
    caption: str


def appearance(methods: Sequence[str], method: str) -> tuple[str, str]:
    """Colour name and marker of a method, the same in every chart.

    Example:
        >>> appearance(["gradcam", "hirescam"], "hirescam")
        ('s1', 's')
    """
    index = methods.index(method) if method in methods else 0
    return _SERIES[index % len(_SERIES)], _MARKERS[index % len(_MARKERS)]


def _points(rows: Sequence[ScoreRow]) -> dict[str, Point]:
    return {row.label: (row.mean, row.low, row.high) for row in rows if row.mean is not None}


def _limits(measure: str) -> tuple[float, float] | None:
    return (-0.02, 1.02) if measure.partition("/")[0] in _UNIT else None


def _listed(rows: Sequence[ScoreRow]) -> str:
    """Worst and best label in words."""
    if not rows:
        return "no label is defined"
    if len(rows) == 1:
        return f"{rows[0].label} {number(rows[0].mean)}"
    return f"from {number(rows[0].mean)} for {rows[0].label} to {number(rows[-1].mean)} for {rows[-1].label}"


def forest_plot(scores: Scores, split: str, layer: str, methods: Sequence[str]) -> Plot | None:
    """Means and intervals per label for the leading measures of one layer, a mark per method.

    Args:
        scores: All rows.
        split: Split.
        layer: Layer.
        methods: All methods of the page, which fixes their colours.

    Returns:
        None where no label has any of the measures.

    Example:
        >>> row = ScoreRow("test", "cam", "l4", "nodule", "organ_iou", 34, 0.21, 0.15, 0.28)
        >>> forest_plot(Scores((row,), {}), "test", "l4", ["cam"]).title
        'Scores per label at l4'
    """
    series = [s for s in scores.series(split) if s[1] == layer]
    panels = [p for m in _FOREST if (p := _forest_panel(scores, split, series, m, methods))][:_PANELS]
    if not panels:
        return None
    leading = next((m for m in _FOREST if any(scores.by_label(split, s, m) for s in series)), "auroc")
    first = next((s for s in series if scores.by_label(split, s, leading)), FREE)
    worst = scores.worst(split, first, leading)
    rows = _in_order(scores.labels(split), [row.label for row in worst])
    said = f"{title_of(leading)} of {series_name(first)} for {len(rows)} labels: {_listed(worst)}."
    caption = (
        f"Mark: mean; line: interval. Labels in the order of {title_of(leading)} of {series_name(first)}, "
        "worst at the top. Upright strokes: chance level of energy inside. A dash: no value."
    )
    return Plot(forest_figure(rows, panels), f"Scores per label at {layer or 'no layer'}", said, caption)


def _forest_panel(
    scores: Scores, split: str, series: Sequence[Series], measure: str, methods: Sequence[str]
) -> Panel | None:
    marks = []
    for one in [*series, FREE]:
        points = _points(scores.by_label(split, one, measure))
        if not points:
            continue
        colour, marker = appearance(methods, one[0]) if one != FREE else ("ink", "o")
        chances = {label: scores.chance(split, one, label) for label in points} if measure == "energy_inside" else {}
        ticks = {label: row.mean for label, row in chances.items() if row is not None and row.mean is not None}
        marks.append(Marks(one[0], colour, marker, points, ticks))
    reference = 0.5 if measure == "auroc" else None
    return Panel(title_of(measure), marks, _limits(measure), reference) if marks else None


def _in_order(labels: Sequence[str], first: Sequence[str]) -> list[str]:
    """Labels with a place first, the others behind in their own order."""
    return list(dict.fromkeys([*first, *labels]))


def shortcut_plot(scores: Scores, split: str) -> Plot | None:
    """Effect of replacing what lies outside and inside the organs per label, and the share of the former.

    Example:
        >>> row = ScoreRow("test", "", "", "nodule", "shortcut_reliance/air", 30, 0.7, 0.6, 0.8)
        >>> shortcut_plot(Scores((row,), {}), "test").title
        'Shortcut reliance per label'
    """
    names = scores.replacements(split)
    panels = _same_limits([_effects(scores, split, name) for name in names])
    shares = []
    for index, name in enumerate(names):
        points = _points(scores.by_label(split, FREE, f"shortcut_reliance/{name}"))
        shares.append(Marks(f"share, {name}", _SERIES[2 + index % 4], _MARKERS[2 + index % 5], points))
    panels = [p for p in panels if p.marks] + [Panel("Share of the outside", shares, (-0.02, 1.02), 0.5)]
    highest = {
        label: max(m.points[label][0] for m in shares if label in m.points) for m in shares for label in m.points
    }
    if not highest and len(panels) == 1:
        return None
    ordered = sorted(highest, key=lambda label: -highest[label])
    rows = _in_order(scores.labels(split), ordered)
    said = f"{len(highest)} of {len(rows)} labels have a share" + (
        f"; the highest is {number(highest[ordered[0]])} for {ordered[0]}." if ordered else "."
    )
    caption = (
        "Left: mean change of the probability when everything outside the label's organs is replaced, and when the "
        "organs are. Right: the share of the outside in both; above 0.5 the outside moves more. Line: interval. "
        "A dash: undefined, because neither change is large enough. Highest share at the top."
    )
    return Plot(forest_figure(rows, panels), "Shortcut reliance per label", said, caption)


def _effects(scores: Scores, split: str, replacement: str) -> Panel:
    sides = (("outside", "warm", "D"), ("inside", "cool", "o"))
    found = [
        Marks(f"{side} replaced", colour, marker, points)
        for side, colour, marker in sides
        if (points := _points(scores.by_label(split, FREE, f"{side}_effect/{replacement}")))
    ]
    return Panel(f"Effect, {replacement}", found, reference=0.0)


def _same_limits(panels: Sequence[Panel]) -> list[Panel]:
    """Effects are compared between panels: one axis for all."""
    ends = [needed_limits(panel) for panel in panels if panel.marks]
    both = (min(low for low, _ in ends), max(high for _, high in ends)) if ends else None
    return [replace(panel, limits=both) for panel in panels]


def curves_plot(curves: Sequence[Curve], split: str, methods: Sequence[str]) -> Plot | None:
    """Mean insertion and deletion curves, a panel per layer, a line per method.

    Example:
        >>> curve = Curve("deletion", "test", "gradcam", "layer4", (0.0, 1.0), (0.9, 0.1))
        >>> curves_plot([curve], "test", ["gradcam"]).title
        'Insertion and deletion curves'
    """
    here = [curve for curve in curves if curve.split == split]
    if not here:
        return None
    kinds = unique(c.kind for c in here)
    layers = unique(c.layer for c in here)
    cells = [(kind, layer) for kind in kinds for layer in layers]
    columns = min(_PANELS, len(layers))
    figure = _curve_grid(here, cells, columns, methods)
    said = "; ".join(f"{c.kind}, {series_name((c.method, c.layer))}: ends at {number(_last(c))}" for c in here[:12])
    caption = (
        "Mean probability while what the map ranks highest is put into an image of the baseline value (insertion: the "
        "sooner it rises, the better) or replaced by that value (deletion: the sooner it falls, the better)."
    )
    return Plot(figure, "Insertion and deletion curves", f"{said}.", caption)


def _last(curve: Curve) -> float | None:
    return float(curve.mean[-1]) if len(curve.mean) else None


def _curve_grid(
    curves: Sequence[Curve], cells: Sequence[tuple[str, str]], columns: int, methods: Sequence[str]
) -> Figure:
    width, height, left = 230.0, 150.0, 34.0
    lines = -(-len(cells) // columns)
    whole = columns * (width + 40)
    marks = [Marks(m, *appearance(methods, m), {}) for m in unique(c.method for c in curves)]
    legend = legend_lines(marks, whole)
    top = 18.0 * len(legend) + 6
    tall = top + lines * (height + 58)
    figure = empty_figure(whole, tall)
    draw_legend(figure, legend, whole, tall)
    for index, (kind, layer) in enumerate(cells):
        row, column = divmod(index, columns)
        x, y = column * (width + 40) + left, top + row * (height + 58) + 20
        axes = bare_axes(figure, (x / whole, 1 - (y + height) / tall, width / whole, height / tall))
        draw_grid(axes, (0, 0.25, 0.5, 0.75, 1), (0, 1))
        axes.set_ylim(0, 1.02)
        for level in (0.0, 0.5, 1.0):
            axes.axhline(level, color=COLOURS["grid"], linewidth=1, linestyle="-", marker="none", zorder=0.5)
            axes.text(-0.03, level, axis_number(level), ha="right", va="center", **words(colour="faint", size=10))
        for n, curve in enumerate(c for c in curves if (c.kind, c.layer) == (kind, layer)):
            colour, _ = appearance(methods, curve.method)
            dashes = ("-", (0, (5, 2)), (0, (2, 2)), (0, (7, 2, 2, 2)))[n % 4]
            axes.plot(curve.share, curve.mean, color=COLOURS[colour], linewidth=1.8, linestyle=dashes, marker="none")
        figure.text(x / whole, 1 - (y - 7) / tall, f"{kind}, {layer}", **words("bold"))
        figure.text((x + width / 2) / whole, 1 - (y + height + 30) / tall, "share of the image", ha="center", **words())
    return figure


def comparison_plot(
    rows: Sequence[ComparisonRow], split: str, series: Series, better: Callable[[str], bool | None]
) -> Plot | None:
    """Differences B - A per label, with Holm's p beside them.

    Args:
        rows: All comparisons.
        split: Split.
        series: Method and layer, or two empty strings.
        better: Measure -> is more better?

    Example:
        >>> row = ComparisonRow("test", "", "", "nodule", "auroc", 40, 0.8, 0.85, 0.05, 0.01, 0.09, 0.01, 0.04)
        >>> comparison_plot([row], "test", ("", ""), lambda measure: True).description
        'AUROC: 1 of 1 rows differ with Holm p < 0.05.'
    """
    here = [r for r in rows if r.split == split and (r.method, r.layer) == series and r.difference is not None]
    measures = sorted(unique(r.measure for r in here), key=_rank)[:_PANELS]
    here = [r for r in here if r.measure in measures]
    if not here:
        return None
    panels = [_difference_panel([r for r in here if r.measure == m], m, better(m)) for m in measures]
    order = sorted((r for r in here if r.measure == measures[0]), key=lambda r: r.difference or 0.0)
    labels = _in_order(unique(r.label for r in here), [r.label for r in order])
    labels = [average_name(label) for label in sorted(labels, key=lambda label: not is_average(label))]
    said = "; ".join(f"{title_of(m)}: {_counted([r for r in here if r.measure == m])}" for m in measures)
    caption = (
        "Difference B − A with its interval; beside it p after Holm's correction, or p itself where there is no "
        f"corrected one. Means over labels first, then labels in the order of {title_of(measures[0])}."
    )
    return Plot(forest_figure(labels, panels), f"Difference, {series_name(series)}", f"{said}.", caption)


def _rank(measure: str) -> int:
    base = measure.partition("/")[0]
    return _COMPARED.index(base) if base in _COMPARED else len(_COMPARED)


def _counted(rows: Sequence[ComparisonRow]) -> str:
    return f"{sum(significant(row) for row in rows)} of {len(rows)} rows differ with Holm p < {_ALPHA}"


def significant(row: ComparisonRow) -> bool:
    """Is p below 0.05 after Holm's correction?

    Example:
        >>> significant(ComparisonRow("test", "", "", "nodule", "auroc", 40, 0.8, 0.9, 0.1, p=0.01))
        False
    """
    return row.p_holm is not None and row.p_holm < _ALPHA


def _difference_panel(rows: Sequence[ComparisonRow], measure: str, better: bool | None) -> Panel:
    groups: dict[str, dict[str, Point]] = {"better": {}, "worse": {}, "different": {}, "no clear difference": {}}
    for row in rows:
        assert row.difference is not None  # noqa: S101  (the caller left those out)
        name = "no clear difference"
        if significant(row):
            name = "different" if better is None else "better" if (row.difference > 0) == better else "worse"
        groups[name][average_name(row.label)] = (row.difference, row.low, row.high)
    looks: Mapping[str, tuple[str, str]] = {
        "better": ("cool", "o"),
        "worse": ("warm", "D"),
        "different": ("ink", "s"),
        "no clear difference": ("faint", "o"),
    }
    marks = [
        Marks(
            f"B {name}" if name in ("better", "worse", "different") else name,
            *looks[name],
            points,
            hollow=name not in ("better", "worse", "different"),
        )
        for name, points in groups.items()
        if points
    ]
    beside = {average_name(r.label): p_value(r.p if r.p_holm is None else r.p_holm) for r in rows}
    return Panel(title_of(measure), marks, reference=0.0, beside=beside, dodge=False)


def sanity_plot(rows: Sequence[SanityRow], methods: Sequence[str]) -> Plot | None:
    """What is left of the maps when weights are random, stage by stage.

    Example:
        >>> sanity_plot([SanityRow("1", "fc", "gradcam", 0.2, 0.3)], ["gradcam"]).title
        'Maps of randomised networks'
    """
    names = unique(_stage(row) for row in rows)
    panels = []
    for title, value in (("|Spearman|", "spearman"), ("SSIM", "ssim")):
        marks = []
        for method in unique(row.method for row in rows):
            found = {_stage(r): getattr(r, value) for r in rows if r.method == method}
            points: dict[str, Point] = {name: (v, None, None) for name, v in found.items() if v is not None}
            if points:
                marks.append(Marks(method, *appearance(methods, method), points))
        if marks:
            low = min(0.0, *(p[0] for m in marks for p in m.points.values()))
            panels.append(Panel(title, marks, (low - 0.04, 1.04), 0.0))
    if not panels:
        return None
    last = [f"{r.method} {number(r.spearman)}" for r in rows if _stage(r) == names[-1]]
    caption = (
        "Similarity to the map of the trained network, in the order of the rows from top to bottom. A map that depends "
        "on the weights falls towards 0; one that stays near 1 shows the image, not the network."
    )
    return Plot(
        forest_figure(names, panels),
        "Maps of randomised networks",
        f"|Spearman| at the last stage: {', '.join(last)}.",
        caption,
    )


def _stage(row: SanityRow) -> str:
    return " · ".join(part for part in (row.stage, row.module) if part) or "all"
