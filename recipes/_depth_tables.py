"""Tables of the depth study: what the alarm compares, and what it says at several thresholds. Not a recipe."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from _runs import Run, markdown
from alarm_study import LABELS, biased

from camtrain.callbacks import replay_alarms

LIMITS = (0.5, 0.7, 1.2, 1.5, 2.0, 2.5)
KINDS = ("biased labels", "others beside a marker", "labels without a marker")


def figures(runs: list[Run], rule: str) -> list[list[str]]:
    """What the alarm compares, in the last check, label by label."""
    rows = []
    for name in LABELS:
        for kind in KINDS:
            found = [_last(run, rule, name) for run in runs if _kind(run, name) == kind]
            known = [values for values in found if values is not None]
            cells = [_spread([values[i] for values in known]) for i in range(2)]
            rows.append([rule, name, kind, str(len(found)), str(len(found) - len(known)), *cells])
    return [row for row in rows if row[3] != "0"]


def _kind(run: Run, name: str) -> str:
    if not run["job"]["shortcut"]:
        return KINDS[2]
    return KINDS[0] if name in biased(run) else KINDS[1]


def _last(run: Run, rule: str, name: str) -> tuple[float, float] | None:
    now = next(row for row in reversed(run["result"]["history"][rule]) if "mid_energy_inside" in row)
    last, mid, chance = (
        now[key].get(name, 0.0) for key in ("last_energy_inside", "mid_energy_inside", "mid_energy_inside_chance")
    )
    return (last, mid / chance) if chance and name in now["last_energy_inside"] else None


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})" if values else "-"


def detected(runs: list[Run], rule: str, alarm: dict[str, Any]) -> list[str]:
    """Per kind: labels for which it stands at the end (for which it was raised at any time)."""
    counts = {kind: [0, 0, 0] for kind in KINDS}
    for run in runs:
        standing: set[str] = set()
        ever: set[str] = set()
        for event in replay_alarms(run["result"]["history"][rule], [alarm]):
            (standing.add if event.state == "raised" else standing.discard)(event.label)
            ever.add(event.label)
        for name in LABELS:
            count = counts[_kind(run, name)]
            for place, here in enumerate((name in standing, name in ever, True)):
                count[place] += here
    return [f"{end} of {number} ({ever})" for end, ever, number in counts.values()]


def tables(runs: list[Run], rules: Sequence[str], chosen: Sequence[int]) -> str:
    """Figures, and verdicts at several thresholds: on seeds to choose from, and on others."""
    rows = []
    for title, some in (
        ("chosen on", [run for run in runs if run["job"]["seed"] in chosen]),
        ("confirmed on", [run for run in runs if run["job"]["seed"] not in chosen]),
    ):
        for rule in rules:
            rows += [[title, rule, str(t), *detected(some, rule, {"name": "depth", "threshold": t})] for t in LIMITS]
        rows.append([title, "alarm reliance", "", *detected(some, rules[0], {"name": "reliance"})])
    head = ["method", "label", "", "runs", "no figures", "last layer: energy inside", "mid layer: energy / chance"]
    return "\n\n".join(
        [
            markdown(head, [row for rule in rules for row in figures(runs, rule)]),
            markdown(["seeds", "method", "threshold", *KINDS], rows),
        ]
    )
