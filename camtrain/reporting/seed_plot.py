"""The figure of a study: a bar per arm, a dot per seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from camtrain._errors import InputError

Pixels = npt.NDArray[np.uint8]
Panel = Mapping[str, Mapping[str, Sequence[float]]]
"""Group -> series -> one value per seed."""
# Pairs of a light and a dark tone that colour-blind readers can tell apart (Okabe and Ito 2008).
_COLOURS = ("#F2C48D", "#D55E00", "#9CCBE8", "#0072B2", "#A9D8C8", "#009E73", "#BBBBBB", "#555555")


def plot_seeds(
    panels: Mapping[str, Panel],
    chance: Mapping[str, float] | None = None,
    *,
    title: str = "",
    limits: Mapping[str, tuple[float, float]] | None = None,
    width: int = 1200,
    height: int = 260,
) -> Pixels:
    """One panel per measure, under each other: groups along the axis, a bar per series, a dot for each seed.

    Args:
        panels: Measure -> group -> series -> one value per seed. Bars show their mean; values that are not finite
            (a diverged seed) are left out, and a series without any leaves a gap.
        chance: Measure -> level of chance, drawn as a dashed line.
        title: Line above.
        limits: Measure -> lowest and highest value of its axis; from 0 otherwise.
        width: Of the picture in pixels.
        height: Of each panel in pixels.

    Returns:
        (height * panels, width, 3) uint8.

    Raises:
        InputError: Nothing to draw, or no matplotlib.

    Example:
        >>> panels = {"AUROC": {"flatten": {"plain": [0.9, 0.8], "mask loss": [0.95, 0.9]}}}
        >>> plot_seeds(panels, width=600, height=200).shape
        (200, 600, 3)
    """
    if not panels or not all(panels.values()):
        raise InputError("expected at least one panel, each with at least one group, got none")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the figure of a study needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width / 100, height * len(panels) / 100), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    series = list(dict.fromkeys(name for panel in panels.values() for group in panel.values() for name in group))
    for axis, (measure, panel) in zip(axes, panels.items(), strict=True):
        _bars(axis, panel, series)
        if measure in (chance or {}):
            axis.axhline((chance or {})[measure], color="0.2", linestyle="--", linewidth=1.2, label="chance")
        if measure in (limits or {}):
            axis.set_ylim(*(limits or {})[measure])
        axis.set_ylabel(measure)
        axis.spines[["top", "right"]].set_visible(False)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(title)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]


def _bars(axis: Any, panel: Panel, series: Sequence[str]) -> None:
    wide = 0.8 / len(series)
    for index, name in enumerate(series):
        found = [[v for v in group.get(name, ()) if math.isfinite(v)] for group in panel.values()]
        places = [at + (index - (len(series) - 1) / 2) * wide for at in range(len(found))]
        means = [sum(values) / len(values) if values else math.nan for values in found]
        colour = _COLOURS[index % len(_COLOURS)]
        axis.bar(places, means, width=0.92 * wide, color=colour, label=name)
        for place, values in zip(places, found, strict=True):
            spots = [place] * len(values)
            axis.scatter(spots, values, s=12, color="black", linewidths=0, zorder=3)
    axis.set_xticks(range(len(panel)), list(panel))
