"""Is the alarm `depth` right: raised where tidy maps hide a shortcut, quiet where there is none?

    python recipes/depth_study.py --out runs/depth_study      # about 10 minutes on one free core

A network whose last cells see the whole image learns the phantom with a strong mask loss, so that its last maps lie in
the organs, whatever it reads. In half of the runs a marker on the skin agrees with each label in 97.5 % of the cases. A
label is *biased* if its AUROC falls by more than 0.1 once markers are reversed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from _depth_tables import tables
from _runs import Diverged, Job, finish, hardware
from alarm_study import LABELS, SIZE, answers
from torch import Tensor, nn

import camtrain as ct
from camtrain.data import PhantomDataModule
from camtrain.models import LitClassifier

LAYER = "net.last"
RULES = {"relevancecam": {"name": "depth"}, "hirescam": {"name": "depth", "method": "hirescam", "seen": 0.05}}
"""As it comes, and with another method at an earlier layer."""


class DilatedNet(nn.Module):
    """Two convolutions that see little, dilated ones whose cells see everything, a head that pools."""

    def __init__(self, labels: int, width: int = 32, dilations: tuple[int, ...] = (1, 2, 4)) -> None:
        super().__init__()
        self.early = nn.Sequential(*_block(1, width // 2, stride=2), *_block(width // 2, width, stride=2))
        self.mixing = nn.Sequential(*(layer for d in dilations for layer in _block(width, width, dilation=d)))
        self.last = nn.Sequential(*_block(width, width))
        self.head = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(width, labels))

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, L)."""
        logits: Tensor = self.head(self.last(self.mixing(self.early(image))))
        return logits


def _block(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
    convolution = nn.Conv3d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
    return [convolution, nn.BatchNorm3d(outputs), nn.ReLU()]


def train(job: Job) -> dict[str, Any]:
    """One network: the figures of every epoch, and the answer of the reversed markers."""
    pl.seed_everything(job["seed"], verbose=False)
    splits = ["test", "shift_reversed"] if job["shortcut"] else ["test"]
    data = PhantomDataModule(labels=LABELS, cases=job["cases"], val_cases=64, test_cases=100, size=SIZE,
                             shortcut=job["shortcut"], seed=job["seed"], test_splits=splits)  # fmt: skip
    model = LitClassifier(DilatedNet(len(LABELS)), labels=LABELS, lr=2e-3, weight_decay=1e-2, schedule="one_cycle")
    monitors = [ct.AttentionMonitor(LAYER, name=name, every_n_epochs=0, alarms=[rule, "reliance"], report=False)
                for name, rule in RULES.items()]  # fmt: skip
    mask = ct.MaskLossCallback(LAYER, weight=job["mask"])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False,
             "enable_progress_bar": False, "num_sanity_val_steps": 0}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(max_epochs=job["epochs"], accelerator="cpu", callbacks=[*monitors, mask],
                             default_root_dir=folder, **quiet)  # fmt: skip
        trainer.fit(model, data)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise Diverged("weights are not finite")
    states = {name: monitor.state_dict()["alarms"] for name, monitor in zip(RULES, monitors, strict=True)}
    history = {name: state["board"]["history"]["val"] for name, state in states.items()}
    mid = {name: state["questions"]["mid"] for name, state in states.items()}
    return {"history": history, "mid": mid, "auroc": answers(model, data)}


def main() -> None:
    """Train, watch, ask who was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--mask", type=float, default=3.0, help="weight of the mask loss")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--chosen", type=int, nargs="+", default=[1, 2, 3], help="seeds that thresholds are chosen on")
    parser.add_argument("--out", type=Path, default=Path("runs/depth_study"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    jobs = [{"shortcut": shortcut, "mask": args.mask, "cases": args.cases, "epochs": args.epochs, "seed": seed}
            for seed in args.seeds for shortcut in (0.975, None)]  # fmt: skip
    runs = finish(jobs, train, args.out)
    told = [f"{run['job']}: diverged, {run['diverged']}" for run in runs if "diverged" in run]
    note = f"{hardware()}; {sum(run['seconds'] for run in runs):.0f} s in all"
    text = "\n\n".join([tables([run for run in runs if "result" in run], list(RULES), args.chosen), *told, note])
    (args.out / "tables.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
