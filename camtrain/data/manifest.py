"""The manifest: one CSV row per case, read and checked before any volume is opened."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import NamedTuple, TypeVar

from camtrain._errors import InputError, nearest
from camtrain.data._faults import Faults
from camtrain.data.manifest_csv import CsvTable, choose_labels, read_csv
from camtrain.data.manifest_paths import Places, find_image, find_organs

_log = logging.getLogger(__name__)

T = TypeVar("T")
REQUIRED = ("id", "image", "organs", "split")
OPTIONAL = ("patient",)


@dataclass(frozen=True)
class Case:
    """One row of the manifest.

    Attributes:
        id: Name of the case, unique in the manifest.
        image: The scan: a file, or the folder of a DICOM series.
        organs: Multi-label file, folder of binary files, several binary files, or None when the case is not segmented.
        split: Any word.
        label: One value per label: 0, 1 or NaN (unknown).
        patient: Whose scan it is, "" when the manifest does not say.
        where: File, row and id, for messages.
    """

    id: str
    image: Path
    organs: Path | tuple[Path, ...] | None
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
        return dict(Counter(case.split for case in self.cases))

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

    def with_splits(self, splits: Mapping[str, str]) -> Manifest:
        """The same cases with other splits.

        Args:
            splits: Id -> split; a case that is not named keeps its own.

        Raises:
            InputError: A patient or a scan is then in two splits.
        """
        cases = tuple(dataclasses.replace(case, split=splits.get(case.id, case.split)) for case in self.cases)
        faults = Faults(str(self.path))
        check_leaks(cases, faults, touch=False)
        faults.stop()
        return dataclasses.replace(self, cases=cases)


def read_manifest(
    path: str | os.PathLike[str],
    labels: Sequence[str] | None = None,
    *,
    labels_csv: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    split_column: str | None = "split",
    check_files: bool = True,
    rules: Collection[str] | None = None,
) -> Manifest:
    r"""Read a manifest and check all that can be checked without opening a volume.

    Args:
        path: CSV file with the columns `id, image, organs, split`, optional `patient`, and one column per label.
            Paths inside it are relative to the CSV file.
        labels: Label columns to use, in this order; None takes every column that is not named above.
        labels_csv: CSV file with `id` and one column per label, where they do not stand in the manifest; other columns
            of the manifest are then left alone. A case without a row there has unknown labels.
        root: Folder in which all scans and organs must lie, links followed; relative paths start there. None: they
            start at the manifest and may lead anywhere.
        split_column: Column of the splits; None where they come from elsewhere (every case is in split "" then).
        check_files: Are all files there? False touches no file but the CSV itself.
        rules: Labels for which the organ table has a rule; a label without one is a fault. None: not asked.

    Returns:
        The manifest.

    Raises:
        InputError: A column, row, label value or file is not as it should be; the message names file and row, and all
            faults that were found, one line each.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "ct.nii.gz").touch()
        >>> _ = (folder / "cases.csv").write_text("id,image,organs,split,nodule\nA,ct.nii.gz,,train,1\n")
        >>> read_manifest(folder / "cases.csv").labels
        ('nodule',)
    """
    faults = Faults(os.fspath(path))
    read = gather_manifest(
        path,
        labels,
        faults,
        labels_csv=labels_csv,
        root=root,
        split_column=split_column,
        check_files=check_files,
        rules=rules,
    )
    faults.stop()
    return read.manifest


class Gathered(NamedTuple):
    """A manifest as far as it can be read.

    Attributes:
        manifest: Its cases, those with faults too.
        lost: Places (`Case.where`) of cases whose files are not there, or may not be looked at.
    """

    manifest: Manifest
    lost: frozenset[str]


def gather_manifest(
    path: str | os.PathLike[str],
    labels: Sequence[str] | None,
    faults: Faults,
    *,
    labels_csv: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    split_column: str | None = "split",
    check_files: bool = True,
    rules: Collection[str] | None = None,
) -> Gathered:
    """What `read_manifest` reads, with its faults noted instead of raised.

    Args:
        path: As there, and so all others.
        labels: Likewise.
        faults: Takes them.
        labels_csv: Likewise.
        root: Likewise.
        split_column: Likewise.
        check_files: Likewise.
        rules: Likewise.

    Raises:
        InputError: No row can be read: the file is unreadable or empty, or a column is missing or there twice.
    """
    file = Path(path)
    split = [] if split_column is None else [split_column]
    table = read_csv(file, ("id", "image", "organs", *split), "a manifest", "manifest", faults)
    taken = ("id", "image", "organs", "split", *split, *OPTIONAL)
    source, own = _label_source(table, labels_csv, faults)
    names: tuple[str, ...] = ()
    if source is not None:
        names = choose_labels(source.path, source.columns, taken if own else ("id", *OPTIONAL), labels, faults)
        if rules is not None:
            _check_rules(source.path, names, rules, faults)
    if not table.lines and not faults:
        raise InputError(f"{file}: expected one row per case, got no rows below the header: write one row per scan")
    of_row = table.truths(names, faults) if own else repeat((math.nan,) * len(names))
    places = Places(file.parent if root is None else Path(root), closed=root is not None, touch=check_files)
    lost: set[str] = set()
    rows = table.rows(taken)
    cases = [
        _case(file, *row, truth, split_column, places, faults, lost) for row, truth in zip(rows, of_row, strict=False)
    ]
    made = tuple(case for case in cases if case is not None)
    _check_ids(made, faults)
    check_leaks(made, faults, touch=check_files)
    if not own and source is not None:
        made = _with_truths(source, file, names, made, faults)
    return Gathered(Manifest(file, names, made), frozenset(lost))


def _label_source(
    table: CsvTable, labels_csv: str | os.PathLike[str] | None, faults: Faults
) -> tuple[CsvTable | None, bool]:
    """The table that holds the labels (None where it cannot be read), and whether that is the manifest itself."""
    if labels_csv is None:
        return table, True
    read: CsvTable | None = None
    with faults.noting():
        read = read_csv(Path(labels_csv), ("id",), "labels", "labels_csv", faults)
    return read, False


def _case(
    file: Path,
    number: int,
    row: Mapping[str, str],
    label: tuple[float, ...],
    split_column: str | None,
    places: Places,
    faults: Faults,
    lost: set[str],
) -> Case | None:
    """One row; None, with its faults noted, where id, image or split are no use."""
    where = f"{file}, row {number}"
    empty = [name for name in ("id", "image", split_column) if name is not None and not row[name]]
    for name in empty:
        faults.add(f"{where}: expected a value in the column {name!r}, got nothing: fill it in")
    if empty:
        return None
    where = f"{where} (id {row['id']!r})"
    image, organs = _found(find_image, places, row["image"], where, faults), None
    if row["organs"]:
        organs = _found(find_organs, places, row["organs"], where, faults)
    if image is None or (organs is None and row["organs"]):
        lost.add(where)
    image = image or Path(row["image"])
    split = "" if split_column is None else row[split_column]
    return Case(row["id"], image, organs, split, label, row.get("patient", ""), where)


def _check_rules(source: Path, names: Sequence[str], rules: Collection[str], faults: Faults) -> None:
    for name in names:
        if name not in rules:
            faults.add(
                f"{source}: expected a rule in the organ table for every label, got none for {name!r}"
                f"{nearest(name, rules)}: add it to the table ('{name}: anywhere' sets no limit), "
                "or leave the column out with labels="
            )


def _found(find: Callable[[Places, str, str], T], places: Places, text: str, where: str, faults: Faults) -> T | None:
    try:
        return find(places, text, where)
    except InputError as error:
        faults.add(str(error))
        return None


def _with_truths(
    table: CsvTable, file: Path, names: Sequence[str], cases: Sequence[Case], faults: Faults
) -> tuple[Case, ...]:
    """The cases with the labels of the separate file."""
    found: dict[str, tuple[float, ...]] = {}
    first: dict[str, int] = {}
    for (number, row), truth in zip(table.rows(["id"]), table.truths(names, faults), strict=True):
        name = row["id"]
        if not name:
            faults.add(f"{table.path}, row {number}: expected a value in the column 'id', got nothing: fill it in")
        elif name in first:
            faults.add(
                f"{table.path}, row {number} (id {name!r}): expected every id once, got it already in row "
                f"{first[name]}: keep one row"
            )
        else:
            first[name], found[name] = number, truth
    _check_found(table.path, file, found, cases, faults)
    unknown = (math.nan,) * len(names)
    return tuple(dataclasses.replace(case, label=found.get(case.id, unknown)) for case in cases)


def _check_found(source: Path, file: Path, found: Mapping[str, object], cases: Sequence[Case], faults: Faults) -> None:
    lost = [case.id for case in cases if case.id not in found]
    if cases and len(lost) == len(cases):
        example = next(iter(found), "nothing")
        faults.add(
            f"{source}: expected rows for the ids of {file.name} (such as {lost[0]!r}), got none of them but "
            f"{example!r}: write the same ids in both files"
        )
    elif lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        _log.warning("%s: no row for %s%s: the labels are unknown", source, ", ".join(lost[:3]), more)


def _check_ids(cases: Iterable[Case], faults: Faults) -> None:
    seen: dict[str, Case] = {}
    for case in cases:
        if (first := seen.setdefault(case.id, case)) is not case:
            splits = f", in the splits {first.split!r} and {case.split!r}" if first.split != case.split else ""
            faults.add(
                f"{case.where}: expected every id once, got it already in row {_row(first)}{splits}: "
                "give every case an id and a split of its own"
            )


def check_leaks(cases: Iterable[Case], faults: Faults, touch: bool = True) -> None:
    """The same scan or the same patient on both sides of a split makes every score too good.

    Args:
        cases: All cases of all splits.
        faults: Where leaks are noted.
        touch: Follow links, so that two names of one file are found out.
    """
    images: dict[str, Case] = {}
    patients: dict[str, Case] = {}
    for case in cases:
        place = os.path.realpath(case.image) if touch else os.path.normpath(case.image)
        first = images.setdefault(place, case)
        if first.split != case.split and first.id != case.id:
            faults.add(
                f"{case.where}: expected every scan in one split, got {case.image.name} in {case.split!r} and "
                f"(row {_row(first)}) in {first.split!r}: keep it in one of them"
            )
        first = patients.setdefault(case.patient, case) if case.patient else case
        if first.split != case.split:
            faults.add(
                f"{case.where}: expected every patient in one split, got patient {case.patient!r} in {case.split!r} "
                f"and (row {_row(first)}) in {first.split!r}: move all scans of a patient to one split"
            )


def _row(case: Case) -> str:
    return case.where.rsplit(", row ", 1)[1]
