"""From a row of the manifest to network input: RAS, spacing, HU window, crop or pad, and the way back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    MapTransform,
    NormalizeIntensityd,
    Resize,
    ResizeWithPadOrCropd,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentilesd,
    Spacingd,
    Transform,
)
from numpy.typing import NDArray
from scipy.ndimage import affine_transform
from torch import Tensor

from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable
from camtrain.data._faults import Faults
from camtrain.data.manifest import Case
from camtrain.data.manifest_augment import augmentation
from camtrain.data.manifest_files import grid_message, read_image, read_organs, same_grid, to_ras
from camtrain.data.manifest_paths import stem_of
from camtrain.data.volume_picture import is_picture

CT_WINDOW = (-1000.0, 800.0)
Window = Sequence[float] | str
Spacing = float | Sequence[float] | None
Size = int | Sequence[int] | None
_KEYS = ("image", "organs")
_T = TypeVar("_T")


class CaseError(InputError):
    """An `InputError` about one case that stays one sentence when it comes out of a data loader's worker.

    torch rebuilds an exception of a worker as `type("Caught ... Original Traceback ... : message")`; everything
    before the message is cut off again here.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit(f"{type(self).__module__}.{type(self).__qualname__}: ", 1)[-1].strip())


class ReadCase(Transform):  # type: ignore[misc]
    """Read and check the volumes of a `Case`; both come out in RAS, on one grid.

    Args:
        table: Organ names and ids, needed for cases with organs.
        organs: Read them?
    """

    def __init__(self, table: OrganTable | None, organs: bool = True) -> None:
        self.table = table
        self.organs = organs

    def __call__(self, case: Case) -> dict[str, Any]:
        """Read a case: image (1, X, Y, Z) float32, organs (1, X, Y, Z) if segmented, label (L,), id, patient.

        Raises:
            InputError: What is wrong with the image, with the organs, or with both.
        """
        with_organs = case.organs is not None and self.organs
        if with_organs and self.table is None:
            raise InputError(f"expected an organ table for {case.organs}, got none: pass table=")
        faults = Faults(str(case.image))
        image = organs = None
        with faults.noting():
            image = read_image(case.image)
        with faults.noting():
            if case.organs is not None and self.table is not None and with_organs:
                organs = read_organs(case.organs, self.table)
        faults.stop()
        assert image is not None  # noqa: S101  (there are no faults)
        read = {
            "id": case.id,
            "patient": case.patient,
            "image": image if is_picture(case.image) else to_ras(image),
            "label": torch.tensor(case.label, dtype=torch.float32),
            "original_shape": tuple(image.shape[1:]),
            "original_affine": torch.as_tensor(image.affine, dtype=torch.float64),
        }
        if organs is not None:
            turned = organs if is_picture(case.image) else to_ras(organs)
            if not same_grid(turned, read["image"]):
                raise InputError(grid_message(f"organs {_named(case.organs)}", organs, f"image {case.image}", image))
            # One affine for both, so that rounding in a header cannot part them in the transforms that follow.
            read["organs"] = MetaTensor(turned.as_tensor().float(), affine=read["image"].affine)
        return read


def _named(files: Path | tuple[Path, ...] | None) -> str:
    """Organs in a message; of several files the first, whose grid the others have."""
    return f"{files[0]} (and {len(files) - 1} more)" if isinstance(files, tuple) else str(files)


