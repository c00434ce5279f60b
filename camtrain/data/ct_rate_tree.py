"""A small folder in the layout of CT-RATE, for machines without it: phantom scans, tables, and organs for some."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable
from camtrain.data.ct_rate_files import FINDINGS
from camtrain.data.phantom import Case, Phantom

LABELS = {
    "nodule": "Lung nodule",
    "ground_glass": "Lung opacity",
    "consolidation": "Consolidation",
    "effusion": "Pleural effusion",
    "cardiomegaly": "Cardiomegaly",
    "coronary_calcification": "Coronary artery wall calcification",
    "pericardial_effusion": "Pericardial effusion",
}
"""Finding of the phantom -> column of CT-RATE; the other eleven columns are 0."""
# Organ of the phantom -> organs of TotalSegmentator from below upwards, sharing its height.
_ORGANS = {
    1: ("lung_lower_lobe_left", "lung_upper_lobe_left"),
    2: ("lung_lower_lobe_right", "lung_middle_lobe_right", "lung_upper_lobe_right"),
    3: ("heart",),
    4: ("aorta",),
    5: ("esophagus",),
    6: ("vertebrae_T9", "vertebrae_T6", "vertebrae_T3"),
}
_INTERCEPT = -8192.0
_METADATA = ("VolumeName", "Manufacturer", "RescaleIntercept", "RescaleSlope", "XYSpacing", "ZSpacing")


def make_ct_rate_tree(
    path: str | os.PathLike[str],
    train: int = 8,
    valid: int = 4,
    size: tuple[int, int, int] = (48, 48, 40),
    fixed: bool = True,
    organs: float = 0.5,
    seed: int = 0,
) -> Path:
    """Write chest phantoms as CT-RATE is written.

    Each patient has one scan `a`, every third one also `b`, and each scan two reconstructions, the second noisier. The
    tables have all 18 columns, one row more than there are volumes, and one volume that shows no chest. A result on
    such data says nothing about CT-RATE.

    Args:
        path: Folder to write, made if missing. It must be empty.
        train: Number of patients in `train`.
        valid: Number of patients in `valid`.
        size: Voxels of a volume (right, front, up).
        fixed: Write `train_fixed` and `valid_fixed` with right headers, or `train` and `valid` as they were first
            published: an identity as affine, and values that need slope and intercept.
        organs: Part of the scans of each split that have organs in `ts_seg/ts_total`.
        seed: Another seed, other scans.

    Returns:
        `path`, the `root=` of the data module.

    Raises:
        InputError: An argument is out of range, or the folder holds files.

    Example:
        >>> import tempfile
        >>> root = make_ct_rate_tree(tempfile.mkdtemp(), train=1, valid=1, size=(20, 20, 16))
        >>> [str(file.relative_to(root)) for file in sorted(root.glob("train_fixed/*/*/*"))][0]
        'train_fixed/train_1/train_1_a/train_1_a_1.nii.gz'
    """
    root, counts = Path(path), {"train": train, "valid": valid}
    if min(counts.values()) < 0 or not 0 <= organs <= 1:
        raise InputError(f"train and valid expect numbers from 0 on and organs a part, got {counts} and {organs}")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"expected an empty or new folder to write scans to, got {root}: name another one")
    for name in ("multi_abnormality_labels", "metadata"):
        (root / name).mkdir(parents=True, exist_ok=True)
    phantom = Phantom(size=size, shortcut=None, seed=seed)
    ids = {name: number for name, (number, *_) in OrganTable.load("ct_rate").organs.items()}
    for split, count in counts.items():
        _write_split(root, split, count, phantom, ids, fixed, organs)
    return root


def to_total_segmentator(organs: NDArray[np.integer], ids: Mapping[str, int]) -> NDArray[np.uint8]:
    """Organs of the phantom (X, Y, Z) with the ids of TotalSegmentator.

    Args:
        organs: Ids of the table `phantom`.
        ids: Organ of TotalSegmentator -> id.
    """
    named = np.zeros(organs.shape, dtype=np.uint8)
    for number, names in _ORGANS.items():
        heights = np.flatnonzero((organs == number).any(axis=(0, 1)))
        for name, part in zip(names, np.array_split(heights, len(names)), strict=True):
            inside = np.isin(np.arange(organs.shape[2]), part)
            named[(organs == number) & inside] = ids[name]
    return named


def _write_split(
    root: Path, split: str, count: int, phantom: Phantom, ids: Mapping[str, int], fixed: bool, organs: float
) -> None:
    folder = f"{split}_fixed" if fixed else split
    findings: list[list[object]] = []
    metadata: list[list[object]] = []
    scans = [(patient, scan) for patient in range(1, count + 1) for scan in ("a", "b")[: 1 + (patient % 3 == 0)]]
    for index, (patient, scan) in enumerate(scans):
        case = phantom.case("train" if split == "train" else "test", index)
        truth = _truths(case, phantom.labels)
        for reconstruction in (1, 2):
            name = f"{split}_{patient}_{scan}_{reconstruction}.nii.gz"
            inner = Path(folder) / f"{split}_{patient}" / f"{split}_{patient}_{scan}"
            _write_scan(root / inner / name, case, fixed, reconstruction)
            if int((index + 1) * organs) > int(index * organs):
                volume = to_total_segmentator(case.organs, ids)
                _save(root / "ts_seg" / "ts_total" / inner / name, volume, case.affine if fixed else np.eye(4))
            findings.append([name, *truth])
            x, y, z = np.abs(np.diag(case.affine)[:3])
            metadata.append([name, "phantom", 0 if fixed else _INTERCEPT, 1, [float(x), float(y)], float(z)])
    # The tables know more volumes than are there, and volumes of other parts of the body.
    findings += [[f"{split}_{patient}_a_1.nii.gz", *[0] * len(FINDINGS)] for patient in (count + 1, count + 2)]
    label_file = f"{split}_predicted_labels.csv"
    _write(root / "multi_abnormality_labels" / label_file, ["VolumeName", *FINDINGS], findings)
    word = "validation" if split == "valid" else split
    _write(root / "metadata" / f"{word}_metadata.csv", list(_METADATA), metadata)
    (root / "metadata" / f"no_chest_{split}.txt").write_text(f"{split}_{count + 2}_a_1.nii.gz\n", encoding="utf-8")


def _write_scan(file: Path, case: Case, fixed: bool, reconstruction: int) -> None:
    hu = case.hu.astype(np.float64)
    if reconstruction > 1:
        rng = np.random.default_rng([reconstruction, *case.id.encode()])
        hu = hu + rng.normal(0, 20, hu.shape)
    stored = np.rint(np.clip(hu, -1024, 3000) - (0 if fixed else _INTERCEPT))
    _save(file, stored.astype(np.int16), case.affine if fixed else np.eye(4))


def _save(file: Path, volume: NDArray[np.integer], affine: NDArray[np.floating]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, file)


def _truths(case: Case, labels: tuple[str, ...]) -> list[int]:
    there = {LABELS.get(name) for name, truth in zip(labels, case.label, strict=True) if truth}
    return [int(finding in there) for finding in FINDINGS]


def _write(file: Path, header: list[str], rows: list[list[object]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)
