"""How far is `camtrain.cam.price`, which counts, from what the clock says?

    python benchmarks/pass_price.py                       # four networks, 32^3 and 64^3, early to late layers

Prints, per layer, one backward pass from the logits to it in plain forwards: measured (median of processor times in
turns) and counted, and the one over the other. AttentionMonitor paces its passes by the counted figure.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from _networks import NETWORKS
from _pairs import machine
from torch import Tensor, nn

import camtrain as ct
from camtrain.cam.price import WorkCount

LAYERS = {
    "DenseNet121": ["features.transition1", "features.transition2", "features.transition3"],
    "EfficientNet-B0": ["_blocks.2", "_blocks.4"],
    "ResNet18": ["layer1", "layer2", "layer3"],
    "ResNet50": ["layer1", "layer3"],
}
HEADER = "| network | volume | layer | pass in forwards | counted | counted / measured | ms a forward |"


def measured(model: nn.Module, image: Tensor, layer: nn.Module, rounds: int) -> tuple[float, float]:
    """Seconds of a forward and of a pass to the layer's last run."""
    taken: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, output: _cut(output, taken))
    logits = model(image)
    handle.remove()
    first, forward, backward = torch.zeros_like(logits), [], []
    first[:, 0] = 1.0
    for _ in range(rounds):
        start = time.process_time()
        with torch.no_grad():
            model(image)
        middle = time.process_time()
        torch.autograd.grad(logits, taken[-1], first, retain_graph=True)
        forward.append(middle - start)
        backward.append(time.process_time() - middle)
    return statistics.median(forward), statistics.median(backward)


def _cut(output: Tensor, taken: list[Tensor]) -> Tensor:
    taken.append(output.detach().clone().requires_grad_())
    return taken[-1].clone()


def main() -> None:
    """Print a line per layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{HEADER}\n" + "|---" * HEADER.count(" | ") + "|---|")
    for net in args.nets:
        for size in args.sizes:
            torch.manual_seed(0)
            model, image = NETWORKS[net].make(16, size).eval(), torch.rand(2, 1, *NETWORKS[net].shape(size))
            found = next(row.name for row in ct.layers(model, image, seen=False) if row.default)
            for name in dict.fromkeys([*LAYERS[net], found]):
                layer = model.get_submodule(name)
                count = WorkCount(model, [layer])
                with count.counting(), torch.no_grad():
                    model(image)
                counted = count.behind(0).backward / count.whole.forward
                forward, backward = measured(model, image, layer, args.rounds)
                share = backward / forward
                print(
                    f"| {net} | {NETWORKS[net].volume(size)} | {name} | {share:.4f} | {counted:.4f} "
                    f"| {counted / share:.2f} | {forward * 1e3:.1f} |",
                    flush=True,
                )
    print(f"\nprocessor time, batch 2, medians of {args.rounds}, {machine()}")


if __name__ == "__main__":
    main()
