"""What the recipes on depth share: two networks with several layers, trained once on the phantom and kept.

Not a recipe. Weights lie in `<folder>/models`, under a name that says what they depend on.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from _runs import Diverged, Job, finite
from _start import count, keep, out_folder, with_networks
from monai.networks.nets import ResNet
from torch import Tensor, nn

import camtrain as ct
from camtrain.data import PhantomDataModule
from camtrain.evaluation.perturbing import masked_probabilities
from camtrain.metrics import LabelAUROC, average_drop, average_increase
from camtrain.models import LitClassifier, VGGNet

LABELS = ["ground_glass", "consolidation", "effusion", "aneurysm"]
ITSELF, NOISE = "(the finding itself)", "(noise)"
PAPER = {"AD, paper": average_drop, "AI, paper": average_increase}
LAYERS = {"resnet": ["layer1", "layer2", "layer3", "layer4"], "vgg": ["stage1", "stage2", "stage3"]}


def network(name: str, labels: int, size: tuple[int, ...]) -> nn.Module:
    """MONAI's ResNet-10 at an eighth of its width, or a VGG of five convolutions; both with BatchNorm."""
    if name == "vgg":
        return VGGNet(labels, size, widths=(8, 16, 32), depths=(1, 2, 2))
    # No max-pool and one stride of 2 before layer1, so that small scans leave shallow layers a real grid.
    stem = {"conv1_t_size": 3, "conv1_t_stride": 2, "no_max_pool": True}
    return ResNet("basic", [1, 1, 1, 1], [8, 16, 32, 64], spatial_dims=len(size), n_input_channels=1,
                  num_classes=labels, **stem)  # fmt: skip


def add_options(parser: argparse.ArgumentParser, out: str) -> None:
    """What decides on the training, and the folder of results."""
    parser.add_argument("--cases", type=count, default=400, help="training cases")
    parser.add_argument("--test-cases", type=count, default=24)
    parser.add_argument("--epochs", type=count, default=10)
    parser.add_argument("--size", type=int, nargs=3, default=(40, 30, 40))
    parser.add_argument("--nets", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--seeds", type=count, default=3, help="how many, counted from 0")
    parser.add_argument("--workers", type=count, default=1)
    parser.add_argument("--models", type=with_networks, help="folder of an earlier recipe whose networks are taken")
    parser.add_argument("--out", type=out_folder, default=out)


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """A job per seed and network."""
    shared = {"cases": args.cases, "test_cases": args.test_cases, "epochs": args.epochs, "size": list(args.size)}
    return [{"net": net, "seed": seed, **shared} for seed in range(args.seeds) for net in args.nets]


def data_of(job: Job) -> PhantomDataModule:
    """Phantom without markers; the same for all networks of a seed."""
    return _data(job["cases"], job["test_cases"], tuple(job["size"]), job["seed"])


@functools.lru_cache(maxsize=1)
def _data(cases: int, test_cases: int, size: tuple[int, int, int], seed: int) -> PhantomDataModule:
    return PhantomDataModule(LABELS, cases, size, shortcut=None, seed=seed, test_splits=["test"], val_cases=test_cases,
                             test_cases=test_cases)  # fmt: skip


def trained(job: Job, folder: Path) -> nn.Module:
    """The job's network in eval mode: read where it was trained before, else trained and written.

    Raises:
        Diverged: Its logits are not finite.
    """
    data = data_of(job)
    pl.seed_everything(job["seed"], verbose=False)
    net = network(job["net"], len(data.labels), data.phantom.size)
    model = LitClassifier(net, labels=data.labels, lr=3e-3, weight_decay=1e-2, schedule="one_cycle")
    told = {key: job[key] for key in ("cases", "epochs", "size")}
    path = folder / "models" / f"{job['net']}-{job['seed']}-{zlib.crc32(json.dumps(told).encode()):08x}.pt"
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
    else:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        pl.Trainer(max_epochs=job["epochs"], accelerator="cpu", limit_val_batches=0, enable_progress_bar=False,
                   **quiet).fit(model, data)  # fmt: skip
        keep(net.state_dict(), path)
    return net.eval()


def tested(net: nn.Module, data: PhantomDataModule) -> tuple[Tensor, Tensor]:
    """Logits and labels (N, L) of the test cases.

    Raises:
        Diverged: The logits are not finite.
    """
    (loader,) = data.test_dataloader()
    with torch.no_grad():
        each = [(net(batch["image"]).as_subclass(Tensor), batch["label"].as_subclass(Tensor)) for batch in loader]
    logits, label = (torch.cat(part) for part in zip(*each, strict=True))
    if not bool(logits.isfinite().all()):
        raise Diverged("logits are not finite")
    return logits, label


def auroc(logits: Tensor, label: Tensor) -> list[float]:
    """Per label; NaN where all cases are alike."""
    metric = LabelAUROC(num_labels=label.shape[1], average="none")
    metric.update(logits, label)
    return [float(value) if math.isfinite(value) else math.nan for value in metric.compute().tolist()]


def title(method: Any) -> str:
    """As `ct.evaluate` writes it."""
    options = dict(method) if isinstance(method, dict) else {"name": method}
    name = options.pop("name")
    return f"{name}({', '.join(f'{k}={v}' for k, v in options.items())})" if options else name


def mean(values: list[float]) -> float | None:
    """Of the values that are numbers."""
    known = finite(values)
    return sum(known) / len(known) if known else None


def controls(net: nn.Module, cases: Sequence[dict[str, Any]], layers: list[str]) -> dict[str, dict[str, Any]]:
    """What average drop and increase say of maps that need no method: the finding itself, and noise, on each grid."""
    sums: dict[str, dict[str, dict[str, list[float]]]] = {ITSELF: {}, NOISE: {}}
    for number, case in enumerate(cases):
        image, lesions = case["image"][None].as_subclass(Tensor), case["lesions"][None].as_subclass(Tensor)
        with torch.no_grad():
            before = net(image).sigmoid()
        right = (case["label"] == 1)[None].as_subclass(Tensor) & (before >= 0.5)
        grids = ct.explain(net, image, "gradcam", layers, labels=[0])
        for layer, cells in grids.items():
            noise = torch.rand(1, len(case["label"]), *cells.shape[2:], generator=torch.Generator().manual_seed(number))
            coarse = nn.functional.adaptive_avg_pool3d(lesions.float(), cells.shape[2:])
            for name, maps in {ITSELF: coarse, NOISE: noise}.items():
                into = sums[name].setdefault(layer, {})
                for ground, words in {"air": ("average_drop", "average_increase"), "mean": tuple(PAPER)}.items():
                    after = masked_probabilities(net, image, maps, right, ground)
                    for word, score in zip(words, PAPER.values(), strict=True):
                        into.setdefault(word, []).extend(score(before, after, right.float())[right].tolist())
    return {m: {layer: {n: mean(v) for n, v in into.items()} for layer, into in of.items()} for m, of in sums.items()}
