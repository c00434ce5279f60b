"""Relevance-CAM by depth: is it as good at shallow layers as at the last one, where gradient methods are not?

    python recipes/relevance_cam.py --out runs/relevance_cam      # goes on where it was stopped

A small ResNet and a small VGG learn the phantom without shortcuts. On correctly predicted findings (Lee et al., CVPR
2021, take correctly predicted images): average drop and increase, with air in place of what a map hides; as in the
paper, with the mean intensity there and Relevance-CAM's map not clipped; class sensitivity, and the Gini index of the
channel weights. Against the findings' own voxels: IoU and Dice of what lies above mean + 1 std, and how often, of two
findings in a volume, a map prefers its own. At the end the layer to take, chosen on validation cases.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import _depth as shared
import torch
from _depth import ITSELF, LAYERS, PAPER, mean, title
from _runs import Job, Run, finish, hardware, markdown, spread
from _start import start
from rich.console import Console
from torch import Tensor, nn

import camtrain as ct
from camtrain.evaluation import rank_layers
from camtrain.evaluation.perturbing import masked_probabilities
from camtrain.metrics import mask_iou, region_preference
from camtrain.reporting import dice, segment

OFFICIAL = {"name": "relevancecam", "contrast": "official-code"}
METHODS: list[Any] = ["gradcam", "gradcam++", {"name": "scorecam", "channels": 16}, "relevancecam", OFFICIAL]
CHOSEN = ["gradcam", "relevancecam"]  # a layer is chosen for these
MEASURES = ["average_drop", "average_increase", "class_sensitivity", "channel_sparseness", "mask_iou"]
COLUMNS = {"average_drop": "AD", "average_increase": "AI", **{name: name for name in PAPER}, "lesion IoU": "lesion IoU",
           "Dice": "Dice", "own finding": "own finding", "class_sensitivity": "class sensitivity",
           "channel_sparseness": "Gini", "mask_iou": "organ IoU"}  # fmt: skip


def study(job: Job, folder: Path) -> dict[str, Any]:
    """Scores of one network: method -> layer -> score, its AUROC, and the layers that would be taken."""
    net, data = shared.trained(job, folder), shared.data_of(job)
    logits, label = shared.tested(net, data)
    right = (logits >= 0) & (label == 1)
    if "controls" in job:
        found = shared.controls(net, list(data.test_dataloader()[0].dataset), LAYERS[job["net"]])
        return {"scores": found, "beside another": int(right[right.sum(dim=1) > 1].sum())}
    (loader,), layers = data.test_dataloader(), LAYERS[job["net"]]
    ask = {"names": data.labels, "cases": "correct", "contrast_labels": None, "repeats": 20, "progress": False}
    found = ct.evaluate(net, loader, data.table, METHODS, layers, measures=MEASURES, **ask)
    scores: dict[str, dict[str, dict[str, float | None]]] = {}
    for row in (row for row in found.rows if row.label == "micro"):
        scores.setdefault(row.method, {}).setdefault(row.layer, {})[row.measure] = row.mean
    for (method, layer), values in against_lesions(net, list(loader.dataset), layers).items():
        scores.setdefault(method, {}).setdefault(layer, {}).update(values)
    known = ct.layers(net, loader.dataset[0]["image"][None], depth=1)
    seen = {row.name: row.seen for row in known if row.name in layers}
    picked = ct.evaluate(net, {"val": data.val_dataloader()}, data.table, CHOSEN, layers,
                         measures=["average_drop", "mask_iou", "class_sensitivity"], **ask)  # fmt: skip
    some = any(row.layer for row in picked.rows)  # a network that predicts nothing right has no maps to rank
    taken = {m: next((r.layer for r in rank_layers(picked, m, seen=seen) if r.taken), None) for m in CHOSEN if some}
    areas = shared.auroc(logits, label)
    return {"scores": scores, "auroc": areas, "seen": seen, "taken": taken, "pairs": int(right.sum())}


def against_lesions(net: nn.Module, cases: list[dict[str, Any]], layers: list[str]) -> dict[Any, dict[str, Any]]:
    """(method, layer) -> means over correctly predicted pairs, of what needs the findings' own voxels."""
    sums: dict[Any, dict[str, list[float]]] = {}
    for case in cases:
        image, lesions = case["image"][None].as_subclass(Tensor), case["lesions"][None].as_subclass(Tensor)
        with torch.no_grad():
            before = net(image).sigmoid()
        right = (case["label"] == 1)[None].as_subclass(Tensor) & (before >= 0.5)
        for method in METHODS if bool(right.any()) else []:
            options = dict(method) if isinstance(method, dict) else {"name": method}
            each = ct.explain(net, image, options.pop("name"), layers, size="image", **options)
            for layer, maps in each.items():
                note(sums, (title(method), layer), maps, lesions, right)
                # The paper hides voxels behind the mean intensity, clips the other methods' maps, and not its own.
                clip = "relevance" not in title(method)
                after = masked_probabilities(net, image, maps, right, "mean", positive=clip)
                for name, score in PAPER.items():
                    of = sums[title(method), layer].setdefault(name, [])
                    of += score(before, after, right.float())[right].tolist()
                if method == METHODS[0]:  # the best that a map of this grid could do
                    grid = ct.explain(net, image, "gradcam", layer, labels=[0]).shape[2:]
                    coarse = nn.functional.adaptive_avg_pool3d(lesions.float(), grid)
                    wide = nn.functional.interpolate(coarse, maps.shape[2:], mode="trilinear")
                    note(sums, (ITSELF, layer), wide, lesions, right)
    return {key: {name: mean(values) for name, values in of.items()} for key, of in sums.items()}