class FillOrgans(MapTransform):  # type: ignore[misc]
    """Whole ids again after resampling; zeros where a case is not segmented."""

    def __init__(self) -> None:
        super().__init__(("organs",), allow_missing_keys=True)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Add has_organs, and organs (1, *S) on the grid of the image."""
        case = dict(data)
        case["has_organs"] = "organs" in case
        image = case["image"]
        organs = case["organs"].as_tensor() if case["has_organs"] else torch.zeros_like(image.as_tensor()[:1])
        case["organs"] = MetaTensor(organs.round().to(torch.int32), affine=image.affine)
        return case


def build_transforms(
    table: OrganTable | None,
    spacing: Spacing = None,
    size: Size = None,
    window: Window = CT_WINDOW,
    augment: bool = False,
    mirror: float = 0.0,
    picture: bool = False,
) -> Compose:
    """Transforms from a `Case` to a dict of the batch contract without the batch axis.

    Args:
        table: Organ names and ids; None when no case has organs.
        spacing: Voxel size in mm (one number, or right-left, back-front, bottom-top); None keeps the scan's own.
        size: Number of voxels after centred cropping or padding with air; None keeps what the spacing gives. A picture
            is shrunk or enlarged to fit in, and padded.
        window: HU that become 0 and 1; what lies outside is clipped. `"percentiles"`: the 0.5th and 99.5th of each
            scan instead (MRI). `"zscore"`: mean 0 and deviation 1 of each scan instead (cryo-ET). Pictures of 8 bits
            take [0, 255] where nothing is said.
        augment: Small random rotations, scalings, shifts and changes of brightness (for training).
        mirror: Probability that a case is mirrored (`Mirror`).
        picture: Are these pictures (rows, columns), not volumes?

    Raises:
        InputError: An argument is not as described.
    """
    axes = 2 if picture else 3
    steps: list[Callable[..., Any]] = [ReadCase(table)]
    if spacing is not None and picture:
        raise InputError(f"spacing expects volumes, got {spacing} for pictures, which have no mm: leave it out")
    if spacing is not None:
        pixdim = check_triple("spacing", spacing, float)
        steps.append(Spacingd(_KEYS, pixdim=pixdim, mode=("bilinear", "nearest"), allow_missing_keys=True))
    steps.append(_intensities((0.0, 255.0) if picture and tuple(window) == CT_WINDOW else window))
    if size is not None:
        voxels = check_triple("size", size, int, axes)
        steps += [Letterbox(voxels)] if picture else []
        steps.append(ResizeWithPadOrCropd(_KEYS, voxels, allow_missing_keys=True))
    return Compose([*steps, *augmentation(table, augment, mirror, axes), FillOrgans()])


def _intensities(window: Window) -> Transform:
    if window == "percentiles":
        return ScaleIntensityRangePercentilesd("image", lower=0.5, upper=99.5, b_min=0.0, b_max=1.0, clip=True)
    if window == "zscore":
        return NormalizeIntensityd("image")
    low, high = check_window(window)
    return ScaleIntensityRanged("image", a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True)


class Letterbox(MapTransform):  # type: ignore[misc]
    """Shrink or enlarge a picture until it fits into a frame, with its proportions; organs by the nearest pixel.

    Args:
        size: (rows, columns) of the frame.
    """

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__(_KEYS, allow_missing_keys=True)
        self.size = tuple(size)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """A case with image and organs in the frame."""
        case = dict(data)
        shape = case["image"].shape[1:]
        scale = min(frame / n for frame, n in zip(self.size, shape, strict=True))
        fitting = [max(1, round(n * scale)) for n in shape]
        for key in self.key_iterator(case):
            mode = "bilinear" if key == "image" else "nearest-exact"
            case[key] = Resize(fitting, mode=mode, anti_aliasing=key == "image" and scale < 1)(case[key])
        return case


def check_window(window: Window) -> tuple[float, float]:
    """`window` as two floats.

    Raises:
        InputError: It is not two increasing numbers.
    """
    if isinstance(window, str):
        raise InputError(f"window expects [low, high], 'percentiles' or 'zscore', got {window!r}")
    if len(window) != 2 or not window[0] < window[1]:
        raise InputError(
            f"window expects [low, high] in HU with low < high, got {list(window)}: for example [-1000, 800]"
        )
    return float(window[0]), float(window[1])


def check_triple(name: str, value: float | Sequence[float], kind: Callable[[Any], _T], axes: int = 3) -> tuple[_T, ...]:
    """One number or three as three.

    Args:
        name: Argument, for the message.
        value: One positive number, or three (right-left, back-front, bottom-top).
        kind: int or float.
        axes: How many; 2 for pictures.

    Raises:
        InputError: Not one or three positive numbers of this kind.
    """
    values = [value] * axes if isinstance(value, (int, float)) else list(value)
    if len(values) != axes or not all(v > 0 and kind(v) == v for v in values):
        what = "whole numbers of voxels" if kind is int else "numbers of mm"
        raise InputError(
            f"{name} expects one or {'three' if axes == 3 else 'two'} positive {what}, got {value}: "
            f"for example {name}=2 or {[2, 2, 3][:axes]}"
        )
    return tuple(kind(v) for v in values)


def root_input_error(error: BaseException) -> InputError | None:
    """The `InputError` below the RuntimeErrors that MONAI wraps around a failing transform, if there is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return cause
        cause = cause.__cause__
    return None


