"""What watching costs: the scores of a validation epoch as a ratio to a plain one, and the pictures by themselves.

    python benchmarks/monitor_cost.py [--pairs 3] [--cases 200] [--size 64] [--labels 8] [--batch 4] [--present 0.15]
    python benchmarks/monitor_cost.py --pairs 0                                        # pictures only

Scores: interleaved pairs of validation passes of MONAI's DenseNet121, with and without the monitor (HiResCAM, all free
measures, no pictures), for its own head, which is affine in the last feature map, and for two linear layers with a ReLU
between them, which is not; processor time, wall time and peak resident memory of each pass. Pictures: a pass with the
panel of 12 cases x 8 labels, 96 pictures with full strips over the epochs, drawn and written to a run folder, less one
without, in seconds of processor time (wall time is no measure where others compute too); it should take one. Alarms:
two epochs of a fit with those that come by default, less two without; they ask about 32 cases, however many there are.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from _pairs import machine
from monai.networks.nets import DenseNet121
from torch import Tensor, nn
from torch.utils.data import DataLoader
from validation_cost import Lit, cases, cost_of, monitor_of, ratios, read_options, spread, trainer_in

from camtrain.reporting.epoch_strip import COLUMNS


def affine_head(labels: int) -> nn.Module:
    """The network as it is."""
    return DenseNet121(spatial_dims=3, in_channels=1, out_channels=labels)


def other_head(labels: int) -> nn.Module:
    """The same with a hidden layer behind the pooling."""
    net = affine_head(labels)
    width = net.class_layers.out.in_features
    net.class_layers.out = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, labels))
    return net


HEADS: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "affine head": (affine_head, "at most 1.10"),
    "two-layer head": (other_head, "at most 1.25"),
}


class Trained(Lit):
    """The same, with as little training as there can be."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        return nn.functional.binary_cross_entropy_with_logits(self.net(batch["image"]), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Steps that change nothing."""
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Watch(pl.Callback):
    """Processor time of each validation of a fit, from before the monitor's first hook to behind its last."""

    def __init__(self) -> None:
        self.took: list[float] = []
        self._start = 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin."""
        self._start = time.process_time()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The validation is over: all that the monitor draws is written."""
        self.took.append(time.process_time() - self._start)


def pictures(options: argparse.Namespace, passes: int = 3) -> list[float]:
    """Seconds of processor time that a pass with 96 pictures, 12 cases x 8 labels, takes more than one without.

    The last pass of fits of as many epochs as a strip has columns: no picture has more on it.
    """
    size = options.size // 16
    net = nn.Sequential(nn.Conv3d(1, 4, 16, 16), nn.ReLU(), nn.Flatten(), nn.Linear(4 * size**3, 8))
    # All labels are present in all cases, and each case shows all of them: no panel of this size has more pairs.
    loader, drawn = DataLoader(cases(12, options.size, 8, 1.0), 4), {"panel_cases": 12, "labels_per_case": 8}
    found = []
    for _ in range(passes):
        took = []
        for how in ({"every_n_epochs": 0}, drawn):
            watch, monitor = Watch(), monitor_of(8, "net.1", report=False, alarms=[], **how)
            with tempfile.TemporaryDirectory() as folder:
                fit = {"max_epochs": COLUMNS, "limit_train_batches": 1, "num_sanity_val_steps": 0}
                trainer_in(folder, watch, monitor, **fit).fit(Trained(net), loader, loader)
                files = Path(folder).rglob(f"{COLUMNS - 1:04d}/*_finding*.jpg")
                written = sum(path.stat().st_size > 0 for path in files)
            took.append(watch.took[-1])
        if written != 12 * 8:
            raise RuntimeError(f"expected 96 pictures in the run folder, found {written}")
        found.append(took[1] - took[0])
    return found


def alarms(options: argparse.Namespace) -> tuple[float, float]:
    """Seconds of processor time that the default alarms ask for, per epoch of a fit, and those of a plain validation.

    Epochs 0 and 1 of a fit with one training batch each; `reliance` and `depth` ask in one of the two.
    """
    torch.manual_seed(0)
    module = Trained(affine_head(options.labels))
    wanted = options.size, options.labels, options.present
    few, loader = (DataLoader(cases(number, *wanted), options.batch) for number in (options.batch, options.cases))
    took = []
    with tempfile.TemporaryDirectory() as folder:
        for asked, given in ((None, few), ([], loader), (None, loader)):  # the first warms both up
            monitor = monitor_of(options.labels, "net.class_layers.relu", every_n_epochs=0, report=False, alarms=asked)
            trainer = trainer_in(folder, monitor, max_epochs=2, limit_train_batches=1, num_sanity_val_steps=0)
            start = time.process_time()
            trainer.fit(module, given, given)
            took.append(time.process_time() - start)
        plain = cost_of(trainer_in(folder), module, loader).processor
    return (took[2] - took[1]) / 2, plain


def main() -> None:
    """Print one line per head and one for the pictures."""
    options = read_options(__doc__, pairs=3, size=64, labels=8, batch=4, cases=200, present=0.15)
    print(f"{options.size}^3, {options.labels} labels; {machine()}")
    drawing = pictures(options)
    print(
        f"pictures of 12 cases x 8 labels, drawn and written: {min(drawing):.2f} s of processor time "
        f"({min(drawing):.2f} to {max(drawing):.2f} in {len(drawing)} passes)",
        flush=True,
    )
    if options.pairs:
        asked, plain = alarms(options)
        print(
            f"alarms of a fit, as they come: {asked:.1f} s of processor time per epoch for forwards of their own, "
            f"{asked / plain:.2f} of a plain validation epoch of {options.cases} cases; not counted below"
        )
    for name, (make, wanted) in HEADS.items() if options.pairs else ():
        print(f"{name}, {options.cases} cases")
        found = spread(ratios(make, "net.class_layers.relu", options))
        print(
            f"{name} in plain validation epochs, median and range: {found}; {wanted}, memory at most 1.05", flush=True
        )


if __name__ == "__main__":
    main()
