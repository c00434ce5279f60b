"""VGGNet: the plain stack of 3-convolutions and max-pools, in one to three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from monai.networks.layers.factories import Pool
from torch import Tensor, nn

from camtrain._errors import InputError, nearest
from camtrain.models._parts import (
    check_channels,
    check_image,
    check_outputs,
    check_widths,
    look,
    pad_to_multiple,
    replaced_linear,
    spatial_size,
)

Head = Literal["flatten", "pool"]


class VGGNet(nn.Module):
    """Stages of (3-convolution, BatchNorm, ReLU) and a max-pool of 2; then flatten -> FC -> ReLU -> FC, or pool -> FC.

    After Simonyan and Zisserman (2015, arXiv:1409.1556), with BatchNorm and narrow enough for a CPU. `stage1`,
    `stage2`, ... end in their max-pool, as the layers of the Relevance-CAM paper do: a cell of stage n lies exactly on
    the 2^n voxels along each axis that it is drawn on. Behind the flatten head every cell of the last stage has weights
    of its own, twice over; behind the pool head CAM, Grad-CAM and HiResCAM of the last stage are one map up to a
    positive factor.

    Args:
        labels: Number of outputs L; `resize_head` changes it later.
        size: Spatial size of the images: one number (a cube) or one per axis. Two numbers make a 2D net. Sizes that do
            not divide are padded at the far end with the border's values. The pool head takes other sizes too.
        channels: Image channels.
        widths: Channels of each stage, as many stages as numbers.
        depths: Convolutions of each stage.
        head: `"flatten"` or `"pool"`.
        hidden: Units of the FC layer in between, flatten head only.

    Raises:
        InputError: An argument out of range; in `forward`, an image of another rank, of other channels, or (flatten
            head) of another size.

    Example:
        >>> import torch
        >>> net = VGGNet(labels=3, size=(16, 12, 16), widths=(4, 6, 8), depths=(1, 1, 2))
        >>> net(torch.zeros(2, 1, 16, 12, 16)).shape, net.cells
        (torch.Size([2, 3]), (2, 2, 2))
    """

    def __init__(
        self,
        labels: int = 8,
        size: int | tuple[int, ...] = 48,
        channels: int = 1,
        widths: tuple[int, ...] = (8, 16, 32, 64),
        depths: tuple[int, ...] = (1, 1, 2, 2),
        head: Head = "flatten",
        hidden: int = 64,
    ) -> None:
        super().__init__()
        self.size = spatial_size(size)
        self.channels = check_channels(channels)
        if head not in get_args(Head):
            raise InputError(f"head= expects flatten or pool, got {head!r}{nearest(str(head), get_args(Head))}")
        if not widths:
            raise InputError("widths= expects the channels of at least one stage, got none")
        outputs = check_widths(widths, len(widths))
        (units,) = spatial_size(hidden, "hidden", dims=1)
        self.config: dict[str, Any] = {
            "labels": check_outputs(labels),
            "size": list(self.size),
            "channels": channels,
            "widths": list(widths),
            "depths": list(depths),
            "head": head,
            "hidden": hidden,
        }
        # Modules of the net itself, so that layers are called stage1 and not features.stage1.
        self.stages = [f"stage{n}" for n in range(1, len(outputs) + 1)]
        inputs = (channels, *outputs)
        for name, before, after, depth in zip(
            self.stages, inputs, outputs, _check_depths(depths, len(outputs)), strict=False
        ):
            self.add_module(name, _stage(len(self.size), before, after, depth))
        self.between: nn.Module = nn.Identity()
        last = outputs[-1]
        if head == "flatten":
            self.between = nn.Sequential(nn.Flatten(), nn.Linear(last * math.prod(self.cells), units), nn.ReLU())
            last = units
        self.head = nn.Linear(last, labels)

    @property
    def cells(self) -> tuple[int, ...]:
        """Grid of the last stage, one number per spatial axis."""
        return tuple(math.ceil(n / self._cell) for n in self.size)

    @property
    def _cell(self) -> int:
        """Voxels along the edge of a cell of the last stage."""
        return 1 << len(self.stages)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, L) of images (B, C, *size)."""
        flat = isinstance(self.between, nn.Sequential)
        check_image(image, self.channels, self.size if flat else None, len(self.size), "VGGNet")
        activations = pad_to_multiple(image, self._cell)
        for name in self.stages:
            activations = self.get_submodule(name)(activations)
        if not flat:
            activations = activations.mean(dim=tuple(range(2, activations.ndim)))
        logits: Tensor = self.head(self.between(activations))
        return logits

    def resize_head(self, labels: int) -> None:
        """Give the net another number of outputs (a fresh last layer); nothing happens when it has that number."""
        self.head = replaced_linear(self.head, labels)
        self.config["labels"] = labels


def _stage(dims: int, inputs: int, outputs: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n in range(depth):
        layers += [look(dims, outputs if n else inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, Pool[Pool.MAX, dims](kernel_size=2))


def _check_depths(depths: Sequence[int], expected: int) -> tuple[int, ...]:
    """Convolutions per stage.

    Raises:
        InputError: Another number of stages, or a stage without convolutions.
    """
    if len(depths) != expected or any(isinstance(d, bool) or not isinstance(d, int) or d < 1 for d in depths):
        raise InputError(
            f"depths= expects the convolutions of each of the {expected} stages, at least 1, got {list(depths)}"
        )
    return tuple(depths)
