"""What one training step costs with the mask loss: interleaved pairs, so that a noisy machine cannot favour one side.

    python benchmarks/step_cost.py [--pairs 15] [--size 64] [--labels 80] [--batch 2]

Prints, per network, the median and the quartiles of (step with mask loss) / (plain step). A step is forward, task loss,
backward and optimizer step through a real Trainer-free copy of what `MaskLossCallback` does: the watch, the maps of all
labels, the organs brought to the grid, the loss, and one backward of the sum.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from monai.networks.nets import DenseNet121, ResNet
from torch import Tensor, nn

import camtrain as ct

NETS: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "MONAI ResNet18": (
        lambda n: ResNet("basic", [2, 2, 2, 2], [64, 128, 256, 512], spatial_dims=3, n_input_channels=1, num_classes=n),
        "layer4",
    ),
    "MONAI DenseNet121": (lambda n: DenseNet121(spatial_dims=3, in_channels=1, out_channels=n), "class_layers.relu"),
}


def organs(batch: int, size: int) -> Tensor:
    """Two lungs and what lies between them, as boxes: the cost depends on grids and labels, not on shapes."""
    ids = torch.zeros(batch, 1, size, size, size, dtype=torch.uint8)
    third = size // 3
    ids[:, :, :third, third : 2 * third, third:] = 1
    ids[:, :, third : 2 * third, third : 2 * third, third:] = 2
    ids[:, :, 2 * third :, third : 2 * third, third:] = 3
    return ids


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], extra: tuple | None) -> float:
    """Seconds of one training step; `extra` = (layer, table, loss function) adds the mask loss."""
    start = time.perf_counter()
    optimizer.zero_grad()
    if extra is None:
        loss = nn.functional.binary_cross_entropy_with_logits(model(batch["image"]), batch["label"])
    else:
        layer, table, loss_fn = extra
        with ct.LayerTap(model, layer) as tap:
            logits = model(batch["image"])
            maps = tap.maps(logits, method="hirescam")
        allowed = table.allowed(batch["organs"], size=maps.shape[2:])
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch["label"])
        loss = loss + loss_fn(maps, allowed, batch["label"])
    loss.backward()
    optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print one line per network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--labels", type=int, default=80)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    full = ct.OrganTable.load("rad_chestct")
    table = full.select([full.labels[i % len(full.labels)] for i in range(args.labels)][: len(full.labels)])
    for name, (make, layer) in NETS.items():
        model = make(len(table.labels)).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        batch = {
            "image": torch.rand(args.batch, 1, args.size, args.size, args.size),
            "label": (torch.rand(args.batch, len(table.labels)) > 0.8).float(),
            "organs": organs(args.batch, args.size),
        }
        extra = (layer, table, ct.OrganMaskLoss())
        ratios = []
        for pair in range(args.pairs + 2):
            order = (None, extra) if pair % 2 else (extra, None)
            seconds = {use is None: step(model, optimizer, batch, use) for use in order}
            if pair >= 2:
                ratios.append(seconds[False] / seconds[True])
        low, median, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name}: mask-loss step / plain step = {median:.3f} (quartiles {low:.3f}-{high:.3f}, {args.pairs} pairs, "
            f"{len(table.labels)} labels, batch {args.batch}, {args.size}^3, {torch.get_num_threads()} threads)"
        )


if __name__ == "__main__":
    main()
