"""FlattenNet: a small CNN whose cells see a part of the image, and whose head weighs every cell on its own."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from camtrain.models._parts import (
    check_channels,
    check_image,
    check_outputs,
    check_widths,
    look,
    pad_to_multiple,
    replaced_linear,
    spatial_size,
    tile,
)


class FlattenNet(nn.Module):
    """Tiles of `stem` voxels -> two 3-convolutions -> tiles of 2 -> ReLU -> flatten -> one Linear layer.

    Because exactly one fully connected layer follows the tapped ReLU (`relu`, the last module before the head),
    sum(HiResCAM) + bias = logit in eval and in training mode. Cells lie exactly on the 2 * `stem` voxels that they
    are drawn on, and see 6 * `stem` of them along each axis: 18 of 48 by default, so that a cell that
    is lit inside an organ speaks of that organ and its surroundings. Sizes that do not divide by
    2 * `stem` are padded at the far end with the border's values.

    Args:
        labels: Number of outputs L; `resize_head` changes it later.
        size: Spatial size of the images: one number (a cube) or one per axis. Two numbers make a 2D net.
        channels: Image channels.
        widths: Channels of the four convolutions; the last is K of the tapped layer.
        stem: Edge of the first tiles in voxels. The grid has size / (2 * stem) cells along each axis.

    Raises:
        InputError: An argument out of range; in `forward`, an image of another shape.

    Example:
        >>> import torch
        >>> net = FlattenNet(labels=3, size=(24, 18, 12), widths=(4, 4, 4, 4))
        >>> net(torch.zeros(2, 1, 24, 18, 12)).shape, net.cells
        (torch.Size([2, 3]), (4, 3, 2))
    """

    def __init__(
        self,
        labels: int = 8,
        size: int | tuple[int, ...] = 48,
        channels: int = 1,
        widths: tuple[int, int, int, int] = (16, 32, 32, 16),
        stem: int = 3,
    ) -> None:
        super().__init__()
        self.size = spatial_size(size)
        self.channels = check_channels(channels)
        self.config: dict[str, Any] = {
            "labels": check_outputs(labels),
            "size": list(self.size),
            "channels": channels,
            "widths": list(widths),
            "stem": stem,
        }
        (self.stem,) = spatial_size(stem, "stem", dims=1)
        dims = len(self.size)
        first, second, third, last = check_widths(widths, 4)
        self.features = nn.Sequential(
            *(tile(dims, channels, first, self.stem), nn.ReLU()),
            *(look(dims, first, second), nn.ReLU()),
            *(look(dims, second, third), nn.ReLU()),
            tile(dims, third, last, 2),
        )
        self.relu = nn.ReLU()
        self.head = nn.Linear(last * math.prod(self.cells), labels)

    @property
    def cells(self) -> tuple[int, ...]:
        """Grid of the tapped layer, one number per spatial axis."""
        return tuple(math.ceil(n / (2 * self.stem)) for n in self.size)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, L) of images (B, C, *size)."""
        check_image(image, self.channels, self.size, len(self.size), "FlattenNet")
        activations = self.relu(self.features(pad_to_multiple(image, 2 * self.stem)))
        logits: Tensor = self.head(activations.flatten(1))
        return logits

    def resize_head(self, labels: int) -> None:
        """Give the net another number of outputs (a fresh last layer); nothing happens when it has that number."""
        self.head = replaced_linear(self.head, labels)
        self.config["labels"] = labels
