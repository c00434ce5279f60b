"""What a validation pass costs with every free measure: interleaved pairs of passes, with and without the monitor.

    python benchmarks/validation_cost.py [--pairs 15] [--size 64] [--labels 80] [--batch 2] [--cases 8] [--present 0.15]

Prints, per network, median and range of (pass with AttentionMonitor) / (plain pass) of the same Trainer on the same
cases: processor time, wall time and peak resident memory of the process. The monitor scores HiResCAM on the last
feature map against the organs of each label: OrganIoU at 53 thresholds, energy inside with its chance level, pointing
game, mask IoU, relevance rank, empty maps, class sensitivity, sums and bias share, and the AUROC. Pictures are off;
they are drawn every few epochs and are not measures.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from _pairs import machine
from monai.networks.nets import DenseNet121, ResNet
from torch import Tensor, nn
from torch.utils.data import DataLoader

import camtrain as ct

NETS: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "MONAI ResNet18": (
        lambda n: ResNet("basic", [2, 2, 2, 2], [64, 128, 256, 512], spatial_dims=3, n_input_channels=1, num_classes=n),
        "net.layer4",
    ),
    "MONAI DenseNet121": (
        lambda n: DenseNet121(spatial_dims=3, in_channels=1, out_channels=n),
        "net.class_layers.relu",
    ),
}
ORGANS = ("right lung", "left lung", "heart")


class Lit(pl.LightningModule):
    """A user's module: it knows nothing of camtrain."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.net(image)
        return logits

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss = nn.functional.binary_cross_entropy_with_logits(self.net(batch["image"]), batch["label"])
        self.log("loss", loss)
        return loss


def cases(number: int, size: int | tuple[int, int, int], labels: int, present: float) -> list[dict[str, Tensor]]:
    """Noise with three organs as boxes: cost depends on grids and on how many labels are present."""
    generator = torch.Generator().manual_seed(0)
    shape = (size, size, size) if isinstance(size, int) else size
    organs = torch.zeros(1, *shape, dtype=torch.uint8)
    first, second, third = (edge // 3 for edge in shape)
    for index in range(3):
        organs[:, index * first : (index + 1) * first, second : 2 * second, third:] = index + 1
    return [
        {
            "image": torch.randn(1, *shape, generator=generator),
            "label": (torch.rand(labels, generator=generator) < present).float(),
            "organs": organs,
        }
        for _ in range(number)
    ]


def trainer_in(folder: str, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A Trainer that says and keeps nothing of its own."""
    words = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    quiet = dict.fromkeys(words, False) | {"accelerator": "cpu", "default_root_dir": folder}
    return pl.Trainer(callbacks=list(callbacks), **quiet, **options)


class Cost(NamedTuple):
    """What one validation pass took, or what one took in units of another."""

    processor: float
    """Seconds of processor time of this process, which others do not add to."""
    wall: float
    """Seconds, those of other programs included."""
    peak: float
    """Most resident memory in MiB; NaN where the system does not tell (it is asked of Linux)."""

    def over(self, plain: Cost) -> Cost:
        """Ratios."""
        return Cost(*(mine / others for mine, others in zip(self, plain, strict=True)))


def cost_of(trainer: pl.Trainer, module: pl.LightningModule, loader: DataLoader) -> Cost:
    """One validation pass."""
    gc.collect()
    forget_peak()
    processor, wall = time.process_time(), time.perf_counter()
    trainer.validate(module, loader, verbose=False)
    return Cost(time.process_time() - processor, time.perf_counter() - wall, peak_mib())


def forget_peak() -> None:
    """Give back what is free, and let the system count the most resident memory anew."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Most resident memory since then."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    return float("nan")


def monitor_of(labels: int, layer: str, **options: Any) -> ct.AttentionMonitor:
    """A monitor of findings that may be read from one of the three organs each."""
    names = [f"finding {i}" for i in range(labels)]
    table = {
        "organs": {organ: i + 1 for i, organ in enumerate(ORGANS)},
        "labels": {label: [ORGANS[i % 3]] for i, label in enumerate(names)},
    }
    return ct.AttentionMonitor(layer=layer, table=table, names=names, **options)


def ratios(make: Callable[[int], nn.Module], layer: str, options: argparse.Namespace) -> list[Cost]:
    """(with) / (without) of every pair, told as they come; who goes first alternates."""
    torch.manual_seed(0)
    module = Lit(make(options.labels))
    monitor = monitor_of(options.labels, layer, every_n_epochs=0)
    loader = DataLoader(cases(options.cases, options.size, options.labels, options.present), options.batch)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        plain, watched = trainer_in(folder), trainer_in(folder, monitor)
        # A few cases warm both up.
        few = DataLoader(cases(2 * options.batch, options.size, options.labels, options.present), options.batch)
        for trainer in (plain, watched):
            cost_of(trainer, module, few)
        for pair in range(options.pairs):
            order = (plain, watched) if pair % 2 else (watched, plain)
            took = {id(trainer): cost_of(trainer, module, loader) for trainer in order}
            without, ratio = took[id(plain)], took[id(watched)].over(took[id(plain)])
            found.append(ratio)
            print(
                f"  pair {pair + 1}: {ratio.processor:.3f} x {without.processor:.1f} s of processor time, "
                f"{ratio.wall:.3f} x {without.wall:.1f} s of wall time, {ratio.peak:.3f} x {without.peak:.0f} MiB",
                flush=True,
            )
    return found


def spread(found: list[Cost]) -> str:
    """Median and range of each ratio."""
    parts = []
    for word, values in zip(("processor time", "wall time", "memory"), zip(*found, strict=True), strict=True):
        parts.append(f"{word} {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    return ", ".join(parts)


def read_options(description: str | None, **defaults: float | str) -> argparse.Namespace:
    """Numbers from the command line; no lines of Lightning's about each pass."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for word, default in defaults.items():
        parser.add_argument(f"--{word}", type=type(default), default=default)
    warnings.simplefilter("ignore")
    for talker in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(talker).setLevel(logging.ERROR)
    return parser.parse_args()


def main() -> None:
    """Print one line per network, each in a process of its own: what one leaves behind is not the next one's."""
    options = read_options(__doc__, pairs=15, size=64, labels=80, batch=2, cases=8, present=0.15, net="all")
    if options.net == "all":
        for name in NETS:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--net", name], check=True)
        return
    print(
        f"{options.pairs} interleaved pairs, {options.cases} cases of {options.size}^3, batch {options.batch}, "
        f"{options.labels} labels of which {options.present:.0%} are present, {machine()}"
    )
    make, layer = NETS[options.net]
    print(options.net)
    print(f"{options.net} in plain passes, median and range: {spread(ratios(make, layer, options))}", flush=True)


if __name__ == "__main__":
    main()
