"""Tables and picture of `bias_audit.py`: was the audit right about what the test data show? Not a recipe."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _runs import Run, finite, markdown, spread
from matplotlib.figure import Figure

from camtrain.evaluation import AuditLimits
from camtrain.evaluation.similarity import spearman
from camtrain.metrics import label_auroc

SHARE = AuditLimits().share
FALL = 0.1  # of AUROC, from which on a label is called biased
MARKER = "energy_on_marker@hirescam"  # needs to know where the marker lies, which nobody does of real data
FIGURES = ["energy_inside@hirescam", "energy_inside@gradcam", "outside_effect/case", "outside_effect/air",
           "shortcut_reliance/case", "shortcut_reliance/air"]  # fmt: skip
LEAST = "shortcut_reliance, the lower one"
RATES = ["biased and flagged", "unbiased and left"]
COLOURS, MARKS = {0.95: "#c4500a", 0.75: "#7d6608", 0.5: "#0b5cad"}, {"flatten": "o", "pool": "^"}


def pairs(runs: list[Run], epoch: int | None = None) -> list[dict[str, Any]]:
    """One entry per trained network and label, with what was said after that epoch (None: the last one)."""
    rows = []
    for run in runs:
        said = list(run["result"]["epochs"].values())[-1] if epoch is None else run["result"]["epochs"][str(epoch)]
        auroc = run["result"]["auroc"]
        for label, row in said.items():
            test, after = auroc["test"][label], auroc["shift_reversed"][label]
            shares = [row["figures"][name] for name in FIGURES[-2:]]
            figures = {**row["figures"], LEAST: min(shares) if len(finite(shares)) == 2 else float("nan")}
            rows.append({**run["job"], "label": label, "reversed": after, "fall": test - after, **row,
                         "figures": figures, "flags": {**row["flags"], LEAST: figures[LEAST] > SHARE}})  # fmt: skip
    return rows


def rates(rows: list[dict[str, Any]], said: Callable[[dict[str, Any]], Any]) -> list[str]:
    """Biased labels that were called so, unbiased ones that were not: counts, and the range over seeds."""
    cells = []
    for biased in (True, False):
        right = {row["seed"]: [] for row in rows}
        for row in (r for r in rows if (r["fall"] > FALL) == biased):
            right[row["seed"]].append(bool(said(row)) == biased)
        every = [hit for hits in right.values() for hit in hits]
        cells.append(f"{sum(every)} of {len(every)}; {spread([statistics.mean(h) for h in right.values() if h], 2)}")
    return cells


def mean(values: Iterable[float]) -> float:
    """Over the labels that have a value."""
    found = finite(values)
    return statistics.mean(found) if found else float("nan")


def arms(rows: list[dict[str, Any]], runs: list[Run]) -> str:
    """Net and strength of the shortcut: mean over labels, range over seeds."""
    lines = []
    for net, strength in {(run["job"]["net"], run["job"]["shortcut"]): 0 for run in runs}:
        jobs = [run for run in runs if (run["job"]["net"], run["job"]["shortcut"]) == (net, strength)]
        of = [r for r in rows if (r["net"], r["shortcut"]) == (net, strength)]
        seeds = [[r for r in of if r["seed"] == seed] for seed in {r["seed"]: 0 for r in of}]
        counts = [f"{sum(r['fall'] > FALL for r in of)} / {sum(bool(r['suspect']) for r in of)} of {len(of)}"]
        values = [lambda r: r["reversed"] + r["fall"], lambda r: r["reversed"]]
        values += [lambda r, n=n: r["figures"][n] for n in (*FIGURES, MARKER)]
        cells = [spread([mean(map(value, s)) for s in seeds], 3 if i < 2 else 2) for i, value in enumerate(values)]
        lines.append([net, strength, f"{len(seeds)} of {len(jobs)}", *cells[:2], *counts, *cells[2:]])
    names = ["net", "agrees", "seeds", "AUROC test", "reversed", "biased / suspect labels", *FIGURES, MARKER]
    return markdown(names, lines)


def judges(rows: list[dict[str, Any]]) -> str:
    """Each figure alone at its stated limit, and as a ranking without a limit."""
    lines = []
    for net in {r["net"]: 0 for r in rows}:
        of = [r for r in rows if r["net"] == net]
        lines.append([net, "**verdict**", *rates(of, lambda r: r["suspect"]), "-", "-"])
        for name in (*FIGURES, LEAST, MARKER):
            known = [r for r in of if r["figures"][name] == r["figures"][name]]
            sign = -1 if name.startswith("energy_inside") else 1  # little energy inside speaks for a bias
            value = torch.tensor([sign * r["figures"][name] for r in known])
            fall = torch.tensor([r["fall"] for r in known])
            area = label_auroc(value[:, None], (fall > FALL)[:, None].float()).item() if known else float("nan")
            rank = spearman(value[None, None], fall[None, None]).item() if known else float("nan")
            numbers = ["-" if v != v else f"{v:.2f}" for v in (area, rank)]
            lines.append([net, name, *rates(of, lambda r, n=name: r["flags"][n]), *numbers])
    return markdown(["net", "figure", *RATES, "AUROC of the figure", "Spearman with the fall"], lines)


def by_epoch(runs: list[Run]) -> str:
    """The verdict after each audited epoch against the bias at the end."""
    lines = [[net, epoch, *rates([r for r in pairs(runs, epoch) if r["net"] == net], lambda r: r["suspect"])]
             for net in {run["job"]["net"]: 0 for run in runs} for epoch in runs[0]["result"]["epochs"]]  # fmt: skip
    return markdown(["net", "epoch", *RATES], lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Fall of AUROC against energy inside, and against the share of the reaction that comes from outside."""
    figure = Figure((9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    panels = [("energy inside / chance (HiResCAM)", FIGURES[0], AuditLimits().energy),
              ("shortcut reliance, the lower of two replacements", LEAST, SHARE)]  # fmt: skip
    for axis, (title, name, limit) in zip(axes, panels, strict=True):
        for net, strength in product(*({r[word]: 0 for r in rows} for word in ("net", "shortcut"))):
            of = [r for r in rows if (r["net"], r["shortcut"]) == (net, strength)]
            style = {"c": COLOURS[strength], "marker": MARKS[net], "label": f"{net}, {strength:.0%}"}
            axis.scatter([r["figures"][name] for r in of], [r["fall"] for r in of], 30, **style)
        axis.axhline(FALL, color="grey", lw=0.8)
        axis.axvline(limit, color="grey", lw=0.8, ls="--")
        axis.set_xlabel(title)
    axes[0].set_xscale("log")
    axes[0].set_ylabel("fall of AUROC, markers reversed")
    axes[0].legend(fontsize=8, title="net, marker agrees")
    figure.savefig(path, dpi=110)
