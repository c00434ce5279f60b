"""The figure of sum-to-score: the sum of each map against the logit that it explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from camtrain._errors import InputError

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating]
# Told apart by colour-blind readers too (Okabe and Ito 2008).
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")
_MARKS = "oxs^"


def plot_sums(
    panels: Mapping[str, Mapping[str, tuple[Floats, Floats]]],
    *,
    title: str = "",
    columns: int = 2,
    size: tuple[int, int] = (400, 360),
) -> Pixels:
    """A panel per model: each map is a point, its logit to the right, its sum upwards; on the line both are equal.

    Args:
        panels: Title of a panel -> method -> (logits, sums), two arrays of one shape, as `ct.explain` and the model
            give them. Points that are not finite are left out.
        title: Line above all panels.
        columns: Panels side by side.
        size: Width and height of a panel in pixels.

    Returns:
        (H, W, 3) uint8.

    Raises:
        InputError: Nothing to draw, arrays of different shapes, or no matplotlib.

    Example:
        >>> scores = np.array([-1.0, 2.0])
        >>> plot_sums({"net": {"respondcam": (scores, scores + 0.1)}}, columns=1, size=(300, 250)).shape
        (250, 300, 3)
    """
    _check(panels, columns)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the figure of sums needs matplotlib: pip install matplotlib") from error
    wide, high = min(columns, len(panels)), -(-len(panels) // columns)
    figure = Figure(figsize=(size[0] * wide / 100, size[1] * high / 100), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(high, wide, squeeze=False).ravel()
    for axis, (name, methods) in zip(grid, panels.items(), strict=False):
        for index, (method, (scores, sums)) in enumerate(methods.items()):
            colour, mark = _COLOURS[index % len(_COLOURS)], _MARKS[index % len(_MARKS)]
            axis.scatter(np.ravel(scores), np.ravel(sums), 9, colour, mark, label=method, linewidths=0.8, alpha=0.7)
        logits = np.concatenate([np.ravel(scores[np.isfinite(scores)]) for scores, _ in methods.values()])
        ends = [logits.min(), logits.max()] if logits.size else [0, 1]
        axis.plot(ends, ends, color="0.3", linewidth=1, zorder=0)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("logit", fontsize=9)
        axis.set_ylabel("sum of the map", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    for axis in grid[len(panels) :]:
        axis.axis("off")
    if title:
        figure.suptitle(title, fontsize=11)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]


def _check(panels: Mapping[str, Mapping[str, tuple[Sequence[float] | Floats, Floats]]], columns: int) -> None:
    if not panels or not all(panels.values()) or columns < 1:
        raise InputError("expected at least one panel with at least one method, and at least one column")
    for name, methods in panels.items():
        for method, (scores, sums) in methods.items():
            if np.shape(scores) != np.shape(sums):
                raise InputError(
                    f"{name}, {method}: expected one sum per logit, got logits of shape {np.shape(scores)} and sums of "
                    f"shape {np.shape(sums)}"
                )