def note(sums: dict[Any, Any], key: tuple[str, str], maps: Tensor, lesions: Tensor, right: Tensor) -> None:
    """Add the scores of one case's correctly predicted findings."""
    into, pairs = sums.setdefault(key, {"lesion IoU": [], "Dice": [], "own finding": []}), right.nonzero().tolist()
    into["lesion IoU"] += mask_iou(maps, lesions, right.float())[right].tolist()
    into["own finding"] += region_preference(maps, lesions, right.float())[right].tolist()
    into["Dice"] += [dice(segment(maps[b, k].numpy()), lesions[b, k].numpy()) for b, k in pairs]


def joined(run: Run, other: Run) -> Run:
    """A run with the scores of its controls."""
    result, extra = run.get("result", {}), other.get("result", {"scores": {}})
    for method, of in extra["scores"].items() if result else ():
        for layer, values in of.items():
            result["scores"].setdefault(method, {}).setdefault(layer, {}).update(values)
    result |= {name: value for name, value in extra.items() if name != "scores"}
    return run


def told(runs: list[Run], net: str) -> str:
    """Tables of one network: scores by method and layer, and the layers."""
    mine = [run["result"] for run in runs if run["job"]["net"] == net and "result" in run]
    lost = [f"seed {r['job']['seed']}: {r['diverged']}" for r in runs if r["job"]["net"] == net and "diverged" in r]
    lines = [f"### {net}", "", *(f"Diverged: {line}" for line in lost)]
    areas = spread([mean(r["auroc"]) for r in mine])
    counts = (", ".join(str(r.get(name, "-")) for r in mine) for name in ("pairs", "beside another"))
    lines.append("AUROC {}; correctly predicted findings {}, beside another such finding {}".format(areas, *counts))
    rows = []
    for method in dict.fromkeys(m for result in mine for m in result["scores"]):
        for layer in LAYERS[net]:
            values = [result["scores"].get(method, {}).get(layer, {}) for result in mine]
            rows.append([method, layer, *(spread([v.get(name) for v in values], 2) for name in COLUMNS)])
    lines += ["", markdown(["method", "layer", *COLUMNS.values()], rows), ""]
    shares = [[layer, spread([r["seen"].get(layer) for r in mine], 2),
               *(f"{sum(r['taken'].get(m) == layer for r in mine)} of {len(mine)}" for m in CHOSEN)]
              for layer in LAYERS[net]]  # fmt: skip
    return "\n".join([*lines, markdown(["layer", "seen share", *(f"taken for {m}" for m in CHOSEN)], shares), ""])


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared.add_options(parser, out="runs/relevance_cam")
    args = parser.parse_args()
    work = functools.partial(study, folder=args.models or args.out)
    jobs = shared.jobs_of(args)
    twice = [*jobs, *(job | {"controls": True} for job in jobs)]
    both = finish(twice, work, args.out, args.workers, together=lambda job: job["seed"])
    runs = [joined(*pair) for pair in zip(both[: len(jobs)], both[len(jobs) :], strict=True)]
    text = "\n".join([f"{hardware()}; mean (range) over {args.seeds} seeds\n", *(told(runs, n) for n in args.nets)])
    (args.out / "table.md").write_text(text)
    Console().print(text, soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    start(main)
