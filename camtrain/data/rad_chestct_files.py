"""Reading RAD-ChestCT: volumes, tables of findings, extrema and patients, each checked; nothing is unpickled.

```
ROOT/<id>.npz                                             key ct, int16 HU, axes down, back, left, 0.8 mm
ROOT/img{train,valid,test}_Abnormality_and_Location_Labels.csv   NoteAcc_DEID and one column finding*place each
ROOT/Extrema_*.csv   ROOT/CT_Scan_Metadata*.csv           both may be missing
```
The authors' demo has `img*_BinaryLabels.csv` with one column per finding, and `all_identifiers.csv`.
"""

from __future__ import annotations

import csv
import math
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camtrain._errors import InputError
from camtrain.data._faults import Faults

SPLITS = {"train": "imgtrain", "val": "imgvalid", "test": "imgtest"}
"""Our words -> first word of a table's name."""
MOST_VOXELS = 2**30
"""A file that claims more is refused before it is unpacked."""
BOX = ("sup_axis0min", "inf_axis0max", "ant_axis1min", "pos_axis1max", "rig_axis2min", "lef_axis2max")
SHAPE = ("shape0", "shape1", "shape2")
_IDS = ("NoteAcc_DEID", "VolumeAcc_DEID", "Accession", "")
_PATIENTS = ("MRN_DEID", "MRN")
_UNKNOWN = {"", "nan", "na", "-1", "-1.0"}
_TABLES = ("Abnormality_and_Location_Labels", "BinaryLabels")

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Table:
    """A table of findings, cut to some rows and columns.

    Attributes:
        file: Where it was read.
        ids: N cases.
        columns: Name -> (N,) float32 of 0, 1, NaN.
        rows: Cases of the whole table.
    """

    file: Path
    ids: list[str]
    columns: dict[str, NDArray[np.float32]]
    rows: int


def find_scans(root: Path) -> dict[str, Path]:
    """Volumes of a folder, id -> file.

    Raises:
        InputError: There is no such folder, or it holds no npz file.
    """
    if not root.is_dir():
        raise InputError(f"{root}: expected the folder with the volumes <id>.npz, got no such folder: set root= to it")
    scans = {file.stem: file for file in sorted(root.glob("*.npz")) if not file.stem.endswith("_seg")}
    if not scans:
        raise InputError(f"{root}: expected volumes <id>.npz, got none: set root= to the folder that holds them")
    return scans


def find_table(folder: Path, split: str) -> Path:
    """Table of findings of a split, with places where there is such a one.

    Args:
        folder: Where the tables lie.
        split: `train`, `val` or `test`.

    Raises:
        InputError: Another word, or there is no table.
    """
    if split not in SPLITS:
        raise InputError(f"expected a split out of {', '.join(SPLITS)}, got {split!r}")
    names = [f"{SPLITS[split]}_{ending}.csv" for ending in _TABLES]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(
        f"{folder}: expected {names[0]} (or the older {names[1]}) with the findings of the split {split!r}, got "
        "neither: copy it there, or set tables= to the folder that holds the CSV files"
    )


def has_table(folder: Path, split: str) -> bool:
    """Is there a table of findings of this split?"""
    return any((folder / f"{SPLITS[split]}_{ending}.csv").is_file() for ending in _TABLES)


def read_header(file: Path) -> list[str]:
    """Names of the columns of a table; the first of the older form is the empty one.

    Raises:
        InputError: The file cannot be read or is no CSV with commas.
    """
    with _opened(file) as rows:
        return _header(file, rows)


