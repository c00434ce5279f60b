"""Pictures beside `relevance_cam.py`: methods by layers of one case with two findings, and maps as weights are lost.

    python recipes/relevance_pictures.py --models runs/relevance_cam --out runs/relevance_pictures

`depth_<net>.png`: a line per method and finding, a column per layer. `cascade_<net>.png`: the maps of an early layer
while the network is randomised from its head on (Adebayo et al. 2018), and `cascade_<net>_chart.png` how alike they
stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _depth import LAYERS, add_options, data_of, jobs_of, trained
from _start import count, start
from PIL import Image
from rich.console import Console
from torch import nn

import camtrain as ct
from camtrain.evaluation.randomising import Cascade
from camtrain.evaluation.sanity import spread_stages
from camtrain.evaluation.sanity_table import ALL_LIMIT, HEAD_LIMIT
from camtrain.reporting import Row, geometry, side_by_side
from camtrain.reporting.sanity_plot import plot_cascade

METHODS: list[dict[str, Any]] = [
    {"name": "gradcam"},
    {"name": "gradcam++"},
    {"name": "scorecam", "channels": 16},
    {"name": "relevancecam"},
    {"name": "relevancecam", "contrast": "official-code"},
]
EARLY = {"resnet": "layer2", "vgg": "stage2"}
console = Console()


def title(method: dict[str, Any]) -> str:
    """Name, and the contrast where one was chosen."""
    return " ".join([method["name"], *([method["contrast"]] if "contrast" in method else [])])


def with_two_findings(net: nn.Module, data: Any) -> tuple[dict[str, Any], list[int]]:
    """The test case with two findings whose less certain one is the most certain; without any, the first case."""
    best, certainty, columns = data.test_dataloader()[0].dataset[0], 0.0, [0, 1]
    for case in data.test_dataloader()[0].dataset:
        with torch.no_grad():
            p = net(case["image"][None]).sigmoid()[0].where(case["label"] == 1, 0.0)
        values, places = p.topk(2)
        # Fewer than three findings, so that the picture is about these two.
        if float(values[1]) > certainty and int(case["label"].sum()) == 2:
            best, certainty, columns = case, float(values[1]), sorted(places.tolist())
    return best, columns


def row(case: dict[str, Any], column: int, maps: Sequence[Any], caption: str) -> Row:
    """A coronal slice through the middle of the finding, its voxels outlined."""
    axes, spacing = geometry(np.asarray(case["affine"]))
    lesion = case["lesions"][column].numpy().astype(bool)
    voxels = np.argwhere(lesion)
    middle = (
        [int(n) for n in voxels[np.abs(voxels - voxels.mean(axis=0)).sum(axis=1).argmin()]] if lesion.any() else None
    )
    return Row(case["image"].numpy(), maps, lesion, caption, "coronal", spacing, axes, middle)


def save(rows: list[Row], titles: Sequence[str], path: Path, caption: str) -> None:
    """Few colours, so that the file is small."""
    sheet = Image.fromarray(side_by_side(rows, ["CT", *titles], width=740, caption=caption))
    sheet.quantize(72, kmeans=2, dither=Image.Dither.NONE).save(path, optimize=True)


def depth_grid(net: nn.Module, name: str, data: Any, path: Path) -> None:
    """Methods x layers for both findings of one case."""
    case, columns = with_two_findings(net, data)
    rows = []
    for method in METHODS:
        each = ct.explain(net, case["image"][None], layer=LAYERS[name], labels=columns,
                          **{"method" if k == "name" else k: v for k, v in method.items()})  # fmt: skip
        for n, column in enumerate(columns):
            maps = [maps[0, n].numpy() for maps in each.values()]
            rows.append(row(case, column, maps, f"{title(method)}: {data.labels[column]}"))
    save(rows, LAYERS[name], path, f"{case['id']}; outlined: the finding's voxels; each map on its own scale")


def cascade(net: nn.Module, name: str, data: Any, args: argparse.Namespace) -> None:
    """One finding of that case by stages, and the chart over cases."""
    case, (column, *_) = with_two_findings(net, data)
    image, early = case["image"][None], EARLY[name]
    weights = Cascade(net, image, seed=0)
    stages = [weights.stage(n) for n in (0, *spread_stages(len(weights), args.stages))]
    rows = []
    for method in METHODS:
        asked = {"method" if k == "name" else k: v for k, v in method.items()}
        maps = [ct.explain(s.model, image, layer=early, labels=[column], **asked)[0, 0].numpy() for s in stages]
        rows.append(row(case, column, maps, title(method)))
    titles = [f"{s.number} {s.module}" if s.number else "trained" for s in stages]
    save(rows, titles, args.out / f"cascade_{name}.png", f"{case['id']}: {data.labels[column]}, {early}")
    cases = [data.test_dataloader()[0].dataset[n] for n in range(args.chart_cases)]
    images, label = (torch.stack([each[key] for each in cases]) for key in ("image", "label"))
    table = ct.sanity_check(net, images, METHODS, early, label=label, stages=args.stages, names=data.labels,
                            controls=[{"name": "relevancecam", "contrast": "none"}], progress=False)  # fmt: skip
    (args.out / f"cascade_{name}.csv").write_text(table.as_csv())
    means = table.means()
    names = list(dict.fromkeys(each.method for each in means))
    shown = list(dict.fromkeys(f"{each.stage} {each.module}" for each in means))
    curves = {"mean |Spearman|": {m: [each.strength for each in means if each.method == m] for m in names}}
    chart = plot_cascade(curves, shown, {each.method for each in means if each.control}, width=900, height=420,
                         limits={"mean |Spearman|": [(1, HEAD_LIMIT), (len(shown), ALL_LIMIT)]},
                         title=f"{name}, {early}: what is left of the maps as weights are randomised")  # fmt: skip
    Image.fromarray(chart).quantize(64).save(args.out / f"cascade_{name}_chart.png", optimize=True)


def main() -> None:
    """Train or read, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, out="runs/relevance_pictures")
    parser.set_defaults(seeds=1)
    parser.add_argument("--stages", type=count, default=4)
    parser.add_argument("--chart-cases", type=count, default=8, help="cases of the chart")
    args = parser.parse_args()
    for job in jobs_of(args):
        if job["seed"] == args.seeds - 1:  # one network of each kind
            net, data = trained(job, args.models or args.out), data_of(job)
            depth_grid(net, job["net"], data, args.out / f"depth_{job['net']}.png")
            cascade(net, job["net"], data, args)
    console.print(f"Pictures: {args.out}", soft_wrap=True)


if __name__ == "__main__":
    start(main)
