"""What watching costs: the scores of a validation epoch as a ratio to a plain one, and the pictures by themselves.

    python benchmarks/monitor_cost.py [--pairs 5] [--cases 200] [--size 64] [--labels 8] [--batch 4] [--present 0.15]
    python benchmarks/monitor_cost.py --pairs 0                                        # pictures only

Scores: interleaved pairs of validation passes of MONAI's DenseNet121, with and without the monitor (HiResCAM, all free
measures, no pictures), for its own head, which is affine in the last feature map, and for two linear layers with a ReLU
between them, which is not. Pictures: the panel of one epoch, drawn, and drawn and written to a run folder, in seconds
of processor time per epoch (wall time is no measure where others compute too); 12 cases x 8 labels should take one.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from monai.networks.nets import DenseNet121
from torch import nn
from torch.utils.data import DataLoader
from validation_cost import ORGANS, Lit, cases, seconds

import camtrain as ct
from camtrain.callbacks._outlets import Outlets
from camtrain.callbacks._panel import PanelEntry
from camtrain.callbacks._pictures import publish_pictures
from camtrain.reporting import RunDir, window_of


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


def ratios(make: Callable[[int], nn.Module], options: argparse.Namespace) -> list[float]:
    """(pass with the monitor) / (plain pass) of every pair; who goes first alternates."""
    torch.manual_seed(0)
    module = Lit(make(options.labels))
    names = [f"finding {i}" for i in range(options.labels)]
    table = {
        "organs": {organ: i + 1 for i, organ in enumerate(ORGANS)},
        "labels": {label: [ORGANS[i % 3]] for i, label in enumerate(names)},
    }
    monitor = ct.AttentionMonitor(layer="net.class_layers.relu", table=table, names=names, every_n_epochs=0)
    loader = DataLoader(cases(options.cases, options.size, options.labels, options.present), options.batch)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        quiet = dict.fromkeys(
            ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
        ) | {"accelerator": "cpu", "default_root_dir": folder}
        plain, watched = pl.Trainer(**quiet), pl.Trainer(**quiet, callbacks=[monitor])
        # A few cases warm both up.
        few = DataLoader(cases(4, options.size, options.labels, options.present), options.batch)
        for trainer in (plain, watched):
            seconds(trainer, module, few)
        for pair in range(options.pairs):
            order = (plain, watched) if pair % 2 else (watched, plain)
            times = {id(trainer): seconds(trainer, module, loader) for trainer in order}
            found.append(times[id(watched)] / times[id(plain)])
    return found


def panel(number: int, labels: int, size: int) -> list[PanelEntry]:
    """The pairs of a full panel: smooth noise, an organ as a box, maps of 4^3 cells."""
    rng = np.random.default_rng(0)
    entries = []
    for case in range(number):
        coarse = torch.from_numpy(rng.random((1, 1, 16, 16, 16), dtype=np.float32))
        image = nn.functional.interpolate(coarse, size=(size,) * 3, mode="trilinear")[0].numpy()
        allowed = np.zeros((size,) * 3, dtype=bool)
        allowed[size // 4 : size // 2, size // 4 : -size // 4, size // 4 :] = True
        entries += [
            PanelEntry(
                case=f"case {case}",
                label=f"finding {label}",
                present=True,
                probability=0.5,
                image=image,
                maps={"hirescam": rng.normal(size=(4, 4, 4)).astype(np.float32)},
                allowed=allowed,
                affine=np.diag([1.5, 1.5, 2.0, 1.0]),
                window=window_of(image[0]),
            )
            for label in range(labels)
        ]
    return entries


def pictures(options: argparse.Namespace, passes: int = 2) -> tuple[list[float], list[float]]:
    """Seconds of processor time for drawing one epoch's panel, and for drawing it and writing it to the run folder."""
    entries = panel(12, 8, options.size)
    drawing, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        outlets = Outlets(RunDir(Path(folder)), [], 0)
        for number in range(passes):
            start = time.process_time()
            for entry in entries:
                entry.draw({"hirescam": 4.0})
            drawing.append(time.process_time() - start)
            start = time.process_time()
            publish_pictures(outlets, {"val": entries}, {"hirescam": 4.0}, None, number, number)
            whole.append(time.process_time() - start)
    return drawing, whole


def main() -> None:
    """Print one line per head and one for the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for word, kind, default in (
        ("pairs", int, 5),
        ("size", int, 64),
        ("labels", int, 8),
        ("batch", int, 4),
        ("cases", int, 200),
        ("present", float, 0.15),
    ):
        parser.add_argument(f"--{word}", type=kind, default=default)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for talker in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(talker).setLevel(logging.ERROR)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {options.size}^3, {options.labels} labels")
    drawing, whole = pictures(options)
    print(
        f"pictures of 12 cases x 8 labels: drawn in {min(drawing):.2f} s of processor time, drawn and written in "
        f"{min(whole):.2f} s (best of {len(whole)})",
        flush=True,
    )
    for name, (make, wanted) in HEADS.items() if options.pairs else ():
        found = sorted(ratios(make, options))
        print(
            f"{name}: {statistics.median(found):.3f} x a plain validation epoch of {options.cases} cases "
            f"({found[0]:.3f} to {found[-1]:.3f} in {options.pairs} pairs; {wanted})",
            flush=True,
        )


if __name__ == "__main__":
    main()
