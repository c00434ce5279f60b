"""BodyCAM: AxialNet's trunk under a CAM head, the paper's baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from camtrain.models._parts import check_outputs, replaced_linear
from camtrain.models._slices import SliceTrunk, StackSlices, Variant, pictures_of
from camtrain.models.axial_net import check_axis, check_group, slice_size


class BodyCAM(nn.Module):
    """The trunk of AxialNet, then the average over slice groups and cells, then one Linear layer.

    A pool + FC head: CAM, Grad-CAM and HiResCAM of the submodule `stack` are the same map up to one positive factor,
    the number of cells.

    Args:
        labels: Number of outputs L; `resize_head` changes it later.
        variant: `"full"` or `"small"`, as in `AxialNet`.
        image_size: In-plane size, as in `AxialNet`.
        slice_axis: Spatial axis along which slices lie.
        group: Adjacent slices per picture.
        activation_checkpointing: Recompute stem and stages in the backward pass.

    Raises:
        InputError: An argument out of range; in `forward`, an image of another shape.

    Example:
        >>> import torch
        >>> BodyCAM(labels=3, variant="small", image_size=32)(torch.zeros(2, 1, 6, 32, 32)).shape
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
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.image_size = slice_size(image_size, variant)
        self.slice_axis, self.group = check_axis(slice_axis), check_group(group)
        self.config: dict[str, Any] = {
            "labels": check_outputs(labels),
            "variant": variant,
            "image_size": list(self.image_size),
            "slice_axis": slice_axis,
            "group": group,
            "activation_checkpointing": activation_checkpointing,
        }
        self.trunk = SliceTrunk(variant, self.image_size, group, activation_checkpointing=activation_checkpointing)
        self.stack = StackSlices(slice_axis)
        self.fc = nn.Linear(self.trunk.channels, labels)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, L) of volumes (B, 1, *S), or of the authors' (B, N, 3, h, w) with `slice_axis=0`."""
        pictures, groups = pictures_of(image, self.group, self.slice_axis, self.image_size)
        activations = self.stack(self.trunk(pictures), groups)
        logits: Tensor = self.fc(activations.mean(dim=(2, 3, 4)))
        return logits

    def resize_head(self, labels: int) -> None:
        """Give the net another number of outputs (a fresh last layer); nothing happens when it has that number."""
        self.fc = replaced_linear(self.fc, labels)
        self.config["labels"] = labels

    def load_torchvision_trunk(self, state_dict: Mapping[str, Tensor]) -> None:
        """Start from torchvision's `resnet18`; see `AxialNet.load_torchvision_trunk`."""
        self.trunk.load_torchvision(state_dict)
