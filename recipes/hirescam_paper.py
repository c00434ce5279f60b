"""The HiResCAM paper's table: {Grad-CAM, HiResCAM} x {AxialNet and its ablations} x {no mask loss, mask loss}.

    python recipes/hirescam_paper.py                        # five seeds: sixty runs of a minute or two
    python recipes/hirescam_paper.py --seeds 0 --workers 2  # one seed, two processes

Chest phantoms without planted shortcuts. OrganIoU's thresholds are chosen on validation and frozen; maps are scored
also on what the mask loss never saw: lesions, organs without their rim, organs voxel by voxel. Ends with three tables
and a figure in `--out`; an interrupted study goes on where it stopped. docs/results/hirescam_paper.md reads them.
"""

from __future__ import annotations

import argparse
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
import torch
from _paired import METHODS, Paired, figure, report
from _runs import Diverged, Job, finish
from _start import count, out_folder, start
from pretrain_slices import load_trunk, pretrain, same_trunk

import camtrain as ct
from camtrain.data import PhantomDataModule
from camtrain.evaluation import erode, localise
from camtrain.metrics import LabelAUROC
from camtrain.models import AxialNet, BodyCAM, FlattenNet, LitClassifier

ARMS = ["AxialNet", "pool head", "max over slices", "random init", "no custom convs", "FlattenNet"]
# The findings that a net learns from 400 scans of 10 mm voxels in half a minute; the phantom's other four take longer.
LABELS = ["consolidation", "effusion", "cardiomegaly", "aneurysm"]
QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False,
         "accelerator": "cpu", "num_sanity_val_steps": 0}  # fmt: skip


def build(arm: str, size: tuple[int, ...], reading: bool = False) -> torch.nn.Module:
    """A net; `reading`: the one whose maps are shown, which differs for the maximum only."""
    if arm == "FlattenNet":
        return FlattenNet(len(LABELS), size)
    if arm == "pool head":
        return BodyCAM(len(LABELS), "small", size[:2], slice_axis=2)
    # As in the paper, the maximum is read with the mean in its place: else there were a map of one slice group only.
    pool = "max" if arm == "max over slices" and not reading else "mean"
    return AxialNet(len(LABELS), "small", size[:2], 2, pool=pool, custom_convs=arm != "no custom convs")


def mask_loss(job: Job, layer: str | None) -> list[pl.Callback]:
    """The paper's loss is taken of the score of one slice group, of which the logit is the mean (or the maximum)."""
    scales = {"max over slices": 1.0, "FlattenNet": "mean"}
    scale = scales.get(job["arm"], job["size"][2] / 3) if job["scale"] == "paper" else job["scale"]
    return [ct.MaskLossCallback(layer, weight=job["weight"], scale=scale)] if job["mask_loss"] else []


@lru_cache(maxsize=1)
def population(seed: int, cases: int, test_cases: int, size: tuple[int, int, int]) -> PhantomDataModule:
    """The cases of one seed, made once for all arms."""
    return PhantomDataModule(LABELS, cases=cases, val_cases=test_cases, test_cases=test_cases, size=size, seed=seed,
                             shortcut=None, batch_size=8, test_splits=["test"])  # fmt: skip


def train(job: Job) -> dict[str, object]:
    """One net, trained and scored."""
    size = tuple(job["size"])
    data = population(job["seed"], job["cases"], job["test_cases"], size)
    pl.seed_everything(job["seed"], verbose=False)
    net, layer = build(job["arm"], size), None if job["arm"] == "FlattenNet" else "net.stack"
    if job["trunk"]:
        load_trunk(net, Path(job["trunk"]))
    if layer:
        net.trunk.to(memory_format=torch.channels_last)  # a fifth faster on a CPU, nothing else
    model = LitClassifier(net, LABELS, lr=job["lr"], weight_decay=1e-2, schedule="one_cycle")
    pl.Trainer(max_epochs=job["epochs"], callbacks=mask_loss(job, layer), limit_val_batches=0, **QUIET).fit(model, data)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise Diverged("weights are not finite")
    reader = LitClassifier(build(job["arm"], size, reading=True), LABELS)
    reader.load_state_dict(model.state_dict())
    monitor = ct.AttentionMonitor(layer, methods=list(METHODS), every_n_epochs=0)
    with TemporaryDirectory() as folder:  # for the monitor's files, which nobody reads
        trainer = pl.Trainer(callbacks=[monitor], default_root_dir=folder, **QUIET)
        trainer.validate(reader, data, verbose=False)  # chooses the thresholds
        trainer.test(reader, data, verbose=False)
    maps: dict[str, dict[str, float]] = {method: {} for method in METHODS}
    for score in monitor.scores["test"]:
        if score.method in maps:
            maps[score.method][score.measure + (f"/{score.label}" if score.label else "")] = score.value
    regions = {"lesions": "lesions", "organ": lambda b: data.table.allowed(b["organs"]),
               "eroded": lambda b: erode(data.table.allowed(b["organs"]))}  # fmt: skip
    for row in localise(reader, data.test_dataloader()[0], regions, list(METHODS), layer):
        if row.label == "micro":
            for key in ("energy", "hits", "chance", "pairs"):
                maps[row.method][f"{row.region} {key}"] = getattr(row, key)
    return {"auroc": auroc(model, data.test_dataloader()[0]), "val": auroc(model, data.val_dataloader()), "maps": maps}


def auroc(model: LitClassifier, loader: torch.utils.data.DataLoader) -> dict[str, float]:
    """Per label, their mean and the worst."""
    metric = LabelAUROC(len(LABELS))
    with torch.no_grad():
        for batch in loader:
            metric.update(model.eval()(batch["image"]), batch["label"])
    each = metric.averaged("none")
    mean = {"mean": float(each.nanmean()), "worst": float(each[~each.isnan()].min())}
    return dict(zip(LABELS, each.tolist(), strict=True)) | mean


def main() -> None:
    """Pretrain once, train what is missing, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5), help="which")
    parser.add_argument("--cases", type=count, default=400)
    parser.add_argument("--test-cases", type=count, default=150)
    parser.add_argument("--epochs", type=count, default=10)
    parser.add_argument("--size", type=int, nargs=3, default=(32, 24, 24))
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--weight", type=float, default=1 / 3)
    parser.add_argument("--scale", choices=["paper", "mean"], default="paper", help="of the mask loss")
    parser.add_argument("--workers", type=count, default=1)
    parser.add_argument("--out", type=out_folder, default="runs/hirescam_paper")
    args = parser.parse_args()
    trunk = args.out / "trunk.pt"
    wanted = {"size": list(args.size), "cases": max(4, args.cases * 2 // 5), "epochs": max(1, args.epochs // 4)}
    if not same_trunk(trunk, wanted):
        pretrain(**wanted, path=trunk)
    shared = {key: getattr(args, key) for key in ("cases", "test_cases", "epochs", "lr", "weight", "scale")}
    jobs = [shared | {"arm": arm, "mask_loss": mask, "seed": seed, "size": list(args.size),
                      "trunk": "" if arm in ("random init", "FlattenNet") else str(trunk)}
            for seed in args.seeds for arm in args.arms for mask in (False, True)]  # fmt: skip
    table = Paired(finish(jobs, train, args.out, args.workers, together=lambda job: job["seed"]))
    text = report(table)
    (args.out / "table.md").write_text(text + "\n")
    figure(table, args.out / "hirescam_paper.png")
    print(text)


if __name__ == "__main__":
    start(main)
