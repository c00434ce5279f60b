"""Every attention method on the same case: one picture each, one sheet, and the account of the logit in words.

    python recipes/every_method.py

A small flatten-head network learns the phantom for a few epochs; a pool-head one too, for CAM, which exists only there.
About three minutes on two cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import camtrain as ct
from camtrain.data import PhantomDataModule
from camtrain.data.phantom import LABELS
from camtrain.models import FlattenNet, LitClassifier, PoolNet
from camtrain.reporting import compose_grid, compose_panel, geometry

console = Console()


def train(make: Callable[..., torch.nn.Module], data: PhantomDataModule, args: argparse.Namespace) -> LitClassifier:
    """A few epochs without any mask loss."""
    pl.seed_everything(args.seed, verbose=False)
    net = make(len(data.labels), size=data.phantom.size)
    model = LitClassifier(net, labels=data.labels, lr=2e-3, weight_decay=1e-2, schedule="one_cycle")
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, data)
    return model.eval()


def first_case(data: PhantomDataModule, label: str) -> dict[str, Any]:
    """The first test case with that finding and at least one other."""
    dataset = data.test_dataloader()[0].dataset
    index = data.labels.index(label)
    cases = (dataset[i] for i in range(len(dataset)))
    return next(c for c in cases if c["label"][index] == 1 and c["label"].sum() > 1)


def panel(case: dict[str, Any], maps: np.ndarray, caption: str, region: np.ndarray, width: int) -> np.ndarray:
    """Three planes through the organ, with the map laid over."""
    axes, spacing = geometry(np.asarray(case["affine"]))
    image = case["image"].numpy()
    return compose_panel(image, {caption: maps}, region, spacing=spacing, axes=axes, width=width)


def main() -> None:
    """Train, explain one case by every method, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--test-cases", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--label", choices=LABELS, default="effusion")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/every_method"))
    args = parser.parse_args()
    data = PhantomDataModule(cases=args.cases, test_cases=args.test_cases, shortcut=None, test_splits=["test"])
    flat = train(FlattenNet, data, args)
    pool = train(PoolNet, data, args)
    case = first_case(data, args.label)
    image, index = case["image"][None], data.labels.index(args.label)
    region = data.table.select([args.label]).allowed(case["organs"][None])[0, 0].numpy()

    args.out.mkdir(parents=True, exist_ok=True)
    table = Table("method", "grid", "sum of cells", "inside the organ", "seconds")
    table.title = f"{args.label}, logit {flat(image)[0, index].item():+.2f}"
    panels = []
    for method in ct.methods():
        model = pool if method.name == "cam" else flat
        start = time.perf_counter()
        maps = ct.explain(model, image, method.name, labels=[index])
        seconds = time.perf_counter() - start
        inside = data.table.select([args.label]).allowed(case["organs"][None], size=maps.shape[2:])
        positive = maps.clamp(min=0)
        share = (positive * inside).sum() / positive.sum().clamp(min=1e-30)
        grid = " x ".join(map(str, maps.shape[2:]))
        table.add_row(method.name, grid, f"{maps.sum():+.3g}", f"{share:.0%}", f"{seconds:.2f}")
        drawn = panel(case, maps[0, 0].numpy(), method.name, region, 640)
        Image.fromarray(drawn).save(args.out / f"{method.name}.jpg", quality=90)
        panels.append(panel(case, maps[0, 0].numpy(), method.name, region, 440))
    Image.fromarray(compose_grid(panels, columns=3)).save(args.out / "every_method.jpg", quality=90)
    console.print(table)
    console.print("sum of cells: signed; inside the organ: share of the positive part of the map.")
    batch = {key: value[None] if isinstance(value, torch.Tensor) else [value] for key, value in case.items()}
    for description in ct.describe(flat, batch, data.table, names=data.labels):
        console.print(str(description), soft_wrap=True)
    console.print(f"Pictures: {args.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
