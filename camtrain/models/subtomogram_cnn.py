"""SubtomogramCNN: the two networks of the Respond-CAM paper."""

from __future__ import annotations

import math
from typing import Any, Literal

from monai.networks.layers.factories import Conv, Pool
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.models._parts import (
    check_channels,
    check_image,
    check_outputs,
    check_widths,
    pad_to_multiple,
    replaced_linear,
    spatial_size,
)

_VARIANTS = {"cnn1": 1, "cnn2": 2}
"""Variant -> width of the average pool in front."""


class SubtomogramCNN(nn.Module):
    """CNN-1 or CNN-2 of Respond-CAM (Zhao et al., 2018, arXiv:1806.00102), in any number of axes.

    conv1 conv2 maxpool1 conv3 conv4 maxpool2 flatten fc1 fc2 head: 3-convolutions that keep the grid, max-pools of 2, a
    ReLU behind each convolution and behind fc1 and fc2, biases everywhere, no norm layer and no dropout. CNN-2 averages
    blocks of 2 voxels first, so that its maps are half as fine. The maps of the paper are those of `maxpool2`, on
    1/4 (1/8) of the image's grid. Three fully connected layers follow it, so that Grad-CAM, HiResCAM and Respond-CAM
    all differ there; the net is piecewise linear, so that the sums of the latter two and the biases are the logit.

    Weights start Glorot-uniform and biases at 0, as in Keras, with which the paper's nets were written. From torch's
    own, smaller start seven layers without a norm hardly learn noisy volumes.

    Sizes that do not divide by 4 (8) are padded at the far end with the border's values.

    Args:
        labels: Number of outputs L; `resize_head` changes it later.
        size: Spatial size of the images: one number (a cube) or one per axis. Two numbers make a 2D net.
        variant: `"cnn1"` or `"cnn2"`.
        channels: Image channels.
        widths: Channels of conv1 and conv2, and of conv3 and conv4; the last is K of the tapped layer.
        hidden: Width of fc1 and fc2.

    Raises:
        InputError: An argument out of range; in `forward`, an image of another shape.

    Example:
        >>> import torch
        >>> net = SubtomogramCNN(labels=3, size=(24, 20, 16), variant="cnn2", widths=(4, 6), hidden=8)
        >>> net(torch.zeros(2, 1, 24, 20, 16)).shape, net.cells
        (torch.Size([2, 3]), (3, 3, 2))
    """

    def __init__(
        self,
        labels: int = 10,
        size: int | tuple[int, ...] = 40,
        variant: Literal["cnn1", "cnn2"] = "cnn1",
        channels: int = 1,
        widths: tuple[int, int] = (32, 64),
        hidden: int = 512,
    ) -> None:
        super().__init__()
        if variant not in _VARIANTS:
            raise InputError(f"variant= expects one of {', '.join(_VARIANTS)}, got {variant!r}")
        if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
            raise InputError(f"hidden= expects a whole number of at least 1, got {hidden!r}")
        self.size = spatial_size(size)
        self.channels = check_channels(channels)
        self.variant = variant
        self.config: dict[str, Any] = {
            "labels": check_outputs(labels),
            "size": list(self.size),
            "variant": variant,
            "channels": channels,
            "widths": list(widths),
            "hidden": hidden,
        }
        dims, (first, second) = len(self.size), check_widths(widths, 2)
        conv, pool = Conv[Conv.CONV, dims], Pool[Pool.MAX, dims]
        width = _VARIANTS[variant]
        self.avgpool = Pool[Pool.AVG, dims](kernel_size=width) if width > 1 else nn.Identity()
        self.conv1, self.relu1 = conv(channels, first, kernel_size=3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = conv(first, first, kernel_size=3, padding=1), nn.ReLU()
        self.maxpool1 = pool(kernel_size=2)
        self.conv3, self.relu3 = conv(first, second, kernel_size=3, padding=1), nn.ReLU()
        self.conv4, self.relu4 = conv(second, second, kernel_size=3, padding=1), nn.ReLU()
        self.maxpool2 = pool(kernel_size=2)
        self.fc1, self.relu5 = nn.Linear(second * math.prod(self.cells), hidden), nn.ReLU()
        self.fc2, self.relu6 = nn.Linear(hidden, hidden), nn.ReLU()
        self.head = nn.Linear(hidden, labels)
        self.apply(_start)

    @property
    def cells(self) -> tuple[int, ...]:
        """Grid of `maxpool2`, one number per spatial axis."""
        return tuple(math.ceil(n / self._stride) for n in self.size)

    @property
    def _stride(self) -> int:
        return 4 * _VARIANTS[self.variant]

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, L) of images (B, C, *size)."""
        check_image(image, self.channels, self.size, len(self.size), "SubtomogramCNN")
        x = self.avgpool(pad_to_multiple(image, self._stride))
        x = self.maxpool1(self.relu2(self.conv2(self.relu1(self.conv1(x)))))
        x = self.maxpool2(self.relu4(self.conv4(self.relu3(self.conv3(x)))))
        x = self.relu6(self.fc2(self.relu5(self.fc1(x.flatten(1)))))
        logits: Tensor = self.head(x)
        return logits

    def resize_head(self, labels: int) -> None:
        """Give the net another number of outputs (a fresh last layer); nothing happens when it has that number."""
        self.head = replaced_linear(self.head, labels)
        self.config["labels"] = labels


def _start(module: nn.Module) -> None:
    """Weights as Keras starts them."""
    if isinstance(weight := getattr(module, "weight", None), Tensor):
        nn.init.xavier_uniform_(weight)
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]
