"""Do the alarms speak where a shortcut is learnt, and keep quiet where none is?

    python recipes/alarm_study.py --out runs/alarm_study        # about a quarter of an hour on one free core

Networks learn the phantom with and without a marker on the skin that agrees with each label in 95 % of the cases, with
and without the mask loss. `AttentionMonitor` watches with the alarms as they come. Whether a label was really read off
its marker is told afterwards, by the fall of its AUROC once markers are reversed (more than 0.1: biased).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from _runs import Diverged, Job, Run, finish, hardware, markdown
from monai.networks.nets import ResNet
from torch import nn

import camtrain as ct
from camtrain.callbacks import replay_alarms
from camtrain.data import PhantomDataModule
from camtrain.metrics import LabelAUROC
from camtrain.models import FlattenNet, LitClassifier

LABELS = ["consolidation", "effusion", "cardiomegaly", "aneurysm"]
SIZE = (32, 24, 32)
LAYERS = {"flatten": "net.relu", "resnet": "net.layer3"}
ARMS = [("flatten", None, 0.0), ("flatten", 0.95, 0.0), ("resnet", None, 0.0), ("resnet", 0.95, 0.0),
        ("resnet", None, 1 / 3), ("resnet", 0.95, 1 / 3)]  # fmt: skip
"""Net, agreement of the marker with its label, weight of the mask loss."""
FALL = 0.1


def make_net(name: str) -> nn.Module:
    """A net whose cells see a third of each axis, or a small ResNet whose cells see everything."""
    if name == "flatten":
        return FlattenNet(len(LABELS), size=SIZE)
    return ResNet("basic", [1, 1, 1, 1], [8, 16, 32, 64], spatial_dims=3, n_input_channels=1, num_classes=len(LABELS),
                  conv1_t_stride=2, no_max_pool=True)  # fmt: skip


def train(job: Job) -> dict[str, Any]:
    """One network: figures of every epoch as the monitor keeps them, and the answer of the reversed markers."""
    pl.seed_everything(job["seed"], verbose=False)
    splits = ["test", "shift_reversed"] if job["shortcut"] else ["test"]
    data = PhantomDataModule(labels=LABELS, cases=job["cases"], val_cases=64, test_cases=100, size=SIZE,
                             shortcut=job["shortcut"], seed=job["seed"], test_splits=splits)  # fmt: skip
    model = LitClassifier(make_net(job["net"]), labels=LABELS, lr=2e-3, weight_decay=1e-2, schedule="one_cycle")
    layer = LAYERS[job["net"]]
    monitor = ct.AttentionMonitor(layer, every_n_epochs=0)
    callbacks: list[Any] = [monitor]
    if job["mask"]:
        callbacks.append(ct.MaskLossCallback(layer, weight=job["mask"]))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False,
             "enable_progress_bar": False, "num_sanity_val_steps": 0}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(max_epochs=job["epochs"], accelerator="cpu", callbacks=callbacks, default_root_dir=folder,
                             **quiet)  # fmt: skip
        trainer.fit(model, data)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise Diverged("weights are not finite")
    history = monitor.state_dict()["alarms"]["board"]["history"]["val"]
    return {"history": history, "auroc": answers(model, data) if job["shortcut"] else {}}


def answers(model: nn.Module, data: PhantomDataModule) -> dict[str, dict[str, float]]:
    """AUROC of each label on the test split and on the same cases with reversed markers."""
    found = {}
    for split, loader in zip(data.test_splits, data.test_dataloader(), strict=True):
        metric = LabelAUROC(len(LABELS), "none")
        with torch.no_grad():
            for batch in loader:
                metric.update(model.eval()(batch["image"]), batch["label"])
        found[split] = dict(zip(LABELS, metric.averaged("none").tolist(), strict=True))
    return found


def biased(run: Run) -> set[str]:
    """Labels that were read off their marker."""
    auroc = run["result"]["auroc"]
    return {name for name in LABELS if auroc and auroc["test"][name] - auroc["shift_reversed"][name] > FALL}


def table(runs: list[Run]) -> str:
    """Per arm and alarm: labels for which it was raised at any time, and those for which it stood at the end."""
    rows = []
    for arm in dict.fromkeys((run["job"]["net"], run["job"]["shortcut"], run["job"]["mask"]) for run in runs):
        of = [r for r in runs if (r["job"]["net"], r["job"]["shortcut"], r["job"]["mask"]) == arm]
        wrong = sum(len(biased(run)) for run in of)
        head = [arm[0], "none" if arm[1] is None else f"{arm[1]:.0%}", "yes" if arm[2] else "no", str(len(of)),
                f"{wrong} of {len(of) * len(LABELS)}"]  # fmt: skip
        rows.append([*head, *(_cell(of, name) for name in NAMES)])
    return markdown(["net", "marker", "mask loss", "runs", "biased labels", *NAMES], rows)


def _cell(runs: list[Run], alarm: str) -> str:
    """Labels at the end that are biased + that are not (at any time)."""
    right = wrong = ever = 0
    for run in runs:
        standing: set[str] = set()
        seen: set[str] = set()
        for event in replay_alarms(run["result"]["history"]):
            if event.alarm == alarm:
                (standing.add if event.state == "raised" else standing.discard)(event.label)
                seen.add(event.label)
        right += len(standing & biased(run))
        wrong += len(standing - biased(run))
        ever += len(seen)
    return f"{right} + {wrong} ({ever})"


NAMES = ["reliance", "depth", "energy_below_chance", "same_place", "empty_maps", "drifting", "bias_share"]


def main() -> None:
    """Train, watch, ask who was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--nets", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/alarm_study"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    jobs = [{"net": net, "shortcut": shortcut, "mask": mask, "cases": args.cases, "epochs": args.epochs, "seed": seed}
            for seed in args.seeds for net, shortcut, mask in ARMS if net in args.nets]  # fmt: skip
    runs = finish(jobs, train, args.out, args.workers)
    told = [f"{run['job']}: diverged, {run['diverged']}" for run in runs if "diverged" in run]
    done = [run for run in runs if "result" in run]
    note = f"{hardware()}; {sum(run['seconds'] for run in runs):.0f} s in all"
    text = "\n\n".join([*([table(done)] if done else []), *told, note])
    (args.out / "tables.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
