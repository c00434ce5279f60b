"""FlattenNet: a small CNN whose cells see a part of the image, and whose head weighs every cell on its own."""

from __future__ import annotations

import math
from typing import Any

from monai.networks.layers.factories import Pool
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
    """Tiles of 2 voxels -> two 3-convolutions -> max-pool -> 1-convolution -> ReLU -> flatten -> one Linear layer.

    Because exactly one fully connected layer follows the tapped ReLU (`relu`, the last module before the head),
    sum(HiResCAM) + bias = logit in eval and in training mode. A cell lies exactly on the 2 * `pool` voxels along each
    axis that it is drawn on, and sees 4 more on either side: 14 of 48 by default, so that a cell that is lit inside an
    organ speaks of that organ and its surroundings. Sizes that do not divide by 2 * `pool` are padded at the far end
    with the border's values.

    Args:
        labels: Number of outputs L; `resize_head` changes it later.
        size: Spatial size of the images: one number (a cube) or one per axis. Two numbers make a 2D net.
        channels: Image channels.
        widths: Channels of the four convolutions; the last is K of the tapped layer.
        pool: Width of the max-pool. The grid has size / (2 * pool) cells along each axis, and the head a weight for
            each: raise it with the size of the images.

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
        widths: tuple[int, int, int, int] = (8, 8, 16, 16),
        pool: int = 3,
    ) -> None:
        super().__init__()
        self.size = spatial_size(size)
        self.channels = check_channels(channels)
        (self.pool,) = spatial_size(pool, "pool", dims=1)
        self.config: dict[str, Any] = {
            "labels": check_outputs(labels),
            "size": list(self.size),
            "channels": channels,
            "widths": list(widths),
            "pool": pool,
        }
        dims = len(self.size)
        first, second, third, last = check_widths(widths, 4)
        self.features = nn.Sequential(
            *(tile(dims, channels, first, 2), nn.ReLU()),
            *(look(dims, first, second), nn.ReLU()),
            *(look(dims, second, third), nn.ReLU()),
            # The strongest voxel of a cell, wherever it is: what is small need not be found anew at each offset.
            Pool[Pool.MAX, dims](kernel_size=pool),
            tile(dims, third, last, 1),
        )
        self.relu = nn.ReLU()
        self.head = nn.Linear(last * math.prod(self.cells), labels)

    @property
    def cells(self) -> tuple[int, ...]:
        """Grid of the tapped layer, one number per spatial axis."""
        return tuple(math.ceil(n / (2 * self.pool)) for n in self.size)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, L) of images (B, C, *size)."""
        check_image(image, self.channels, self.size, len(self.size), "FlattenNet")
        activations = self.relu(self.features(pad_to_multiple(image, 2 * self.pool)))
        logits: Tensor = self.head(activations.flatten(1))
        return logits

    def resize_head(self, labels: int) -> None:
        """Give the net another number of outputs (a fresh last layer); nothing happens when it has that number."""
        self.head = replaced_linear(self.head, labels)
        self.config["labels"] = labels
