"""The mask loss in a plain PyTorch loop: `LayerTap` watches the layer, `OrganMaskLoss` is one more term.

python recipes/plain_pytorch.py
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import camtrain as ct
from camtrain.data import PhantomDataModule
from camtrain.models import FlattenNet


def main() -> None:
    """Train and print both terms of the loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    data = PhantomDataModule(cases=args.cases)
    data.setup("fit")
    model = FlattenNet(labels=len(data.labels), size=data.phantom.size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    mask_loss = ct.OrganMaskLoss(form="softplus", weight=1 / 3)
    with ct.LayerTap(model, layer=None) as tap:  # None: the last feature map; ct.layers(model, image) lists all
        for epoch in range(args.epochs):
            totals = torch.zeros(2)
            batches = data.train_dataloader()
            for batch in batches:
                logits = model(batch["image"])
                maps = tap.maps(logits, method="hirescam")  # (B, L, *S'), with graph
                allowed = data.table.allowed(batch["organs"], size=maps.shape[2:])
                task = nn.functional.binary_cross_entropy_with_logits(logits, batch["label"])
                attention = mask_loss(maps, allowed, batch["label"])
                optimizer.zero_grad()
                (task + attention).backward()
                optimizer.step()
                totals += torch.stack([task, attention]).detach()
            task_mean, attention_mean = (totals / len(batches)).tolist()
            print(
                f"epoch {epoch}: task loss {task_mean:.3f}, weighted mask loss {attention_mean:.3f}, layer {tap.name}"
            )


if __name__ == "__main__":
    main()
