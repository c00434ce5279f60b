"""PoolNet: a small CNN whose cells see the whole image, under a global average pool."""

from __future__ import annotations

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

_STRIDE = 12


class PoolNet(nn.Module):
    """Tiles of 2, a max-pool of 3, tiles of 2, with 3-convolutions between -> ReLU -> global average pool -> Linear.

    The small sibling of MONAI's ResNets and DenseNets. CAM, Grad-CAM and HiResCAM of `relu`, the last module before the
    pool, are the same map up to one positive factor. Every cell may have seen the whole image, so that a map locates
    cells and not evidence: as many 3-convolutions are appended as it takes for one corner to see the other.

    Args:
        labels: Number of outputs L; `resize_head` changes it later.
        size: Spatial size up to which every cell sees everything: one number or one per axis. Two numbers make a 2D
            net. Images of another size are taken too.
        channels: Image channels.
        widths: Channels of the first tiles, up to 1/6 and at 1/12 of the resolution; the last is K of the tapped layer.

    Raises:
        InputError: An argument out of range; in `forward`, an image of another rank or with other channels.

    Example:
        >>> import torch
        >>> PoolNet(labels=3, size=24, widths=(4, 4, 8))(torch.zeros(2, 1, 24, 20, 30)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        labels: int = 8,
        size: int | tuple[int, ...] = 48,
        channels: int = 1,
        widths: tuple[int, int, int] = (16, 32, 64),
    ) -> None:
        super().__init__()
        self.size = spatial_size(size)
        self.channels = check_channels(channels)
        self.config: dict[str, Any] = {
            "labels": check_outputs(labels),
            "size": list(self.size),
            "channels": channels,
            "widths": list(widths),
        }
        dims = len(self.size)
        fine, middle, coarse = check_widths(widths, 3)
        self.features = nn.Sequential(
            *(tile(dims, channels, fine, 2), nn.ReLU()),
            *(look(dims, fine, middle), nn.ReLU()),
            # The strongest voxel of a cell, wherever it is: what is small need not be found anew at each offset.
            Pool[Pool.MAX, dims](kernel_size=3),
            *(look(dims, middle, middle), nn.ReLU()),
            tile(dims, middle, coarse, 2),
            *(layer for _ in range(_looks(max(self.size))) for layer in (nn.ReLU(), look(dims, coarse, coarse))),
        )
        self.relu = nn.ReLU()
        self.head = nn.Linear(coarse, labels)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, L) of images (B, C, *S)."""
        check_image(image, self.channels, None, len(self.size), "PoolNet")
        activations = self.relu(self.features(pad_to_multiple(image, _STRIDE)))
        logits: Tensor = self.head(activations.mean(dim=tuple(range(2, activations.ndim))))
        return logits

    def resize_head(self, labels: int) -> None:
        """Give the net another number of outputs (a fresh last layer); nothing happens when it has that number."""
        self.head = replaced_linear(self.head, labels)
        self.config["labels"] = labels


def _looks(size: int) -> int:
    """3-convolutions on the grid of 12-voxel cells after which the first cell sees the last: one cell further each."""
    return max(1, -(-size // _STRIDE) - 1)
