"""Is a model that learnt a shortcut found out from validation data alone? Audit first, shifted test data afterwards.

    python recipes/bias_audit.py --out runs/bias_audit        # about a quarter of an hour on one core

Networks learn the phantom while a marker on the skin agrees with each label in 95 %, 75 % or 50 % (means nothing, the
mended data) of the cases. As they train, `camtrain.evaluation.audit` judges each label by validation data of the
same kind. Only then the test decides: a label is biased if its AUROC falls by more than 0.1 once markers are reversed.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from typing import Any

import pytorch_lightning as pl
import torch
from _bias_tables import MARKER, arms, by_epoch, draw, judges, pairs
from _runs import Diverged, Job, finish, hardware
from _start import count, out_folder, start

import camtrain as ct
from camtrain.data import PhantomDataModule
from camtrain.data.phantom import unpack
from camtrain.evaluation import audit
from camtrain.metrics import LabelAUROC, energy_inside
from camtrain.models import FlattenNet, LitClassifier, PoolNet

NETS = {"flatten": FlattenNet, "pool": PoolNet}
LABELS = ["consolidation", "effusion", "cardiomegaly", "aneurysm"]
NAN = float("nan")
MEASURES = ["energy_inside", "energy_inside_chance", "reliance"]
STRENGTHS = [0.95, 0.75, 0.5]


@functools.lru_cache(maxsize=2)
def phantom(shortcut: float, cases: int, seed: int) -> PhantomDataModule:
    """A population; for validation an eighth of the training cases, for each test a third."""
    return PhantomDataModule(labels=LABELS, cases=cases, val_cases=max(8, cases // 8), test_cases=max(8, cases // 3),
                             size=(32, 24, 32), shortcut=shortcut, seed=seed,
                             test_splits=["test", "shift_reversed"])  # fmt: skip


class Audits(pl.Callback):
    """After the first and every second epoch: figures and verdicts on validation data."""

    def __init__(self, data: PhantomDataModule) -> None:
        self.data = data
        self.found: dict[str, dict[str, Any]] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        if not all(bool(p.isfinite().all()) for p in pl_module.parameters()):
            raise Diverged(f"weights are not finite after epoch {trainer.current_epoch + 1}")
        epoch, last = trainer.current_epoch + 1, trainer.current_epoch + 1 == trainer.max_epochs
        if epoch > 1 and epoch % 2 and not last:
            return
        scores = ct.evaluate(pl_module, self.data, methods=["hirescam", "gradcam"], measures=MEASURES, splits=["val"],
                             replacements=["case", "air"], repeats=20, progress=False)  # fmt: skip
        said = audit(scores)
        self.found[str(epoch)] = {
            row.label: {"suspect": row.suspect, "figures": dict(row.figures), "flags": dict(row.flags)}
            for row in said.labels
        }
        for label, value in on_marker(pl_module, self.data).items() if last else ():
            self.found[str(epoch)][label]["figures"][MARKER] = value
            self.found[str(epoch)][label]["flags"][MARKER] = value > said.limits.energy


def on_marker(model: pl.LightningModule, data: PhantomDataModule) -> dict[str, float]:
    """Share of HiResCAM's positive mass on the label's own marker, in multiples of chance, where both are present."""
    shares: list[list[float]] = [[] for _ in data.labels]
    levels: list[list[float]] = [[] for _ in data.labels]
    for index, case in enumerate(data.val_dataloader().dataset):
        marks = torch.from_numpy(unpack(data.phantom.case("val", index).marker_bits, data.labels))[None]
        label = case["label"][None] * marks.flatten(2).any(dim=2)
        maps = ct.explain(model, case["image"][None], size="image")
        for column, value in enumerate(energy_inside(maps, marks, label)[0].tolist()):
            if value == value:
                shares[column].append(value)
                levels[column].append(float(marks[0, column].float().mean()))
    means = [statistics.mean(s) / statistics.mean(c) if s else NAN for s, c in zip(shares, levels, strict=True)]
    return dict(zip(data.labels, means, strict=True))


def train(job: Job) -> dict[str, Any]:
    """One network: audits by epoch, and the test data's answer, that of the 95 % phantom for all."""
    data = phantom(job["shortcut"], job["cases"], job["seed"])
    pl.seed_everything(job["seed"], verbose=False)
    net = NETS[job["net"]](len(LABELS), size=data.phantom.size)
    model = LitClassifier(net, labels=LABELS, lr=2e-3, weight_decay=1e-2, schedule="one_cycle")
    audits = Audits(data)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "limit_val_batches": 0,
             "enable_progress_bar": False}  # fmt: skip
    pl.Trainer(max_epochs=job["epochs"], accelerator="cpu", callbacks=[audits], **quiet).fit(model, data)
    tests = phantom(STRENGTHS[0], job["cases"], job["seed"])
    aurocs = {}
    for split, loader in zip(tests.test_splits, tests.test_dataloader(), strict=True):
        metric = LabelAUROC(len(LABELS), "none")
        with torch.no_grad():
            for batch in loader:
                metric.update(model.eval()(batch["image"]), batch["label"])
        aurocs[split] = dict(zip(LABELS, metric.averaged("none").tolist(), strict=True))
    return {"epochs": audits.found, "auroc": aurocs}


def main() -> None:
    """Train, audit, test, say who was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=count, default=500)
    parser.add_argument("--epochs", type=count, default=8)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="which")
    parser.add_argument("--workers", type=count, default=1)
    parser.add_argument("--out", type=out_folder, default="runs/bias_audit")
    args = parser.parse_args()
    jobs = [{"net": net, "shortcut": s, "cases": args.cases, "epochs": args.epochs, "seed": seed}
            for seed in args.seeds for s in STRENGTHS for net in args.nets]  # fmt: skip
    runs = finish(jobs, train, args.out, args.workers, together=lambda job: job["seed"])
    done = [run for run in runs if "result" in run]
    rows = pairs(done)
    tables = [arms(rows, runs), judges(rows), by_epoch(done)] if done else []
    told = [f"{run['job']}: diverged, {run['diverged']}" for run in runs if "diverged" in run]
    text = "\n\n".join([*tables, *told, f"{hardware()}; {sum(run['seconds'] for run in runs):.0f} s in all"])
    (args.out / "tables.md").write_text(text + "\n")
    print(text)
    if done:
        draw(rows, args.out / "bias_audit.png")


if __name__ == "__main__":
    start(main)
