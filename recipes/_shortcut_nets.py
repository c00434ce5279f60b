"""The networks of the shortcut study. Not a recipe."""

from __future__ import annotations

from _shortcut_data import StudyData
from monai.networks.nets import ResNet
from torch import Tensor, nn

import camtrain as ct
from camtrain.models import FlattenNet


class OrganPool(nn.Module):
    """A backbone under a head that pools, for each label, the cells of its organs alone (organs: second channel)."""

    def __init__(self, backbone: nn.Module, channels: int, table: ct.OrganTable) -> None:
        super().__init__()
        self.backbone, self.table = backbone, table
        self.head = nn.Linear(channels, len(table.labels))

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, L) of (B, 2, *S)."""
        activations = self.backbone(image[:, :1])
        allowed = self.table.allowed(image[:, 1:].round().int(), size=activations.shape[2:]).float().flatten(2)
        pooled = allowed @ activations.flatten(2).mT / allowed.sum(dim=2, keepdim=True).clamp(min=1)
        logits: Tensor = (pooled * self.head.weight).sum(dim=2) + self.head.bias
        return logits


def make_net(name: str, data: StudyData, size: tuple[int, ...], pooled: bool) -> tuple[nn.Module, str | None]:
    """A network and its layer."""
    if name == "flatten":
        net: nn.Module = FlattenNet(labels=len(data.labels), size=size, pool=2)
        trunk, channels, layer = lambda: nn.Sequential(net.features, net.relu), 16, None
    else:
        widths = [16, 32, 64, 128] if name == "resnet18q" else [64, 128, 256, 512]
        net = ResNet("basic", [2, 2, 2, 2], widths, spatial_dims=3, n_input_channels=1, num_classes=len(data.labels),
                     conv1_t_stride=2, no_max_pool=True)  # fmt: skip
        stem = (net.conv1, net.bn1, net.act)
        trunk = lambda: nn.Sequential(*stem, net.layer1, net.layer2, net.layer3, net.layer4)  # noqa: E731
        channels, layer = widths[-1], "layer4"
    return (OrganPool(trunk(), channels, data.table), "backbone") if pooled else (net, layer)