def read_table(
    file: Path, wanted: Callable[[Sequence[str]], Collection[str]], ids: Collection[str] | None = None
) -> Table:
    """Read a table of findings.

    Args:
        file: CSV with ids in `NoteAcc_DEID` (the older form: in the first column) and values 0, 1; empty, NaN and -1
            are unknown.
        wanted: Chooses columns from the names of all.
        ids: Cases to take; None = all.

    Returns:
        The table, rows in the order of the file.

    Raises:
        InputError: The file is no such table, names a case twice, or holds another value; every place has a line.
    """
    found: list[str] = []
    values: list[list[float]] = []
    problems: list[str] = []
    total = 0
    with _opened(file) as rows:
        header = _header(file, rows)
        key = _id_column(file, header)
        chosen = set(wanted([name for name in header if name != header[key]]))
        places = [place for place, name in enumerate(header) if name in chosen]
        for name, number, cells in _lines(file, rows, len(header), key):
            total += 1
            if ids is None or name in ids:
                found.append(name)
                values.append(_truths(cells, places, header, number, problems))
    _stop_at(problems, file, "0, 1 or empty")
    table = np.array(values, dtype=np.float32).reshape(len(found), len(places))
    return Table(file, found, {header[place]: table[:, i] for i, place in enumerate(places)}, total)


def _truths(
    cells: Sequence[str], places: Sequence[int], header: Sequence[str], number: int, problems: list[str]
) -> list[float]:
    read = [_truth(cells[place]) for place in places]
    problems += [
        f"row {number}, column {header[place]!r}: {cells[place]!r}"
        for place, value in zip(places, read, strict=True)
        if value is None
    ]
    return [math.nan if value is None else value for value in read]


def _lines(file: Path, rows: Iterator[list[str]], width: int, key: int) -> Iterator[tuple[str, int, list[str]]]:
    """(id, number of the row, cells) of each case; at the end what is wrong with all of them."""
    seen: dict[str, int] = {}
    problems: list[str] = []
    for number, cells in enumerate(rows, start=2):
        if not cells:
            continue
        if len(cells) != width:
            problems.append(f"row {number} has {len(cells)} cells instead of {width}")
            continue
        name = _stem(cells[key])
        if name in seen:
            problems.append(f"row {number}: {name!r} stands in row {seen[name]} already")
        seen[name] = number
        yield name, number, cells
    _stop_at(problems, file, "one full row per case")


def _truth(cell: str) -> float | None:
    if cell in ("0", "0.0"):
        return 0.0
    if cell in ("1", "1.0"):
        return 1.0
    text = cell.strip().lower()
    if text in _UNKNOWN:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value in (0, 1) else None


def _stop_at(problems: Sequence[str], file: Path, expected: str) -> None:
    """Raise all problems of a table, one line each."""
    faults = Faults(str(file))
    for problem in problems:
        faults.add(f"{file}, {problem}: expected {expected}; correct the table")
    faults.stop()


# Extrema and patients ------------------------------------------------------------------------------------------------


