"""Watch where a network looks while it trains, without changing how it trains. Works without any organs, too.

    python recipes/monitor_only.py [--organs none]

With organs: OrganIoU, energy inside, pointing game and mask IoU per label in every validation epoch, next to AUROC.
Without: AUROC and the pictures. Everything goes to the Trainer's loggers and to the run folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl

import camtrain as ct
from camtrain.data import PhantomDataModule
from camtrain.models import LitClassifier, PoolNet


def without_organs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as it is where nobody segmented anything."""
    return {key: value for key, value in batch.items() if key not in ("organs", "has_organs")}


def main() -> None:
    """Train and watch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--organs", choices=["exact", "none"], default="exact")
    parser.add_argument("--out", default="runs/monitor_only")
    args = parser.parse_args()
    pl.seed_everything(0)
    data = PhantomDataModule(cases=args.cases)
    monitor = ct.AttentionMonitor(
        methods=["hirescam", "gradcam", "layercam"],
        every_n_epochs=2,
        adapter=without_organs if args.organs == "none" else None,
    )
    trainer = pl.Trainer(max_epochs=args.epochs, callbacks=[monitor], default_root_dir=args.out, log_every_n_steps=5)
    trainer.fit(LitClassifier(PoolNet(), labels=data.labels), data)
    for score in monitor.scores["val"]:
        if score.label is None:
            print(f"{score.measure:22s} {score.method or '':10s} {score.value:.3f}")
    print(f"pictures and scores.csv: {monitor.publisher.run_dir.path}")


if __name__ == "__main__":
    main()
