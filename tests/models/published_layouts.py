"""Names and shapes of ResNets as their authors save them, written from the published sources, without their code.

MedicalNet: Tencent/MedicalNet, models/resnet.py (3D, one image channel, shortcut B = a convolution without bias and a
norm, A = no parameters, a segmentation head `conv_seg`, all names behind `module.`). torchvision: models/resnet.py (2D,
three channels, `fc` of 1000 classes; the released files of ResNet-18 hold no `num_batches_tracked`).
"""

from __future__ import annotations

import math

import torch

WIDTHS = (64, 128, 256, 512)
DEPTHS = {10: ("basic", (1, 1, 1, 1)), 18: ("basic", (2, 2, 2, 2)), 34: ("basic", (3, 4, 6, 3))}
DEPTHS |= {50: ("bottleneck", (3, 4, 6, 3)), 101: ("bottleneck", (3, 4, 23, 3))}


def resnet_shapes(depth, axes, channels, shortcut="B", widths=WIDTHS, tracked=True):
    """Name -> shape of everything before the head."""
    block, layers = DEPTHS[depth]
    grow = 4 if block == "bottleneck" else 1
    shapes = {"conv1.weight": (widths[0], channels, *(7,) * axes)}

    def norm(name, width):
        shapes.update({f"{name}.{word}": (width,) for word in ("weight", "bias", "running_mean", "running_var")})
        if tracked:
            shapes[f"{name}.num_batches_tracked"] = ()

    norm("bn1", widths[0])
    before = widths[0]
    for stage, (blocks, width) in enumerate(zip(layers, widths, strict=True), start=1):
        out = width * grow
        for number in range(blocks):
            at = f"layer{stage}.{number}"
            sizes = [(before, width, 3), (width, width, 3)]
            if grow == 4:
                sizes = [(before, width, 1), (width, width, 3), (width, out, 1)]
            for place, (into, outof, kernel) in enumerate(sizes, start=1):
                shapes[f"{at}.conv{place}.weight"] = (outof, into, *(kernel,) * axes)
                norm(f"{at}.bn{place}", outof)
            if number == 0 and shortcut == "B" and (stage > 1 or before != out):
                shapes[f"{at}.downsample.0.weight"] = (out, before, *(1,) * axes)
                norm(f"{at}.downsample.1", out)
            before = out
    return shapes


def medicalnet(depth, widths=WIDTHS):
    """A file of MedicalNet: the shortcut is B for 10, 50 and 101 layers, A for 18 and 34."""
    shapes = resnet_shapes(depth, 3, 1, "A" if depth in (18, 34) else "B", widths)
    last = widths[-1] * (4 if DEPTHS[depth][0] == "bottleneck" else 1)
    shapes |= {"conv_seg.0.weight": (last, 32, 2, 2, 2), "conv_seg.0.bias": (32,)}
    shapes |= {f"conv_seg.{n}.{word}": (32,) for n in (1, 4) for word in ("weight", "bias", "running_mean")}
    shapes |= {"conv_seg.3.weight": (32, 32, 3, 3, 3), "conv_seg.6.weight": (2, 32, 1, 1, 1)}
    return {"state_dict": filled({f"module.{name}": shape for name, shape in shapes.items()})}


def torchvision_resnet18(tracked=False):
    """The state dict of torchvision's ResNet-18."""
    shapes = resnet_shapes(18, 2, 3, tracked=tracked)
    return filled({**shapes, "fc.weight": (1000, 512), "fc.bias": (1000,)})


def filled(shapes):
    """Every tensor with numbers of its own, so that none can be taken for another."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.tensor(4821) if name.endswith("tracked") else torch.rand(shape, generator=generator) + 0.5
        for name, shape in shapes.items()
    }


def numbers(shapes):
    """How many, running statistics among them."""
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith("tracked"))
