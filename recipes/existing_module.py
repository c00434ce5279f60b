"""Add the mask loss to a LightningModule that knows nothing of camtrain: two callbacks, the module is not edited.

    python recipes/existing_module.py

What the batch must have: `image` (B, C, *S), `label` (B, L) with 0, 1 or NaN, `organs` (B, 1, *S) with integer ids.
Other names or tuples: `keys={"image": "img"}` or `adapter=callable`.
"""

from __future__ import annotations

import argparse

import pytorch_lightning as pl
import torch
from monai.networks.nets import ResNet
from torch import Tensor, nn

import camtrain as ct
from camtrain.data import PhantomDataModule


class MyClassifier(pl.LightningModule):
    """An ordinary module, as it may lie in your repository."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        widths = [16, 32, 64, 128]
        self.backbone = ResNet("basic", [1, 1, 1, 1], widths, n_input_channels=1, num_classes=labels, conv1_t_stride=2)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Plain task loss."""
        return nn.functional.binary_cross_entropy_with_logits(self.backbone(batch["image"]), batch["label"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The loss only; AUROC and the attention scores come from the monitor."""
        logits = self.backbone(batch["image"])
        self.log("val/loss", nn.functional.binary_cross_entropy_with_logits(logits, batch["label"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    """Train with both callbacks and print the scores of the last epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", default="runs/existing_module")
    args = parser.parse_args()
    pl.seed_everything(0)
    data = PhantomDataModule(cases=args.cases)  # any loaders with the keys above do; then pass table= and names=
    module = MyClassifier(labels=len(data.labels))
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        default_root_dir=args.out,
        log_every_n_steps=5,
        callbacks=[
            ct.MaskLossCallback(layer="layer3", weight=1 / 3),
            ct.AttentionMonitor(layer="layer3", methods=["hirescam"]),
            pl.callbacks.ModelCheckpoint(monitor="val/auroc", mode="max"),
        ],
    )
    trainer.fit(module, data)
    for key, value in sorted(trainer.callback_metrics.items()):
        if key.count("/") == 1:
            print(f"{key:32s} {float(value):.3f}")


if __name__ == "__main__":
    main()
