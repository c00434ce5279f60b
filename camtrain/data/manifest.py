"""The manifest: one CSV row per case, read and checked before any volume is opened."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from camtrain._errors import InputError, nearest

REQUIRED = ("id", "image", "organs", "split")
OPTIONAL = ("patient",)


@dataclass(frozen=True)
class Case:
    """One row of the manifest.

    Attributes:
        id: Name of the case, unique in the manifest.
        image: The scan, a NIfTI file.
        organs: Multi-label NIfTI file, folder of binary NIfTI files, or None when the case is not segmented.
        split: Any word.
        label: One value per label: 0, 1 or NaN (unknown).
        patient: Whose scan it is, "" when the manifest does not say.
        where: File, row and id, for messages.
    """

    id: str
    image: Path
    organs: Path | None
    split: str
    label: tuple[float, ...]
    patient: str
    where: str


@dataclass(frozen=True)
class Manifest:
    """The checked content of a manifest file.

    Attributes:
        path: The CSV file.
        labels: Names of the labels, in the order of `Case.label`.
        cases: All cases of all splits, in the order of the file.
    """

    path: Path
    labels: tuple[str, ...]
    cases: tuple[Case, ...]

    @property
    def splits(self) -> dict[str, int]:
        """Number of cases of each split."""
        names = [case.split for case in self.cases]
        return {name: names.count(name) for name in dict.fromkeys(names)}

    def split(self, name: str, argument: str = "split") -> list[Case]:
        """Cases of one split.

        Args:
            name: The split's word.
            argument: Name of the argument that asked for it, for the message.

        Raises:
            InputError: No case has this split.
        """
        cases = [case for case in self.cases if case.split == name]
        if not cases:
            raise InputError(
                f"{self.path}: {argument} expects cases of the split {name!r}, got none{nearest(name, self.splits)}: "
                f"write {name!r} into the column split of some rows, or set {argument} to a split of the manifest"
            )
        return cases


def read_manifest(path: str | os.PathLike[str], labels: Sequence[str] | None = None) -> Manifest:
    r"""Read a manifest and check all that can be checked without opening a volume.

    Args:
        path: CSV file with the columns `id, image, organs, split`, optional `patient`, and one column per label.
            Paths inside it are relative to the CSV file.
        labels: Label columns to use, in this order; None takes every column that is not named above.

    Returns:
        The manifest.

    Raises:
        InputError: A column, row, label value or file is not as it should be; the message names file and row.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "ct.nii.gz").touch()
        >>> _ = (folder / "cases.csv").write_text("id,image,organs,split,nodule\nA,ct.nii.gz,,train,1\n")
        >>> read_manifest(folder / "cases.csv").labels
        ('nodule',)
    """
    file = Path(path)
    columns, rows = _read_csv(file)
    names = _label_columns(file, columns, labels)
    cases = tuple(_case(file, number, row, names) for number, row in rows)
    if not cases:
        raise InputError(f"{file}: expected one row per case, got no rows below the header: write one row per scan")
    _check_ids(file, cases)
    _check_leaks(file, cases)
    return Manifest(file, names, cases)


def _read_csv(file: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Header and (line number, row) of a CSV file; blank lines are left out."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, strict=True)
            lines = [(reader.line_num, [field.strip() for field in fields]) for fields in reader]
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{file}: expected a manifest (CSV file), got {reason!r}: check manifest=") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: expected CSV text in UTF-8, got {error}: save it as CSV in UTF-8") from None
    lines = [(number, fields) for number, fields in lines if any(fields)]
    if not lines:
        raise InputError(
            f"{file}: expected a header {','.join(REQUIRED)},<labels>, got an empty file: write a manifest"
        )
    columns = lines[0][1]
    _check_columns(file, columns)
    for number, fields in lines[1:]:
        if len(fields) != len(columns):
            raise InputError(
                f"{file}, row {number}: expected {len(columns)} fields as in the header, got {len(fields)}: "
                "put fields that contain a comma in quotes, and leave unknown fields empty"
            )
    return columns, [(number, dict(zip(columns, fields, strict=True))) for number, fields in lines[1:]]


def _check_columns(file: Path, columns: Sequence[str]) -> None:
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t"):
        raise InputError(f"{file}: expected columns separated by commas, got {columns[0]!r}: save the file with commas")
    for name in REQUIRED:
        if name not in columns:
            raise InputError(
                f"{file}: expected the columns {', '.join(REQUIRED)}, {name!r} is missing{nearest(name, columns)}: "
                "add it (organs may be left empty)"
            )
    for name in columns:
        if not name or columns.count(name) > 1:
            raise InputError(
                f"{file}: expected every column to have a name of its own, got {columns.count(name)} "
                f"named {name!r}: rename or delete"
            )


def _label_columns(file: Path, columns: Sequence[str], labels: Sequence[str] | None) -> tuple[str, ...]:
    found = tuple(name for name in columns if name not in REQUIRED + OPTIONAL)
    names = found if labels is None else tuple(labels)
    if not names:
        raise InputError(
            f"{file}: expected at least one label, got only the columns {', '.join(columns)}: "
            "add one column per label with 0, 1 or nothing (unknown), and leave labels= out or name such columns"
        )
    for name in names:
        if name not in found:
            raise InputError(
                f"{file}: labels= names {name!r}, which is no label column{nearest(name, found)}: "
                "add the column to the manifest or take the label out of labels="
            )
        if names.count(name) > 1:
            raise InputError(f"labels= expects every label once, got {name!r} {names.count(name)} times: keep one")
    return names


def _case(file: Path, number: int, row: Mapping[str, str], labels: Iterable[str]) -> Case:
    where = f"{file}, row {number}"
    for name in ("id", "image", "split"):
        if not row[name]:
            raise InputError(f"{where}: expected a value in the column {name!r}, got nothing: fill it in")
    where = f"{where} (id {row['id']!r})"
    image = _existing(file.parent / row["image"], where, "image")
    if image.is_dir():
        raise InputError(f"{where}: column 'image' expects a NIfTI file, got the folder {image}: name the file")
    return Case(
        id=row["id"],
        image=image,
        organs=_existing(file.parent / row["organs"], where, "organs") if row["organs"] else None,
        split=row["split"],
        label=tuple(_label(row[name], where, name) for name in labels),
        patient=row.get("patient", ""),
        where=where,
    )


def _existing(path: Path, where: str, column: str) -> Path:
    if not path.exists():
        what = "a NIfTI file" if column == "image" else "a NIfTI file, a folder of them, or nothing"
        raise InputError(
            f"{where}: column {column!r} expects {what}, got {path}, which does not exist: "
            "correct the path (relative paths start at the folder of the manifest)"
        )
    return path


def _label(text: str, where: str, name: str) -> float:
    """0 and 1 as they are; empty, -1 and NaN mean unknown."""
    if not text:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        value = math.inf
    if value in (0.0, 1.0):
        return value
    if value == -1 or math.isnan(value):
        return math.nan
    raise InputError(
        f"{where}: label {name!r} expects 0, 1, or empty / -1 / NaN for unknown, got {text!r}: correct the value, "
        "or name the label columns with labels= if this column is no label"
    )


def _check_ids(file: Path, cases: Iterable[Case]) -> None:
    seen: dict[str, Case] = {}
    for case in cases:
        if (first := seen.setdefault(case.id, case)) is not case:
            splits = f", in the splits {first.split!r} and {case.split!r}" if first.split != case.split else ""
            raise InputError(
                f"{case.where}: expected every id once, got it already in row {_row(first)}{splits}: "
                "give every case an id and a split of its own"
            )


def _check_leaks(file: Path, cases: Iterable[Case]) -> None:
    """The same scan or the same patient on both sides of a split makes every score too good."""
    images: dict[Path, Case] = {}
    patients: dict[str, Case] = {}
    for case in cases:
        first = images.setdefault(case.image.resolve(), case)
        if first.split != case.split:
            raise InputError(
                f"{case.where}: expected every scan in one split, got {case.image.name} in {case.split!r} and "
                f"(row {_row(first)}) in {first.split!r}: keep it in one of them"
            )
        first = patients.setdefault(case.patient, case) if case.patient else case
        if first.split != case.split:
            raise InputError(
                f"{case.where}: expected every patient in one split, got patient {case.patient!r} in {case.split!r} "
                f"and (row {_row(first)}) in {first.split!r}: move all scans of a patient to one split"
            )


def _row(case: Case) -> str:
    return case.where.rsplit(", row ", 1)[1]
