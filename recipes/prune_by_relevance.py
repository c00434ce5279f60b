"""Does relevance know which channels a network can do without?

    python recipes/prune_by_relevance.py --models runs/relevance_cam --out runs/prune_by_relevance

Channels of one layer are ranked by the mean |channel weight| of Relevance-CAM over training cases and labels, by that
of Grad-CAM, by mean activation, by the L1 norm of their filter (Li et al. 2017), and at random. The lowest 10 to 90 %
are set to 0 by a forward hook, and the AUROC on test cases is what is left. Nothing is trained again.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _depth import LAYERS, add_options, auroc, data_of, jobs_of, tested, trained
from _runs import Job, Run, finish, hardware, interval, markdown, spread
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

import camtrain as ct

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
RANDOM = "random"
CRITERIA = ("relevance", "Grad-CAM", "activation", "filter L1", RANDOM)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7F7F7F")
console = Console()


def study(job: Job, folder: Path) -> dict[str, Any]:
    """Mean AUROC: layer -> criterion -> one value per share; at random the mean of several draws."""
    net, data = trained(job, folder), data_of(job)
    train = torch.utils.data.default_collate([data.train_dataloader().dataset[i] for i in range(job["ranked_on"])])
    image = train["image"].as_subclass(Tensor)
    found: dict[str, dict[str, list[float]]] = {}
    for layer in LAYERS[job["net"]]:
        ranked = importance(net, image, layer)
        channels = len(ranked["relevance"])
        draws = [torch.rand(channels, generator=torch.Generator().manual_seed(n)) for n in range(job["draws"])]
        curves = {name: curve(net, data, layer, values) for name, values in ranked.items()}
        curves[RANDOM] = np.mean([curve(net, data, layer, values) for values in draws], axis=0).tolist()
        found[layer] = curves
    return {"auroc": float(np.mean(auroc(*tested(net, data)))), "curves": found}


def importance(net: nn.Module, image: Tensor, layer: str) -> dict[str, Tensor]:
    """Criterion -> how important each channel (K,) of a layer is."""
    parts = image.split(16)
    found = {
        title: torch.cat([ct.channel_weights(net, part, name, layer) for part in parts]).abs().mean(dim=(0, 1))
        for title, name in {"relevance": "relevancecam", "Grad-CAM": "gradcam"}.items()
    }
    module = net.get_submodule(layer)
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    with torch.no_grad():
        for part in parts:
            net(part)
    handle.remove()
    found["activation"] = torch.cat(seen).abs().flatten(2).mean(dim=(0, 2))
    # The last convolution with a real kernel; a shortcut's convolution has a kernel of 1.
    convolution = [m for m in module.modules() if isinstance(m, nn.Conv3d) and max(m.kernel_size) > 1][-1]
    found["filter L1"] = convolution.weight.detach().abs().flatten(1).sum(dim=1)
    return found


def curve(net: nn.Module, data: Any, layer: str, values: Tensor) -> list[float]:
    """Mean AUROC on the test cases without the least important channels, one value per share."""
    areas, shape = [], (1, -1, *[1] * len(data.phantom.size))
    for share in SHARES:
        keep = torch.ones(len(values))
        keep[values.argsort()[: round(share * len(values))]] = 0
        keep = keep.view(shape)
        handle = net.get_submodule(layer).register_forward_hook(lambda _m, _i, out, keep=keep: out * keep)
        areas.append(float(np.mean(auroc(*tested(net, data)))))
        handle.remove()
    return areas


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
    add_options(parser)
    parser.set_defaults(test_cases=48)
    parser.add_argument("--ranked-on", type=int, default=64, help="training cases that rank the channels")
    parser.add_argument("--draws", type=int, default=2, help="random orders")
    parser.add_argument("--out", type=Path, default=Path("runs/prune_by_relevance"))
    args = parser.parse_args()
    work = functools.partial(study, folder=args.models or args.out)
    jobs = [job | {"ranked_on": args.ranked_on, "draws": args.draws} for job in jobs_of(args)]
    runs = finish(jobs, work, args.out, args.workers, together=lambda job: job["seed"])
    text = f"{hardware()}; mean (range) over {args.seeds} seeds; AUROC, mean over {SHARES}\n\n{told(runs)}"
    (args.out / "table.md").write_text(text)
    figure(runs, args.out / "prune_by_relevance.png")
    console.print(text, soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    main()
