"""Tables of the shortcut study, from the runs that are finished. Not a recipe."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from _runs import Run, finished, finite, markdown, spread
from scipy.stats import spearmanr

QUESTIONS = ["arms", "organs", "masks", "ways", "wide"]
SPLITS = ["test", "shift_free", "shift_random", "shift_reversed"]
HEADER = [
    "AUROC test", "free", "random", "reversed", "worst label, reversed", "gap closed", "OrganIoU (micro)",
    "energy inside", "lesion hit rate", "reliance", "runs",
]  # fmt: skip
JUDGES = ("case", "blur")
"""Replacements whose mean judges: chosen on the first 104 runs of this study, and kept for all that came later."""
GAP = 0.02
"""Where plain falls by less there is no gap to close: its shares would be noise over noise."""
_PLACES = ["skin", "other_organ", "own_organ", "co-occurring"]
_SETTINGS = ("cases", "test_cases", "size", "epochs", "shortcut", "precision")


def report(out: Path) -> str:
    """Every table that the finished runs allow, as Markdown."""
    runs = finished(out)
    parts = []
    for settings, same in _by(runs, lambda run: json.dumps([run["job"].get(k, "32-true") for k in _SETTINGS])).items():
        told = ", ".join(f"{k} {v}" for k, v in zip(_SETTINGS, json.loads(settings), strict=True))
        ends = {(r["job"]["net"], r["job"]["place"], r["job"]["seed"], r["job"]["arm"]): reversed_of(r)
                for r in same if _plain_data(r) and "result" in r}  # fmt: skip
        parts.append(f"### Runs with {told}")
        parts += _overview([r for r in same if "result" in r and _default(r["job"])], ends)
        for title, chosen, name in (
            ("All arms", _default, lambda j: j["arm"]),
            ("Organs on a share of the training cases", lambda j: j["organs_share"] < 1,
             lambda j: f"{j['arm']}, {j['organs_share']:.0%}{_way(j)}"),
            ("Poor masks in training", lambda j: j["masks"] != "exact", lambda j: f"{j['arm']}, {j['masks']}"),
            ("Ways of OutsideSwap", lambda j: bool(j["swap"]) and j["organs_share"] == 1,
             lambda j: json.dumps(j["swap"])[1:-1].replace('"', "")),
        ):  # fmt: skip
            parts += _section(title, [r for r in same if chosen(r["job"])], name, ends)
        parts += _ranking([r for r in same if "result" in r])
    return "\n\n".join(parts)


def _way(job: dict[str, Any]) -> str:
    way = job["swap"].get("without_organs")
    return f", without organs: {way}" if way else ""


def _default(job: dict[str, Any]) -> bool:
    return job["masks"] == "exact" and job["organs_share"] == 1 and not job["swap"]


def _plain_data(run: Run) -> bool:
    return run["job"]["arm"] in ("plain", "ceiling") and _default(run["job"])


def _overview(runs: list[Run], ends: dict[Any, float]) -> list[str]:
    """A row per arm, a column per network and place: AUROC reversed, share of the gap closed, number of seeds."""
    columns = sorted({(r["job"]["place"], r["job"]["net"]) for r in runs}, key=lambda c: (_PLACES.index(c[0]), c[1]))
    rows = []
    for arm, same in _by(runs, lambda r: r["job"]["arm"]).items():
        here = [[r for r in same if (r["job"]["place"], r["job"]["net"]) == column] for column in columns]
        rows.append([arm, *(f"{spread(map(reversed_of, each))}; {spread([closed(r, ends) for r in each], 2)}; "
                            f"{len(each)}" if each else "-" for each in here)])  # fmt: skip
    header = ["trained with", *(f"{net}, {place}" for place, net in columns)]
    return ["#### AUROC reversed; share of the gap closed; seeds", markdown(header, rows)] if runs else []


def _section(title: str, runs: list[Run], name: Any, ends: dict[Any, float]) -> list[str]:
    parts = [f"#### {title}"] if runs else []
    for (net, place), group in _by(runs, lambda r: (r["job"]["net"], r["job"]["place"])).items():
        rows = [[arm, *_cells(same, ends)] for arm, same in _by(group, lambda r: name(r["job"])).items()]
        parts.append(f"**{net}, shortcut at {place}**\n\n" + markdown(["trained with", *HEADER], rows))
    return parts


def _cells(runs: list[Run], ends: dict[Any, float]) -> list[str]:
    good = [r for r in runs if "result" in r]
    mean = lambda split, measure: [r["result"]["scores"][split].get(measure, {}).get("mean") for r in good]  # noqa: E731
    return [
        *(spread(mean(split, "auroc")) for split in SPLITS),
        spread(map(worst_of, good)),
        spread([closed(r, ends) for r in good], 2),
        spread(mean("test", "organ_iou_micro"), 2),
        spread(mean("test", "energy_inside"), 2),
        spread([r["result"]["lesion_hits"] for r in good], 2),
        spread([reliance_of(r, *JUDGES) for r in good], 2),
        f"{len(good)}" + (f" and {len(runs) - len(good)} diverged" if len(good) < len(runs) else ""),
    ]


def reversed_of(run: Run) -> float:
    """Mean AUROC where the shortcut says the opposite."""
    value: float = run["result"]["scores"]["shift_reversed"]["auroc"]["mean"]
    return value


def worst_of(run: Run) -> float:
    """The lowest label there."""
    return min(v for k, v in run["result"]["scores"]["shift_reversed"]["auroc"].items() if k != "mean")


def closed(run: Run, ends: dict[Any, float]) -> float | None:
    """Share of the gap between plain and ceiling of the same seed that a run closes."""
    job = run["job"]
    low, high = (ends.get((job["net"], job["place"], job["seed"], arm)) for arm in ("plain", "ceiling"))
    return None if low is None or high is None or high - low < GAP else (reversed_of(run) - low) / (high - low)


def reliance_of(run: Run, *kinds: str) -> float | None:
    """ShortcutReliance in distribution: of each label the mean over replacements, then over labels."""
    each = [finite(shares) for shares in zip(*(run["result"]["reliance"][kind] for kind in kinds), strict=True)]
    found = [statistics.mean(shares) for shares in each if shares]
    return statistics.mean(found) if found else None


def turned_of(run: Run) -> float | None:
    """One less the AUROC in distribution once all but the organs is a case of the opposite truth; runs that have it."""
    found = finite(run["result"].get("auroc_outside_replaced", {}).get("case", []))
    return 1 - statistics.mean(found) if found else None


def risk_of(run: Run) -> float | None:
    """`shortcut_risk` of `camtrain evaluate`: mean over labels and `JUDGES`; runs that have the area."""
    areas = run["result"].get("auroc_outside_replaced", {})
    found = []
    for kind in JUDGES:
        for share, area in zip(run["result"]["reliance"][kind], areas.get(kind, []), strict=False):
            # A label whose share is undefined, since nothing moves it, has the lost area alone.
            found += [statistics.mean([*finite([share]), 1 - area])] if finite([area]) else []
    return statistics.mean(found) if found else None


def _ranking(runs: list[Run]) -> list[str]:
    """Does reliance, which no shift split was needed for, rank runs as the reversed shortcut does?"""
    kinds = list(runs[0]["result"]["reliance"]) if runs else []
    judges: dict[str, Any] = {" + ".join(JUDGES): lambda r: reliance_of(r, *JUDGES)}
    judges |= {kind: lambda r, kind=kind: reliance_of(r, kind) for kind in kinds}
    judges |= {"1 - AUROC, outside replaced": turned_of, "risk": risk_of}
    groups = {f"{net}, {place}": group for (net, place), group in
              _by(runs, lambda r: (r["job"]["net"], r["job"]["place"])).items()}  # fmt: skip
    groups["all"] = runs
    groups["all but own organ"] = [r for r in runs if r["job"]["place"] != "own_organ"]
    rows = [[title, len(group), *(_agreement(group, judge) for judge in judges.values())]
            for title, group in groups.items()]  # fmt: skip
    return [
        "#### Spearman of reliance and AUROC reversed, over arms and seeds",
        markdown(["runs", "n", *judges], rows),
    ]


def _agreement(runs: list[Run], judge: Any) -> str:
    pairs = [(told, reversed_of(r)) for r in runs if (told := judge(r)) is not None]
    if len(pairs) < 4:
        return "-"
    some = f" (n {len(pairs)})" if len(pairs) < len(runs) else ""
    return f"{spearmanr(*zip(*pairs, strict=True)).statistic:.2f}{some}"


def _by(runs: list[Run], key: Any) -> dict[Any, list[Run]]:
    groups: dict[Any, list[Run]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return groups
