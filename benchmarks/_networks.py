"""The networks of the benchmarks: MONAI's, and AxialNet, the paper's and the small one. Not a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from monai.networks.nets import DenseNet121, EfficientNetBN, resnet18, resnet50
from torch import nn

from camtrain.models import AxialNet


class Network(NamedTuple):
    """One network of the benchmarks.

    Attributes:
        make: (labels, edge of the volume) -> network of one input channel.
        mid: A middle layer, whose maps need the graph behind it; None where none lies on the volume's axes.
        head: Name of the last linear layer.
        fixed: The only volume that it takes; None = cubes of any edge.
    """

    make: Callable[[int, int], nn.Module]
    mid: str | None
    head: str
    fixed: tuple[int, int, int] | None = None

    def shape(self, size: int) -> tuple[int, int, int]:
        """The volume for a wanted edge."""
        return self.fixed or (size, size, size)

    def volume(self, size: int) -> str:
        """The same in words."""
        return "x".join(map(str, self.fixed)) if self.fixed else f"{size}^3"


def _axial_small(labels: int, size: int) -> nn.Module:
    return AxialNet(labels=labels, variant="small", image_size=(size, size), group=1)


def _axial(labels: int, _: int) -> nn.Module:
    return AxialNet(labels=labels)


def _densenet(labels: int, size: int) -> nn.Module:
    return DenseNet121(spatial_dims=3, in_channels=1, out_channels=labels)


def _efficientnet(labels: int, size: int) -> nn.Module:
    return EfficientNetBN("efficientnet-b0", pretrained=False, spatial_dims=3, in_channels=1, num_classes=labels)


NETWORKS = {
    "ResNet18": Network(lambda n, _: resnet18(spatial_dims=3, n_input_channels=1, num_classes=n), "layer3", "fc"),
    "ResNet50": Network(lambda n, _: resnet50(spatial_dims=3, n_input_channels=1, num_classes=n), "layer3", "fc"),
    "DenseNet121": Network(_densenet, "features.transition3", "class_layers.out"),
    "EfficientNet-B0": Network(_efficientnet, "_blocks.4", "_fc"),
    "AxialNet": Network(_axial, None, "fc", (24, 420, 420)),
    "AxialNet-small": Network(_axial_small, None, "fc"),
}
"""Of each the last layer is the one that `layer=None` finds. AxialNet sees 24 of its 405 slices, at full width."""


def with_mlp_head(model: nn.Module, head: str) -> nn.Module:
    """The same network with a hidden layer in its head: no longer affine in its maps."""
    parent = model.get_submodule(head.rpartition(".")[0])
    old = model.get_submodule(head)
    new = nn.Sequential(nn.Linear(old.in_features, 64), nn.ReLU(), nn.Linear(64, old.out_features))
    setattr(parent, head.rpartition(".")[2], new)
    return model
