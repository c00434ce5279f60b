"""Two tables of the Grad-CAM paper, rebuilt in 3D: the pointing game, and rank correlation with occlusion.

    python recipes/gradcam_paper.py --out runs/gradcam_paper        # about a quarter of an hour on one core

Two networks learn the phantom without shortcuts. Each method's maps point at the finding's own voxels, which the
phantom knows, and at the label's organ; with an option to reject (thresholds from validation); and are ranked against
what hiding patches of 8 voxels does to the logit, with two fillings of the patch.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import pytorch_lightning as pl
import torch
from _runs import Diverged, Job, Run, finish, hardware, markdown, spread
from _start import count, out_folder, start
from torch import Tensor

import camtrain as ct
from camtrain import metrics
from camtrain.data import PhantomDataModule
from camtrain.evaluation import occlusion_map, pool_to_patches
from camtrain.models import FlattenNet, LitClassifier, PoolNet

NETS = {"flatten": FlattenNet, "pool": PoolNet}
LAYERS = {"flatten": ["relu"], "pool": ["relu", "features.6"]}  # features.6: the last map before the second stride
METHODS = ["gradcam", "guided_gradcam", "hirescam", "gradcam++", "layercam", "respondcam", "relevancecam",
           "guided_backprop", "random"]  # fmt: skip
LABELS = ["consolidation", "effusion", "cardiomegaly", "aneurysm"]
SIZE = (32, 24, 32)
PATCH, STRIDE, BASELINES = 8, 4, ["air", "mean"]
TOLERANCE = 30.0  # mm: half a cell of the flatten net, so that voxels and cells are held to the same distance
COLUMNS = {
    "finding": "points at the finding", "organ": "points at the organ", "recall": "finding, may reject",
    "air": "occlusion (air)", "air+": "the same, map clipped", "mean": "occlusion (mean)",
    "mean+": "the same, map clipped", "classes": "correlation between classes",
}  # fmt: skip


def explain(model: LitClassifier, image: Tensor, method: str, layer: str) -> Tensor:
    """Maps (B, L, *S') on the grid of the method; `random` is the level of knowing nothing."""
    if method == "random":
        shape = ct.explain(model, image[:1], "hirescam", layer).shape
        return torch.rand(len(image), *shape[1:], generator=torch.Generator().manual_seed(0))
    return torch.cat([ct.explain(model, part, method, layer) for part in image.split(16)])


def scores(model: LitClassifier, data: PhantomDataModule, method: str, layer: str, occluded: Any) -> dict[str, float]:
    """One row of the tables."""
    table, found = data.table, {}
    val, test = (stacked(loader) for loader in (data.val_dataloader(), data.test_dataloader()[0]))
    maps = explain(model, test["image"], method, layer)
    spacing = torch.tensor([320.0, 240.0, 300.0]) / torch.tensor(maps.shape[2:])
    near = {"tolerance_mm": TOLERANCE}
    organs = table.allowed(test["organs"], size=None)
    for name, region in (("finding", test["lesions"]), ("organ", organs)):
        game = metrics.PointingGame(len(LABELS), **near)
        game.update(maps, region, test["label"], spacing=spacing)
        found[name] = game.compute().item()
    on_val = explain(model, val["image"], method, layer)
    least = metrics.rejection_thresholds(on_val, val["lesions"], val["label"], spacing=spacing, **near)
    recall = metrics.PointingRecall(len(LABELS), least, **near)
    recall.update(maps, test["lesions"], test["label"], spacing=spacing)
    found |= {"recall": recall.compute().item(), "rejecting_all": recall.rejecting_all().item()}
    pooled = pool_to_patches(maps, SIZE, PATCH, STRIDE)
    for name, falls in occluded.items():
        for sign, shown in (("", pooled), ("+", pool_to_patches(maps.relu(), SIZE, PATCH, STRIDE))):
            metric = metrics.OcclusionCorrelation(len(LABELS))
            metric.update(shown[: len(falls)], falls, test["label"][: len(falls)])
            found[name + sign] = metric.compute().item()
    return found | {"classes": metrics.class_sensitivity(maps, test["label"]).nanmean().item()}


def stacked(loader: Any) -> dict[str, Tensor]:
    """All cases of a loader in one batch."""
    cases = list(loader.dataset)
    return {key: torch.stack([case[key] for case in cases]) for key in ("image", "label", "organs", "lesions")}


def train(job: Job) -> dict[str, Any]:
    """One network, all methods and layers."""
    counts = {"cases": job["cases"], "val_cases": job["val_cases"], "test_cases": job["test_cases"]}
    data = PhantomDataModule(LABELS, size=SIZE, shortcut=None, seed=job["seed"], test_splits=["test"], **counts)
    pl.seed_everything(job["seed"], verbose=False)
    net = NETS[job["net"]](len(LABELS), size=SIZE)
    model = LitClassifier(net, labels=LABELS, lr=2e-3, weight_decay=1e-2, schedule="one_cycle")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "limit_val_batches": 0,
             "enable_progress_bar": False}  # fmt: skip
    pl.Trainer(max_epochs=job["epochs"], accelerator="cpu", **quiet).fit(model.train(), data)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise Diverged("weights are not finite")
    model.eval()
    test = stacked(data.test_dataloader()[0])
    auroc = metrics.LabelAUROC(len(LABELS))
    with torch.no_grad():
        auroc.update(model(test["image"]), test["label"])
    image = test["image"][: job["occluded"]]
    occluded = {name: occlusion_map(model, image, PATCH, STRIDE, name) for name in BASELINES}
    rows = {layer: {m: scores(model, data, m, layer, occluded) for m in METHODS} for layer in LAYERS[job["net"]]}
    return {"auroc": auroc.compute().item(), "rows": rows}


