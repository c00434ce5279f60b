"""What a volume's header should have said: HU and millimetres put right behind the reading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from torch import Tensor

from camtrain.data.ct_rate_files import Header


class CorrectHeader(Transform):  # type: ignore[misc]
    """Give a case that was read from a file without HU and spacing both.

    The directions of the axes stay those of the file. Image and organs keep one affine, so that they are on one grid
    before and after; `original_affine` is put right, too.

    Args:
        headers: Id of a case -> what its header should say; other cases pass as they are.
    """

    def __init__(self, headers: Mapping[str, Header]) -> None:
        self.headers = headers

    def __call__(self, case: dict[str, Any]) -> dict[str, Any]:
        """A case from `ReadCase`, put right."""
        header = self.headers.get(case["id"])
        if header is None:
            return case
        original = torch.as_tensor(case["original_affine"], dtype=torch.float64)
        # Axis of the file that became each axis of the image, which is turned to RAS by now.
        axes = np.argsort(nib.orientations.io_orientation(original.numpy())[:, 0])
        spacing = [header.spacing[int(axis)] for axis in axes]
        image = case["image"]
        affine = with_spacing(torch.as_tensor(image.affine, dtype=torch.float64), spacing)
        corrected = dict(case)
        corrected["image"] = MetaTensor(image.as_tensor() * header.slope + header.intercept, affine=affine)
        if "organs" in case:
            corrected["organs"] = MetaTensor(case["organs"].as_tensor(), affine=affine)
        corrected["original_affine"] = with_spacing(original, header.spacing)
        return corrected


def with_spacing(affine: Tensor, spacing: tuple[float, ...] | list[float]) -> Tensor:
    """The affine with other voxel sizes and the same directions and origin.

    Example:
        >>> with_spacing(torch.diag(torch.tensor([1.0, -1.0, 1.0, 1.0])), (2.0, 3.0, 4.0)).diagonal().tolist()
        [2.0, -3.0, 4.0, 1.0]
    """
    changed = affine.clone()
    axes = changed[:3, :3]
    changed[:3, :3] = axes / axes.norm(dim=0) * torch.as_tensor(spacing, dtype=axes.dtype)
    return changed
