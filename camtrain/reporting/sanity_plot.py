"""The figure of a sanity check: how much of each method's maps is left, stage by stage."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from camtrain._errors import InputError

Pixels = npt.NDArray[np.uint8]
_TRAINED = "trained"
# Told apart by colour-blind readers too (Okabe and Ito 2008), black and pale yellow left out.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C564B", "#7F7F7F")
_MARKS = "osD^vPX*"


def plot_cascade(
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    stages: Sequence[str],
    controls: Collection[str] = (),
    *,
    title: str = "",
    limits: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    width: int = 1200,
    height: int = 520,
) -> Pixels:
    """One panel per measure: stages from the trained network to random weights, a line per method, controls dashed.

    The first point of every line is 1: a map is like itself. A NaN leaves a gap.

    Args:
        curves: Measure -> method -> one value per stage.
        stages: What was randomised last at each stage; written along the axis.
        controls: Methods that are known to fail.
        title: Line above.
        limits: Measure -> (stage from 1 on, value) above which a method fails, marked by short grey lines.
        width: Of the picture in pixels.
        height: Of the picture in pixels.

    Returns:
        (height, width, 3) uint8.

    Raises:
        InputError: Nothing to draw, a number of values that is not that of the stages, or no matplotlib.

    Example:
        >>> plot_cascade({"Spearman": {"hirescam": [0.1, 0.0]}}, ["head", "conv"], width=600, height=300).shape
        (300, 600, 3)
    """
    if not curves or not stages:
        raise InputError("expected curves of at least one measure and the names of their stages, got none")
    for measure, methods in curves.items():
        for method, values in methods.items():
            if len(values) != len(stages):
                raise InputError(f"{measure} of {method} has {len(values)} values for {len(stages)} stages")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the figure of a sanity check needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    places = range(len(stages) + 1)
    for axis, (measure, methods) in zip(axes, curves.items(), strict=True):
        axis.axhline(0, color="0.8", linewidth=1)
        for at, limit in (limits or {}).get(measure, ()):
            axis.plot([at - 0.35, at + 0.35], [limit, limit], color="0.45", linewidth=2.5)
        for index, (method, values) in enumerate(methods.items()):
            axis.plot(
                places,
                [1.0, *values],
                label=f"{method} (control)" if method in controls else method,
                color=_COLOURS[index % len(_COLOURS)],
                marker=_MARKS[index % len(_MARKS)],
                # Methods that agree lie on one another: the first ones are the widest.
                markersize=max(3.5, 7.0 - 0.7 * index),
                linewidth=max(1.2, 3.2 - 0.4 * index),
                linestyle="--" if method in controls else "-",
            )
        axis.set_xticks(list(places), [_TRAINED, *stages], rotation=40, ha="right", fontsize=8)
        axis.set_ylim(min(-0.3, axis.get_ylim()[0]), 1.05)
        axis.set_title(measure, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]