def tables(runs: list[Run]) -> str:
    """One table per net and layer; mean and range over seeds."""
    parts = []
    for net, layers in LAYERS.items():
        of = [run for run in runs if run["job"]["net"] == net]
        done = [run["result"] for run in of if "result" in run]
        for layer in layers if done else []:
            each = {m: [r["rows"][layer][m] for r in done] for m in METHODS}
            lines = [[m, *(spread(r[c] for r in each[m]) for c in COLUMNS)] for m in METHODS]
            base = spread(r["rejecting_all"] for r in each["random"])
            seeds = f"{len(done)} of {len(of)} seeds; test AUROC {spread(r['auroc'] for r in done)}"
            parts.append(f"**{net}, `{layer}`** ({seeds}; rejecting all: {base})\n")
            parts.append(markdown(["method", *COLUMNS.values()], lines))
        parts += [f"{net}, seed {run['job']['seed']}: diverged, {run['diverged']}" for run in of if "diverged" in run]
    return "\n\n".join(parts)


def main() -> None:
    """Train, point, occlude, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=count, default=500)
    parser.add_argument("--epochs", type=count, default=8)
    parser.add_argument("--test-cases", type=count, default=100)
    parser.add_argument("--occluded", type=count, default=24, help="test cases with an occlusion map")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="which")
    parser.add_argument("--workers", type=count, default=1)
    parser.add_argument("--out", type=out_folder, default="runs/gradcam_paper")
    args = parser.parse_args()
    jobs = [{"net": net, "cases": args.cases, "epochs": args.epochs, "seed": seed, "test_cases": args.test_cases,
             "val_cases": math.ceil(args.test_cases / 2), "occluded": args.occluded}
            for seed in args.seeds for net in args.nets]  # fmt: skip
    runs = finish(jobs, train, args.out, args.workers)
    text = f"{tables(runs)}\n\n{hardware()}; {sum(run['seconds'] for run in runs):.0f} s of training and scoring\n"
    (args.out / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    start(main)
