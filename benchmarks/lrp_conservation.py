"""How much of a logit arrives at each layer under LRP, on MONAI's 3D nets, and what a pass costs.

    python benchmarks/lrp_conservation.py

Random weights, perturbed BatchNorm statistics, `rules="zplus"`, float32. Printed as a Markdown table: the largest
|sum of the map / logit - 1| over layers and at the input, and the time of an LRP map over that of a plain forward and
backward pass to the image (medians of interleaved pairs in one run).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from monai.networks.nets import DenseNet121, EfficientNetBN, SEResNet50, resnet18
from torch import Tensor, nn

import camtrain as ct

LABELS = 4
NETS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "ResNet18": (
        lambda: resnet18(spatial_dims=3, n_input_channels=1, num_classes=LABELS),
        ["layer4", "layer3", "layer2", "layer1", "maxpool"],
    ),
    "DenseNet121": (
        lambda: DenseNet121(spatial_dims=3, in_channels=1, out_channels=LABELS),
        ["class_layers.relu", *(f"features.denseblock{i}" for i in (4, 3, 2, 1)), "features.pool0"],
    ),
    "SEResNet50": (
        lambda: SEResNet50(spatial_dims=3, in_channels=1, num_classes=LABELS),
        ["layer4", "layer3", "layer2", "layer1", "layer0"],
    ),
    "EfficientNet-B0": (
        lambda: EfficientNetBN("efficientnet-b0", spatial_dims=3, in_channels=1, num_classes=LABELS, pretrained=False),
        ["_bn1", "_blocks.6", "_blocks.4", "_blocks.2", "_blocks.0", "_bn0"],
    ),
}


def perturbed(net: nn.Module, seed: int) -> nn.Module:
    """BatchNorms as after training: none is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm3d):
            for values, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.7, 1.3),
                (module.bias.data, -0.2, 0.3),
            ):
                values.copy_(torch.rand(values.shape, generator=generator) * (high - low) + low)
    return net.eval()


def lost(net: nn.Module, image: Tensor, layers: list[str]) -> tuple[float, float]:
    """Largest |sum / logit - 1| over the layers, and at the input."""
    logits = net(image).detach()
    maps = ct.explain(net, image, "lrp", [*layers, "input"])
    off = {name: ((m.flatten(2).sum(2) / logits) - 1).abs().max().item() for name, m in maps.items()}
    return max(off[name] for name in layers), off["input"]


def plain(net: nn.Module, image: Tensor) -> None:
    """Forward, and one backward pass to the image."""
    leaf = image.clone().requires_grad_()
    torch.autograd.grad(net(leaf)[:, 0].sum(), leaf)


def ratio(net: nn.Module, image: Tensor, pairs: int) -> float:
    """Median of time(LRP map of one label at the input) / time(plain)."""
    ratios = []
    for _ in range(pairs + 1):
        times = []
        for job in (lambda: plain(net, image), lambda: ct.explain(net, image, "lrp", "input", labels=[0])):
            start = time.perf_counter()
            job()
            times.append(time.perf_counter() - start)
        ratios.append(times[1] / times[0])
    return statistics.median(ratios[1:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=[32, 40, 48])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    print("| net | largest error, layers | largest error, input | LRP map / plain forward and backward |")
    print("|---|---|---|---|")
    for name, (make, layers) in NETS.items():
        errors, ratios = [], []
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            net, image = perturbed(make(), seed), torch.rand(2, 1, *args.size)
            errors.append(lost(net, image, layers))
            ratios.append(ratio(net, image, args.pairs))
        at_layers, at_input = (max(e[i] for e in errors) for i in (0, 1))
        spread = f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f})"
        print(f"| {name} | {at_layers:.0e} | {at_input:.0e} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