def collate(cases: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack cases to a batch of plain tensors, with one affine per case.

    Args:
        cases: What `build_transforms` gives.

    Returns:
        image (B, 1, *S) float32, label (B, L) float32, organs (B, 1, *S) int32, has_organs (B,) bool, id and patient
        (empty = unknown) lists of str, affine (B, 4, 4) float32, and original_shape (B, 3) and original_affine
        (B, 4, 4) float32 of the files.

    Raises:
        InputError: The cases differ in size.
    """
    cases = list(cases)
    sizes = {tuple(case["image"].shape[1:]): case["id"] for case in cases}
    if len(sizes) > 1:
        (one, a), (other, b) = list(sizes.items())[:2]
        raise CaseError(
            f"expected cases of one size in a batch, got {one} for {a!r} and {other} for {b!r}: "
            "set size= (crop or pad), or batch_size=1"
        )
    return {
        "image": torch.stack([case["image"].as_tensor() for case in cases]).float(),
        "label": torch.stack([case["label"] for case in cases]),
        "organs": torch.stack([case["organs"].as_tensor() for case in cases]),
        "has_organs": torch.tensor([case["has_organs"] for case in cases]),
        "id": [case["id"] for case in cases],
        "patient": [case["patient"] for case in cases],
        "affine": torch.stack([torch.as_tensor(case["image"].affine, dtype=torch.float32) for case in cases]),
        "original_shape": torch.tensor([case["original_shape"] for case in cases]),
        "original_affine": torch.stack([case["original_affine"].float() for case in cases]),
    }


def load_case(
    image_path: str | os.PathLike[str],
    spacing: Spacing = None,
    size: Size = None,
    window: Window = CT_WINDOW,
    organs: str | os.PathLike[str] | None = None,
    table: OrganTable | None = None,
) -> dict[str, Any]:
    """Read one scan exactly as `ManifestDataModule` reads a row with the same arguments.

    Args:
        image_path: The scan: a file of a known format, or the folder of a DICOM series.
        spacing: As in `ManifestDataModule`.
        size: As in `ManifestDataModule`.
        window: As in `ManifestDataModule`.
        organs: Multi-label file or folder of binary files, if any.
        table: Organ names and ids; needed with `organs`.

    Returns:
        image (1, 1, *S) float32, organs (1, 1, *S) int32, has_organs (1,) bool, id [file name without suffix],
        affine (4, 4) float64 of the network's grid, original_shape (X, Y, Z) and original_affine (4, 4) float64 of
        the file: what `to_original_grid` needs.

    Raises:
        InputError: A file is missing, unreadable or not as it should be.
    """
    path, mask = Path(image_path), None if organs is None else Path(organs)
    for name, file in (("image", path), ("organs", mask)):
        if file is not None and not file.exists():
            raise InputError(f"expected a NIfTI file for {name}, got {file}, which does not exist: correct the path")
    case = Case(stem_of(path) or path.name, path, mask, split="", label=(), patient="", where=str(path))
    transforms = build_transforms(table, spacing, size, window, picture=is_picture(path))
    try:
        read = transforms(case)
    except Exception as error:
        if (known := root_input_error(error)) is None:
            raise
        raise CaseError(str(known)) from error
    batch = collate([read])
    del batch["label"]
    batch["affine"] = torch.as_tensor(read["image"].affine, dtype=torch.float64)
    return {**batch, "original_shape": read["original_shape"], "original_affine": read["original_affine"]}


def to_original_grid(
    volume: Tensor | NDArray[Any],
    affine_network: Tensor | NDArray[Any],
    original_shape: Sequence[int],
    original_affine: Tensor | NDArray[Any],
    order: int = 1,
) -> NDArray[np.float32]:
    """Bring a volume on the network's grid back to the voxels of the original scan.

    Args:
        volume: (X', Y', Z'), for example an attention map enlarged to the image's size.
        affine_network: (4, 4) voxel-to-world of `volume`.
        original_shape: (X, Y, Z) of the scan.
        original_affine: (4, 4) voxel-to-world of the scan.
        order: 1 linear, 0 nearest (for ids), up to 5 splines.

    Returns:
        (X, Y, Z) float32; 0 where the network saw nothing (the scan outside the crop). Values are interpolated, so
        a sum over voxels is not kept.

    Raises:
        InputError: The volume is not 3D.

    Example:
        >>> grid = to_original_grid(np.ones((2, 2, 2)), np.diag([2, 2, 2, 1]), (6, 4, 4), np.eye(4))
        >>> grid[:, 0, 0].tolist()
        [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    """
    data = np.asarray(volume, dtype=np.float32)
    if data.ndim != 3:
        raise InputError(
            f"expected one volume of shape (X, Y, Z), got {data.shape}: pass one label of one case at a time"
        )
    network, original = (np.asarray(a, dtype=np.float64) for a in (affine_network, original_affine))
    step = np.linalg.inv(network) @ original  # voxel of the scan -> voxel of the network's grid
    matrix, offset = np.where(np.abs(step[:3, :3]) < 1e-7, 0.0, step[:3, :3]), step[:3, 3]
    shape = tuple(int(n) for n in original_shape)
    result: NDArray[np.float32] = affine_transform(data, matrix, offset, shape, order=order, mode="nearest")
    # 'nearest' carries the edge outwards without end; the network's image ends half a voxel after its last centre.
    ranges = np.ogrid[tuple(slice(n) for n in shape)]
    for row, shift, n in zip(matrix, offset, data.shape, strict=True):
        index = sum((m * r for m, r in zip(row, ranges, strict=True) if m), start=np.full((1, 1, 1), shift))
        result *= (index >= -0.5 - 1e-6) & (index <= n - 0.5 + 1e-6)
    return result
