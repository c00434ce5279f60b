"""The figure of the shortcut study: what each arm does when the shortcut turns, and whether reliance told before.

Not a recipe.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from _runs import Run, finished
from _shortcut_arms import ARMS
from _shortcut_tables import JUDGES, reliance_of, reversed_of

COLOURS = {"plain": "#b2182b", "ceiling": "#555555", "swap": "#2166ac", "swap + mask loss": "#1b7837"}
NETS = {"flatten": "o", "resnet18q": "s", "resnet18": "D"}


def draw(out: Path) -> Path | None:
    """Draw the finished runs with exact organs; None where there is none."""
    runs = [
        r for r in finished(out) if "result" in r and r["job"]["masks"] == "exact" and r["job"]["organs_share"] == 1
    ]
    runs = [r for r in runs if not r["job"]["swap"]]
    if not runs:
        return None
    panels = sorted({(r["job"]["place"], r["job"]["net"]) for r in runs})
    arms = [arm for arm in reversed(ARMS) if any(r["job"]["arm"] == arm for r in runs)]
    figure, axes = plt.subplots(1, len(panels) + 1, figsize=(2.4 * len(panels) + 5, 3.9), layout="constrained")
    for axis, panel in zip(axes, panels, strict=False):
        _arms(axis, [r for r in runs if (r["job"]["place"], r["job"]["net"]) == panel], *panel, arms)
        if axis is not axes[0]:
            axis.set_yticklabels([])
    _reliance(axes[-1], runs)
    figure.savefig(out / "shortcut_study.png", dpi=80)
    plt.close(figure)
    return out / "shortcut_study.png"


def _arms(axis: plt.Axes, runs: list[Run], place: str, net: str, arms: list[str]) -> None:
    for row, arm in enumerate(arms):
        values = [reversed_of(r) for r in runs if r["job"]["arm"] == arm]
        axis.plot(values, [row] * len(values), NETS[net], color=COLOURS.get(arm, "#888888"), alpha=0.6)
    axis.set_yticks(range(len(arms)), arms)
    axis.set_xlim(0, 1.04)
    axis.set_title(f"{net}\nshortcut at {place.replace('_', ' ')}", fontsize=10)
    axis.set_xlabel("AUROC, shortcut reversed")
    axis.grid(axis="x", alpha=0.3)


def _reliance(axis: plt.Axes, runs: list[Run]) -> None:
    for run in runs:
        told = reliance_of(run, *JUDGES)
        if told is not None:
            colour = COLOURS.get(run["job"]["arm"], "#888888")
            axis.plot(told, reversed_of(run), NETS[run["job"]["net"]], color=colour, alpha=0.6)
    axis.set_xlabel(f"shortcut reliance ({', '.join(JUDGES)})")
    axis.set_ylabel("AUROC, shortcut reversed")
    axis.set_title("in-distribution figure\nagainst the shift", fontsize=10)
    axis.grid(alpha=0.3)
