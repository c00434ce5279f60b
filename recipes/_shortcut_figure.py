"""The figure of the shortcut study: what each arm does when the shortcut turns, and whether reliance told before.

Not a recipe.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from _runs import Run, finished
from _shortcut_arms import ARMS
from _shortcut_tables import JUDGES, reversed_of, risk_of

COLOURS = {"plain": "#b2182b", "ceiling": "#555555", "swap": "#2166ac", "swap + mask loss": "#1b7837"}
NETS = {"flatten": "o", "resnet18q": "s", "resnet18": "D"}
ROWS = [("flatten",), ("resnet18q", "resnet18")]
PLACES = ["skin", "other_organ", "own_organ", "co-occurring"]


def draw(out: Path) -> Path | None:
    """Draw the finished runs with exact organs; None where there is none."""
    runs = [
        r for r in finished(out) if "result" in r and r["job"]["masks"] == "exact" and r["job"]["organs_share"] == 1
    ]
    runs = [r for r in runs if not r["job"]["swap"]]
    if not runs:
        return None
    places = [p for p in PLACES if any(r["job"]["place"] == p for r in runs)]
    rows = [row for row in ROWS if any(r["job"]["net"] in row for r in runs)]
    arms = [arm for arm in reversed(ARMS) if any(r["job"]["arm"] == arm for r in runs)]
    size = (2.3 * len(places) + 5, 0.8 + 2.9 * len(rows))
    figure, axes = plt.subplots(len(rows), len(places) + 1, figsize=size, layout="constrained", squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis, place in zip(line, places, strict=False):
            _arms(axis, [r for r in runs if r["job"]["place"] == place and r["job"]["net"] in row], arms)
            axis.set_title(f"{row[0]}, {place.replace('_', ' ')}", fontsize=10)
            if axis is not line[0]:
                axis.set_yticklabels([])
        _risk(line[-1], [r for r in runs if r["job"]["net"] in row])
    figure.savefig(out / "shortcut_study.png", dpi=90)
    plt.close(figure)
    return out / "shortcut_study.png"


def _arms(axis: plt.Axes, runs: list[Run], arms: list[str]) -> None:
    for row, arm in enumerate(arms):
        for run in (r for r in runs if r["job"]["arm"] == arm):
            marker, colour = NETS[run["job"]["net"]], COLOURS.get(arm, "#888888")
            axis.plot(reversed_of(run), row, marker, color=colour, alpha=0.6)
    axis.set_yticks(range(len(arms)), arms)
    axis.set_xlim(0, 1.04)
    axis.set_xlabel("AUROC, shortcut reversed")
    axis.grid(axis="x", alpha=0.3)


def _risk(axis: plt.Axes, runs: list[Run]) -> None:
    for run in runs:
        told = risk_of(run)
        if told is not None:
            colour = COLOURS.get(run["job"]["arm"], "#888888")
            axis.plot(told, reversed_of(run), NETS[run["job"]["net"]], color=colour, alpha=0.6)
    axis.set_xlabel(f"shortcut risk ({', '.join(JUDGES)})")
    axis.set_ylabel("AUROC, shortcut reversed")
    axis.set_title("in-distribution figure\nagainst the shift", fontsize=10)
    axis.grid(alpha=0.3)
