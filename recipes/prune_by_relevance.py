"""Does relevance know which channels a network can do without?

    python recipes/prune_by_relevance.py --models runs/relevance_cam --out runs/prune_by_relevance

Channels of one layer are ranked by the mean |channel weight| of Relevance-CAM over training cases and labels, by that
of Grad-CAM, by mean activation, by the L1 norm of their filter (Li et al. 2017), and at random. The lowest 10 to 90 %
are set to 0, and the AUROC on test cases is what is left. Nothing is trained again.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _depth import LAYERS, add_options, auroc, data_of, jobs_of, tested, trained
from _pruning import SHARES, curve, importance
from _runs import Job, Run, finish, hardware, interval, markdown, spread
from _start import count, start
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

RANDOM = "random"
CRITERIA = ("relevance", "Grad-CAM", "activation", "filter L1", RANDOM)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7F7F7F")
console = Console()


def study(job: Job, folder: Path) -> dict[str, Any]:
    """Mean AUROC: layer -> criterion -> one value per share; at random the mean of several draws."""
    net, data = trained(job, folder), data_of(job)
    logits, label = tested(net, data)
    train, test = (
        torch.stack([dataset[i]["image"] for i in range(count)]).as_subclass(Tensor)
        for dataset, count in (
            (data.train_dataloader().dataset, job["ranked_on"]),
            (data.test_dataloader()[0].dataset, job["test_cases"]),
        )
    )
    found: dict[str, dict[str, list[float]]] = {}
    for layer in LAYERS[job["net"]]:
        ranked = importance(net, train, layer)
        channels = len(ranked["relevance"])
        draws = [torch.rand(channels, generator=torch.Generator().manual_seed(n)) for n in range(job["draws"])]
        curves = {name: curve(net, test, label, layer, values) for name, values in ranked.items()}
        curves[RANDOM] = np.mean([curve(net, test, label, layer, values) for values in draws], axis=0).tolist()
        found[layer] = curves
    return {"auroc": float(np.mean(auroc(logits, label))), "curves": found}


def told(runs: list[Run]) -> str:
    """Mean over the shares by layer and criterion, and what relevance gains over the others."""
    rows, gains = [], []
    for net, layers in LAYERS.items():
        mine = [run["result"] for run in runs if run["job"]["net"] == net and "result" in run]
        for layer in layers if mine else []:
            areas = {c: [float(np.mean(r["curves"][layer][c])) for r in mine] for c in CRITERIA}
            rows.append([net, layer, spread(r["auroc"] for r in mine), *(spread(areas[c]) for c in CRITERIA)])
        for other in CRITERIA[1:] if mine else []:
            gain = [float(np.mean([np.subtract(r["curves"][at]["relevance"], r["curves"][at][other])
                                   for at in layers])) for r in mine]  # fmt: skip
            low, high = interval(gain)
            gains.append([net, other, spread(gain), f"{low:+.3f} to {high:+.3f}"])
    lost = [f"{run['job']['net']}, seed {run['job']['seed']}: {run['diverged']}" for run in runs if "diverged" in run]
    tables = [markdown(["net", "layer", "unpruned", *CRITERIA], rows),
              markdown(["net", "relevance less", "difference", "95 % interval over seeds"], gains)]  # fmt: skip
    return "\n\n".join([*tables, *(f"Diverged: {line}" for line in lost)]) + "\n"


def figure(runs: list[Run], path: Path) -> None:
    """A panel per layer: AUROC against the share of channels that are gone, mean over seeds."""
    nets = [net for net in LAYERS if any(run["job"]["net"] == net and "result" in run for run in runs)]
    sheet = Figure(figsize=(10, 2.7 * len(nets)), dpi=90, layout="constrained")
    canvas = FigureCanvasAgg(sheet)
    panels = sheet.subplots(len(nets), max(len(LAYERS[net]) for net in nets), squeeze=False, sharey=True)
    for net, row in zip(nets, panels, strict=True):
        mine = [run["result"] for run in runs if run["job"]["net"] == net and "result" in run]
        for axis in row[len(LAYERS[net]) :]:
            axis.axis("off")
        for layer, axis in zip(LAYERS[net], row, strict=False):
            for name, colour in zip(CRITERIA, COLOURS, strict=True):
                means = np.mean([[r["auroc"], *r["curves"][layer][name]] for r in mine], axis=0)
                axis.plot([0, *SHARES], means, "--" if name == RANDOM else "o-", color=colour, label=name, markersize=4)
            axis.set_title(f"{net} {layer}", fontsize=10)
            axis.set_xlabel("share of channels at 0", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("test AUROC", fontsize=9)
    handles, names = panels[0][0].get_legend_handles_labels()
    sheet.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=9, frameon=False)
    canvas.print_png(path)


def main() -> None:
    """Train or read, prune, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, out="runs/prune_by_relevance")
    parser.set_defaults(test_cases=64)
    parser.add_argument("--ranked-on", type=count, default=64, help="training cases that rank the channels")
    parser.add_argument("--draws", type=count, default=3, help="random orders")
    args = parser.parse_args()
    work = functools.partial(study, folder=args.models or args.out)
    jobs = [job | {"ranked_on": args.ranked_on, "draws": args.draws} for job in jobs_of(args)]
    runs = finish(jobs, work, args.out, args.workers, together=lambda job: job["seed"])
    text = f"{hardware()}; mean (range) over {args.seeds} seeds; AUROC, mean over {SHARES}\n\n{told(runs)}"
    (args.out / "table.md").write_text(text)
    figure(runs, args.out / "prune_by_relevance.png")
    console.print(text, soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    start(main)
