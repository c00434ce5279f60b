"""Reading CT-RATE: names of volumes, tables of findings and of headers, lists of what is no chest, organs.

```
ROOT/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz      patient 1, scan a, reconstruction 1; headers are right
ROOT/train/...   ROOT/valid/...   ROOT/valid_fixed/...     as first published: HU and spacing only in the metadata
ROOT/multi_abnormality_labels/train_predicted_labels.csv   VolumeName and 18 findings of 0 and 1; valid_... likewise
ROOT/metadata/train_metadata.csv                           VolumeName, RescaleSlope, RescaleIntercept, XYSpacing,
                                                           ZSpacing; validation_metadata.csv likewise
ROOT/metadata/no_chest_train.txt, no_chest_valid.txt       volumes that show no chest
ROOT/ts_seg/ts_total/train_fixed/train_1/...               organs of TotalSegmentator, one multi-label file per volume
```
ROOT is the folder `dataset` of the download. Tables may lie in ROOT itself, too.
"""

from __future__ import annotations

import csv
import hashlib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from camtrain._errors import InputError
from camtrain.data._faults import Faults

FINDINGS = (
    *("Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion"),
    *("Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis"),
    *("Lung nodule", "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion", "Mosaic attenuation pattern"),
    *("Peribronchial thickening", "Consolidation", "Bronchiectasis", "Interlobular septal thickening"),
)
"""The columns of the published table, in its order."""
SPLITS = ("train", "valid")
"""Published splits."""
_LABELS = {"train": "train_predicted_labels.csv", "valid": "valid_predicted_labels.csv"}
_METADATA = {"train": ("train_metadata.csv",), "valid": ("validation_metadata.csv", "valid_metadata.csv")}
_NO_CHEST = {"train": "no_chest_train.txt", "valid": "no_chest_valid.txt"}
_FOLDERS = ("multi_abnormality_labels", "metadata", "")
_NAME = re.compile(r"((?:[a-z]+)_\d+)_([a-z]+)_(\d+)")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Volume:
    """What the name of a volume says.

    Attributes:
        name: Without suffix, such as `train_1_a_2`.
        patient: `train_1`.
        scan: `train_1_a`.
        reconstruction: 2.
    """

    name: str
    patient: str
    scan: str
    reconstruction: int


@dataclass(frozen=True)
class Header:
    """What the metadata say of a volume that was published without them.

    Attributes:
        slope: HU = slope x stored + intercept.
        intercept: See there.
        spacing: mm along the first, second and third axis of the file.
    """

    slope: float
    intercept: float
    spacing: tuple[float, float, float]


def parse_name(text: str) -> Volume | None:
    """Patient, scan and reconstruction out of a volume's name; None where it has another form.

    Example:
        >>> parse_name("train_1_a_2.nii.gz")
        Volume(name='train_1_a_2', patient='train_1', scan='train_1_a', reconstruction=2)
    """
    name = stem(text)
    match = _NAME.fullmatch(name)
    return Volume(name, match[1], f"{match[1]}_{match[2]}", int(match[3])) if match else None


def stem(text: str) -> str:
    """A file's name without folders and suffix."""
    name = text.strip().replace("\\", "/").rsplit("/", 1)[-1]
    return name.removesuffix(".gz").removesuffix(".nii").removesuffix(".npz")


def label_name(column: str) -> str:
    """The label of a column.

    Example:
        >>> label_name("Coronary artery wall calcification")
        'coronary_artery_wall_calcification'
    """
    return re.sub(r"[^a-z0-9]+", "_", column.strip().lower()).strip("_")


def find_root(root: Path) -> Path:
    """The folder `dataset`, or what was given if that is it.

    Raises:
        InputError: No such folder.
    """
    if not root.is_dir():
        raise InputError(f"{root}: expected the folder dataset of CT-RATE, got no such folder: set root= to it")
    inner = root / "dataset"
    return inner if inner.is_dir() and not any((root / split).is_dir() for split in SPLITS) else root


def find_volumes(root: Path, split: str) -> tuple[Path, bool] | None:
    """Folder of a published split and whether its headers are right, or None."""
    for name, fixed in ((f"{split}_fixed", True), (split, False)):
        if (root / name).is_dir():
            return root / name, fixed
    return None


