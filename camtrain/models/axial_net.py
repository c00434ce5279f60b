"""AxialNet: a 2D ResNet over slice groups, one fully connected layer per group, the mean of their scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.models._parts import check_outputs, replaced_linear, spatial_size
from camtrain.models._slices import IMAGE_SIZE, SliceTrunk, StackSlices, Variant, pictures_of


class AxialNet(nn.Module):
    """AxialNet of Draelos and Carin (2022), with its ablations as arguments.

    logit_l = mean over slice groups s of (sum over k, h, w of W[l, k, h, w] * A[s, k, h, w]) + b_l

    A is the output of the submodule `stack`, (B, 16, N, 6, 6) for N slice groups on the first spatial axis; nothing but
    one fully connected layer and a mean follows, so sum(HiResCAM) + bias = logit. The mean is taken before the layer,
    which gives the same number for less work. At full size, 405 x 420 x 420 voxels and 80 labels, the net has
    11,543,056 parameters; a training step takes about 10 GiB in float32, with `activation_checkpointing` about 6.5.

    The four unpadded convolutions of the full variant look at the middle of the slice only (about voxels 128 to 288 of
    420 are cell centres), while maps are drawn as if the 6 x 6 cells tiled it: a property of the published net.

    Args:
        labels: Number of outputs L; `resize_head` changes it later.
        variant: `"full"`, the paper's, or `"small"`, for phantoms of about 48 voxels on a CPU.
        image_size: In-plane size, one number or (h, w): the two axes besides `slice_axis`, in their order. None takes
            420 for full and 48 for small.
        slice_axis: Spatial axis along which slices lie: 0 as in the authors' files, 2 in volumes of RAS order.
        group: Adjacent slices per picture (3 = the colour channels of a pretrained ResNet).
        pool: `"mean"` over slice groups or, as in the paper's ablation, `"max"`; with `"max"` only the strongest group
            of each label has a gradient, and the sum rule holds for no fixed weights.
        custom_convs: False leaves the convolutions after the ResNet out, as in the paper's ablation.
        activation_checkpointing: Recompute stem and stages in the backward pass: less memory, a third more time.

    Raises:
        InputError: An argument out of range; in `forward`, an image of another shape.

    Example:
        >>> import torch
        >>> net = AxialNet(labels=3, variant="small", image_size=(40, 32), slice_axis=2)
        >>> net(torch.zeros(2, 1, 40, 32, 12)).shape
        torch.Size([2, 3])

    References:
        Draelos, Carin: Explainable multiple abnormality classification of chest CT volumes. Artificial Intelligence in
        Medicine 132 (2022), arXiv 2111.12215.
    """

    def __init__(
        self,
        labels: int = 80,
        variant: Variant = "full",
        image_size: int | tuple[int, int] | None = None,
        slice_axis: int = 0,
        group: int = 3,
        pool: Literal["mean", "max"] = "mean",
        custom_convs: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if pool not in ("mean", "max"):
            raise InputError(f"pool= expects 'mean' or 'max', got {pool!r}")
        self.image_size = slice_size(image_size, variant)
        self.slice_axis, self.group, self.pool = check_axis(slice_axis), check_group(group), pool
        self.config: dict[str, Any] = {
            "labels": check_outputs(labels),
            "variant": variant,
            "image_size": list(self.image_size),
            "slice_axis": slice_axis,
            "group": group,
            "pool": pool,
            "custom_convs": custom_convs,
            "activation_checkpointing": activation_checkpointing,
        }
        self.trunk = SliceTrunk(variant, self.image_size, group, custom_convs, activation_checkpointing)
        self.stack = StackSlices(slice_axis)
        rows, columns = self.trunk.cells
        self.fc = nn.Linear(self.trunk.channels * rows * columns, labels)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, L) of volumes (B, 1, *S), or of the authors' (B, N, 3, h, w) with `slice_axis=0`."""
        pictures, groups = pictures_of(image, self.group, self.slice_axis, self.image_size)
        activations = self.stack(self.trunk(pictures), groups)
        logits: Tensor
        if self.pool == "mean":
            logits = self.fc(activations.mean(dim=2 + self.slice_axis).flatten(1))
            return logits
        logits = self._slice_scores(activations).amax(dim=(2, 3, 4))
        return logits

    def _slice_scores(self, activations: Tensor) -> Tensor:
        """Scores of every slice group, (B, L, *N) with N on the slice axis and 1 elsewhere."""
        weight = self.fc.weight.reshape(-1, self.trunk.channels, *self.trunk.cells)
        return F.conv3d(activations, weight.unsqueeze(2 + self.slice_axis), self.fc.bias)

    def resize_head(self, labels: int) -> None:
        """Give the net another number of outputs (a fresh last layer); nothing happens when it has that number."""
        self.fc = replaced_linear(self.fc, labels)
        self.config["labels"] = labels

    def load_torchvision_trunk(self, state_dict: Mapping[str, Tensor]) -> None:
        """Start from torchvision's `resnet18`, as the paper does with its ImageNet weights.

        Args:
            state_dict: `torchvision.models.resnet18(weights=...).state_dict()`; its `fc` entries are left out.

        Raises:
            InputError: Not the state dict of a `resnet18`, or the net is not of the full variant with group 3.
        """
        self.trunk.load_torchvision(state_dict)


def slice_size(image_size: int | tuple[int, int] | None, variant: str) -> tuple[int, int]:
    """In-plane size (h, w) from the argument `image_size`.

    Raises:
        InputError: Not one or two positive whole numbers.
    """
    sizes = spatial_size(IMAGE_SIZE.get(variant, 48) if image_size is None else image_size, "image_size", dims=2)
    if len(sizes) != 2:
        raise InputError(f"image_size= expects the two in-plane sizes (h, w) or one number, got {image_size!r}")
    return sizes[0], sizes[1]


def check_axis(slice_axis: int) -> int:
    """A spatial axis of a volume.

    Raises:
        InputError: Not 0, 1 or 2.
    """
    if slice_axis not in (0, 1, 2):
        raise InputError(f"slice_axis= expects the spatial axis 0, 1 or 2, got {slice_axis!r}")
    return slice_axis


def check_group(group: int) -> int:
    """A number of slices per picture.

    Raises:
        InputError: Not a whole number of at least 1.
    """
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise InputError(f"group= expects a whole number of slices of at least 1, got {group!r}")
    return group
