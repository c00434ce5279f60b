"""The cases of RAD-ChestCT: from a file, its lungs and its row of findings to one case of the batch contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable
from camtrain.anatomy.partition import (
    BORDERS,
    box_of,
    lung_is_missing,
    read_segmap,
    rough_organs,
    segmap_file,
    split_organs,
)
from camtrain.data.manifest_transforms import CaseError
from camtrain.data.rad_chestct_files import read_scan, read_volume
from camtrain.data.rad_chestct_labels import Truths, organs_told
from camtrain.data.rad_chestct_transforms import (
    Box,
    Crop,
    Size,
    Turn,
    affine_of,
    central_crop,
    lung_crop,
    random_turn,
    windowed,
)

Centre = Literal["volume", "lungs"]
_PARTITION = {"lung_right": (1,), "heart": (2,), "lung_left": (3,)}


@dataclass(frozen=True)
class Preparation:
    """What is done to each volume.

    Attributes:
        size: Voxels after crop and padding.
        centre: `"volume"` or `"lungs"`.
        window: HU that become 0 and 1.
        subtract: Taken off then.
        borders: See `camtrain.anatomy.partition.BORDERS`.
        rough: Take rough organs where the segmentation is bad.
    """

    size: Size = (405, 420, 420)
    centre: Centre = "volume"
    window: tuple[float, float] = (-1000.0, 800.0)
    subtract: float = 0.449
    borders: tuple[int, int] | None = BORDERS
    rough: bool = True


class RadChestCTScans(Dataset[dict[str, Any]]):
    """The cases of one split, read when they are asked for.

    Args:
        ids: Names of the cases.
        scans: File of each.
        organs: Organ file of each, or None.
        truths: From `make_truths`.
        table: Organ table of the labels.
        preparation: What is done to each volume.
        patients: Patient of each, empty = unknown; None = of none.
        boxes: Id -> box of the lungs, for `centre="lungs"`.
        sided: Add `allowed_organs`.
        augment: Flip and turn.
    """

    def __init__(
        self,
        ids: Sequence[str],
        scans: Sequence[Path],
        organs: Sequence[Path | None],
        truths: Truths,
        table: OrganTable,
        preparation: Preparation,
        patients: Sequence[str] | None = None,
        boxes: Mapping[str, Box] | None = None,
        sided: bool = True,
        augment: bool = False,
    ) -> None:
        self.ids, self.scans, self.organs, self.truths = list(ids), list(scans), list(organs), truths
        self.table, self.preparation, self.boxes = table, preparation, boxes or {}
        self.patients = [""] * len(self.ids) if patients is None else list(patients)
        self.sided, self.augment = sided, augment

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One case in the words of the batch contract."""
        try:
            return self.case(index, random_turn(self.preparation.size) if self.augment else Turn())
        except InputError as error:
            raise CaseError(str(error)) from error  # one sentence, out of a worker too

    def case(self, index: int, turn: Turn) -> dict[str, Any]:
        """One case under a turn that is given."""
        hu = read_scan(self.scans[index])
        whole, lungs = self._read_organs(index, hu.shape)
        crop = self._crop(index, hu.shape, lungs)
        organs = self._cropped(whole, lungs, crop)
        image = windowed(turn.of(crop.of(hu, hu.min())), self.preparation.window, self.preparation.subtract)
        ids = np.zeros(crop.size, dtype=np.uint8) if organs is None else organs
        affine = turn.affine(crop.affine(affine_of()), crop.size)
        case = {
            "image": image[None],
            "label": torch.from_numpy(self.truths.label[index].copy()),
            "organs": torch.from_numpy(np.ascontiguousarray(turn.of(ids)))[None],
            "has_organs": torch.tensor(organs is not None),
            "id": self.ids[index],
            "patient": self.patients[index],
            "affine": torch.from_numpy(affine.astype(np.float32)),
        }
        if self.sided:
            told = organs_told(self.truths.left[index], self.truths.right[index], list(self.table.organs))
            case["allowed_organs"] = torch.from_numpy(told)
        return case

    def _read_organs(self, index: int, shape: tuple[int, ...]) -> tuple[NDArray[Any] | None, NDArray[np.bool_] | None]:
        """Ids of a segmenter, or lungs of the partition, or neither; on the grid of the scan."""
        file = self.organs[index]
        if file is None:
            return None, None
        if file.name.endswith("_organs.npz"):
            return self._known_ids(file, _on_grid(file, read_volume(file, "organs"), shape)), None
        if {name: self.table.organs.get(name) for name in _PARTITION} != _PARTITION:
            raise InputError(
                f"{file}: expected a table with the organs of the partition (lung_right 1, heart 2, lung_left 3), got "
                "another: write <id>_organs.npz with the table's ids, or take table: rad_chestct"
            )
        return None, _on_grid(file, read_segmap(file), shape)

    def _known_ids(self, file: Path, ids: NDArray[Any]) -> NDArray[np.uint8]:
        if ids.dtype.kind == "f" or ids.min() < 0 or ids.max() > np.iinfo(np.uint8).max:
            raise InputError(f"{file}: expected whole ids from 0 to 255 under 'organs', got {ids.dtype}")
        small = ids.astype(np.uint8)
        try:
            self.table.check_ids(torch.from_numpy(np.flatnonzero(np.bincount(small.ravel()))))
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        return small

    def _crop(self, index: int, shape: tuple[int, ...], lungs: NDArray[np.bool_] | None) -> Crop:
        size, borders = self.preparation.size, self.preparation.borders
        if self.preparation.centre == "volume":
            return central_crop(shape, size)
        box = self.boxes.get(self.ids[index]) or (None if lungs is None else box_of(lungs))
        # Half a pair of lungs is no guide to their middle.
        if box is None or lung_is_missing(box, borders):
            return central_crop(shape, size)
        return lung_crop(shape, size, box)

    def _cropped(
        self, ids: NDArray[np.uint8] | None, lungs: NDArray[np.bool_] | None, crop: Crop
    ) -> NDArray[np.uint8] | None:
        """Ids on the grid of the network, or None where there are no organs that could be used."""
        if lungs is not None:
            ids = split_organs(lungs, self.preparation.borders)
            if ids is None:
                return rough_organs(crop.size) if self.preparation.rough and "rough_left" in self.table.organs else None
        return None if ids is None else crop.of(ids, 0)


def organ_file(folder: Path, name: str) -> Path | None:
    """File with the organs of a scan, those of a segmenter before those of the partition."""
    for file in (folder / f"{name}_organs.npz", segmap_file(folder, name)):
        if file.is_file():
            return file
    return None


def _on_grid(file: Path, volume: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if volume.shape != shape:
        raise InputError(
            f"{file}: expected the grid of its scan, {shape}, got {volume.shape}: delete the file and make it again"
        )
    return volume