def find_table(root: Path, names: Iterable[str]) -> Path | None:
    """The first file of these names in the folders where CT-RATE has its tables."""
    return next((file for name in names for part in _FOLDERS if (file := root / part / name).is_file()), None)


def labels_file(root: Path, split: str) -> Path:
    """Table of findings of a published split.

    Raises:
        InputError: It is not there.
    """
    found = find_table(root, [_LABELS[split]])
    if found is None:
        raise InputError(
            f"{root}: expected multi_abnormality_labels/{_LABELS[split]} with the findings, got none: copy it there, "
            "or set tables= to the folder that holds the CSV files"
        )
    return found


def metadata_file(root: Path, split: str) -> Path | None:
    """Table of headers of a published split, or None."""
    return find_table(root, _METADATA[split])


def read_no_chest(root: Path, split: str) -> set[str]:
    """Names of volumes that show no chest; empty where there is no list."""
    file = find_table(root, [_NO_CHEST[split]])
    if file is None:
        return set()
    try:
        return {stem(line) for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: expected one name per line, got {error}: copy the file again") from None


def read_labels(file: Path, labels: Sequence[str] | None = None) -> tuple[list[str], dict[str, tuple[float, ...]]]:
    """Findings of the volumes of a table.

    Args:
        file: CSV with `VolumeName` and one column per finding.
        labels: Label names to take, in this order; None = all columns of the table.

    Returns:
        Label names, and name of a volume -> one of 0, 1, NaN (empty, -1: unknown) per label.

    Raises:
        InputError: The table is no such table; every wrong cell has a line.
    """
    header, rows = _read(file, ("VolumeName",))
    columns = {label_name(name): place for place, name in enumerate(header) if name != "VolumeName"}
    names = list(columns) if labels is None else list(labels)
    if missing := [name for name in names if name not in columns]:
        raise InputError(f"{file}: expected a column for {missing[0]!r}, got {', '.join(columns)}: correct labels=")
    found: dict[str, tuple[float, ...]] = {}
    problems: list[str] = []
    where: dict[str, int] = {}
    for number, cells in rows:
        name = stem(cells[header.index("VolumeName")])
        if parse_name(name) is None:
            problems.append(f"row {number}: VolumeName {name!r} is not of the form train_1_a_1.nii.gz")
        elif name in found:
            problems.append(f"row {number}: {name!r} stands in row {where[name]} already")
        truths = [_truth(cells[columns[label]]) for label in names]
        problems += [
            f"row {number}, column {header[columns[label]]!r}: {cells[columns[label]]!r} is no 0, 1 or empty"
            for label, truth in zip(names, truths, strict=True)
            if truth is None
        ]
        found[name] = tuple(math.nan if truth is None else truth for truth in truths)
        where[name] = number
    stop_at(problems, file, "correct the table")
    return names, found


def read_headers(file: Path, wanted: Collection[str]) -> dict[str, Header]:
    """Slope, intercept and spacing of volumes.

    Args:
        file: Table of metadata.
        wanted: Names of volumes that are needed.

    Raises:
        InputError: A column or a volume is missing, or a cell is no number; all are counted.
    """
    columns = ("VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")
    header, rows = _read(file, columns)
    places = [header.index(name) for name in columns]
    found: dict[str, Header] = {}
    problems: list[str] = []
    for number, cells in rows:
        name, *texts = (cells[place] for place in places)
        if stem(name) not in wanted:
            continue
        slope, intercept, xy, z = ([float(text) for text in _NUMBER.findall(cell)] for cell in texts)
        if not (len(slope) == len(intercept) == len(z) == 1 and len(xy) in (1, 2)) or min(*xy, *z) <= 0 or not slope[0]:
            problems.append(f"row {number} ({stem(name)}): {', '.join(texts)}")
            continue
        found[stem(name)] = Header(slope[0], intercept[0], (xy[0], xy[-1], z[0]))
    if not problems:
        problems = [f"no row for {name}" for name in sorted(set(wanted) - set(found))]
    stop_at(problems, file, "these volumes need slope, intercept and spacing: complete the table")
    return found


def organ_paths(organs: Path, folder: str, volume: Volume) -> list[Path]:
    """Where the organs of a volume may lie, the published layout first.

    Args:
        organs: Folder with what TotalSegmentator wrote.
        folder: Name of the folder of the split, such as `train_fixed`.
        volume: The volume.
    """
    inner = Path(volume.patient) / volume.scan
    splits = dict.fromkeys((folder, folder.removesuffix("_fixed"), f"{folder.removesuffix('_fixed')}_fixed", "."))
    places = [Path(split) / inner for split in splits] + [Path()]
    names = (f"{volume.name}.nii.gz", f"{volume.name}_seg.nii.gz", volume.name, f"{volume.name}/segmentations")
    return [organs / place / name for name in names for place in places]


class OrganFinder:
    """Finds organs of volumes; the place of the last one is tried first.

    Args:
        organs: Folder with what TotalSegmentator wrote; None = nobody has organs.
    """

    def __init__(self, organs: Path | None) -> None:
        self.organs = organs
        self._last = 0

    def find(self, folder: str, volume: Volume) -> Path | None:
        """Multi-label file or folder of binary files of a volume, or None."""
        if self.organs is None:
            return None
        paths = organ_paths(self.organs, folder, volume)
        for place in (self._last, *range(len(paths))):
            path: Path = paths[place]
            if path.is_file() or (path.is_dir() and any(path.glob("*.nii*"))):
                self._last = place
                return path
        return None


def chosen_for_validation(patients: Iterable[str], share: float, seed: int) -> set[str]:
    """Patients of the training part that are kept for validation.

    A patient's lot follows from its name and the seed alone, so that nobody changes sides when more volumes are
    downloaded. One at least is chosen and one at least stays.

    Example:
        >>> chosen_for_validation(["train_1", "train_2", "train_3"], 0.1, 0)
        {'train_2'}
    """
    lots = {
        name: int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64
        for name in dict.fromkeys(patients)
    }
    ordered = sorted(lots, key=lots.__getitem__)
    if not share or len(ordered) < 2:
        return set()
    count = sum(lot < share for lot in lots.values())
    return set(ordered[: min(max(1, count), len(ordered) - 1)])


def stop_at(problems: Sequence[str], file: Path, remedy: str) -> None:
    """Raise all problems as one, one line each.

    Raises:
        InputError: There is one.
    """
    faults = Faults(str(file))
    for problem in problems:
        faults.add(f"{file}, {problem}: {remedy}")
    faults.stop()


def _truth(cell: str) -> float | None:
    text = cell.strip().lower()
    if text in ("", "nan", "-1", "-1.0"):
        return math.nan
    return {"0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0}.get(text)


def _read(file: Path, required: Sequence[str]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            lines = [(number, cells) for number, cells in enumerate(csv.reader(stream), start=1) if any(cells)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: expected a CSV file in UTF-8, got {error}: copy it again") from None
    header = [name.strip() for name in lines[0][1]] if lines else []
    if len(header) == 1 and ";" in header[0]:
        raise InputError(f"{file}: expected columns separated by commas, got semicolons: export the table again")
    if missing := [name for name in required if name not in header]:
        raise InputError(
            f"{file}: expected the column {missing[0]!r}, got {', '.join(header[:6]) or 'none'}: which is it?"
        )
    stop_at(
        [
            f"row {number} has {len(cells)} cells instead of {len(header)}"
            for number, cells in lines
            if len(cells) != len(header)
        ],
        file,
        "copy the table again",
    )
    return header, lines[1:]


def known_headers(file: Path | None, folder: Path, wanted: Collection[str]) -> Mapping[str, Header]:
    """Headers of volumes that were published without them.

    Raises:
        InputError: There is no table.
    """
    if file is None:
        raise InputError(
            f"{folder}: these volumes hold neither HU nor spacing, expected metadata/..._metadata.csv with both, got "
            "no such table: copy it there, take the folder ..._fixed, or set correct_headers: false if yours are right"
        )
    return read_headers(file, wanted)