def read_boxes(file: Path, ids: Collection[str] | None = None) -> dict[str, Box]:
    """Boxes around the lungs, id -> (first, beyond the last) along each axis.

    As in the authors' program NaN and infinite borders become those of the volume.

    Raises:
        InputError: A column is missing, or a cell is no number.
    """
    boxes: dict[str, Box] = {}
    problems: list[str] = []
    for name, number, cells in _named_rows(file, (*BOX, *SHAPE), ids):
        try:
            values = [float(cell) if cell.strip() else math.nan for cell in cells]
            shape = [int(value) for value in values[6:]]
        except (ValueError, OverflowError):
            problems.append(f"row {number} ({name!r}): {', '.join(cells)}")
            continue
        borders = [int(v) if math.isfinite(v) else 0 if i % 2 == 0 else shape[i // 2] for i, v in enumerate(values[:6])]
        boxes[name] = ((borders[0], borders[1]), (borders[2], borders[3]), (borders[4], borders[5]))
    _stop_at(problems, file, "numbers of voxels")
    return boxes


def read_patients(file: Path, ids: Collection[str] | None = None) -> dict[str, str]:
    """Patient of each case.

    Raises:
        InputError: The table has no column of ids or of patients.
    """
    header = read_header(file)
    column = next((name for name in _PATIENTS if name in header), None)
    if column is None:
        raise InputError(f"{file}: expected a column {' or '.join(_PATIENTS)} with the patients, got none")
    return {name: cells[0].strip() for name, _, cells in _named_rows(file, (column,), ids)}


def find_beside(folder: Path, *patterns: str) -> Path | None:
    """The one file of a folder that a pattern fits, or None.

    Raises:
        InputError: Several files fit.
    """
    found = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    if len(found) > 1:
        raise InputError(f"{folder}: expected one file {' or '.join(patterns)}, got {len(found)}: leave one there")
    return found[0] if found else None


def _named_rows(
    file: Path, columns: Sequence[str], ids: Collection[str] | None
) -> Iterator[tuple[str, int, list[str]]]:
    with _opened(file) as rows:
        header = _header(file, rows)
        if missing := [name for name in columns if name not in header]:
            raise InputError(f"{file}: expected the columns {', '.join(columns)}, got none named {missing[0]!r}")
        places = [header.index(name) for name in columns]
        for name, number, cells in _lines(file, rows, len(header), _id_column(file, header)):
            if ids is None or name in ids:
                yield name, number, [cells[place] for place in places]


def _id_column(file: Path, header: Sequence[str]) -> int:
    for name in _IDS:
        if name in header:
            return list(header).index(name)
    raise InputError(f"{file}: expected a column NoteAcc_DEID with the ids of the cases, got none: is this the table?")


def _stem(cell: str) -> str:
    return cell.strip().removesuffix(".npz")


class _opened:  # noqa: N801  (a context manager, read as a function)
    """Rows of a CSV file; what is wrong with the file itself is told."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> Iterator[list[str]]:
        try:
            self.stream = self.file.open(newline="", encoding="utf-8-sig")
        except OSError as error:
            raise InputError(f"{self.file}: expected a CSV file, got {error.strerror or error}") from None
        return csv.reader(self.stream)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.stream.close()
        if isinstance(error, (UnicodeDecodeError, csv.Error)):
            raise InputError(f"{self.file}: expected a CSV file in UTF-8, got {error}: export it again") from None


def _header(file: Path, rows: Iterator[list[str]]) -> list[str]:
    header = [name.strip() for name in next(rows, [])]
    if len(header) == 1 and ";" in header[0]:
        raise InputError(f"{file}: expected commas between the columns, got semicolons: export the table again")
    if len(header) < 2:
        raise InputError(f"{file}: expected a table with a row of names, got {header}: is the file complete?")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise InputError(f"{file}: expected each column once, got {twice!r} twice: correct the table")
    return header


# Volumes -------------------------------------------------------------------------------------------------------------


def read_scan(file: Path) -> NDArray[Any]:
    """A volume in HU.

    Args:
        file: npz with the key `ct`.

    Returns:
        (Z, Y, X) of the file's own kind of numbers (int16 as published; the authors' fakes are int32).

    Raises:
        InputError: The file is damaged, is too large, or holds no volume of finite numbers.
    """
    return read_volume(file, "ct")


def read_volume(file: Path, key: str) -> NDArray[Any]:
    """A volume under a key of an npz file; see `read_scan`."""
    try:
        shape, kind = _described(file, key)
        if len(shape) != 3 or kind.kind not in "iuf" or 0 in shape:
            raise InputError(f"{file}: expected a volume of numbers under {key!r}, got {kind} {shape}: is it a scan?")
        if math.prod(shape) > MOST_VOXELS:
            raise InputError(f"{file}: expected at most {MOST_VOXELS} voxels, got {shape}: the file is damaged")
        with np.load(file, allow_pickle=False) as content:
            volume: NDArray[Any] = content[key]
    except (InputError, MemoryError):
        raise
    except Exception as error:  # whatever the reader stumbles over, it is the content of this file
        raise InputError(
            f"{file}: expected an npz file with the key {key!r}, got {type(error).__name__} "
            f"({' '.join(str(error).split())}): copy it again"
        ) from None
    if kind.kind == "f" and not bool(np.isfinite(volume).all()):
        raise InputError(f"{file}: expected finite numbers, got NaN or infinity: mend or drop the file")
    return volume


def _described(file: Path, key: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and kind as the file's first bytes tell them, without unpacking the rest."""
    with zipfile.ZipFile(file) as archive, archive.open(f"{key}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, _, kind = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, _, kind = np.lib.format.read_array_header_2_0(stream)
    return shape, kind
