"""From folders of scans and segmentations to a manifest and an organ table. Nothing is copied, no volume is opened."""

from __future__ import annotations

import csv
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from camtrain._errors import InputError
from camtrain.data._faults import told as lines_of
from camtrain.data.import_find import FILES, SEVERAL, Found, find_scans, find_segmentations
from camtrain.data.import_labels import (
    LabelFile,
    faults_of_splits,
    patients_of,
    read_label_file,
    rows_of,
    split_by_folder,
    split_by_lot,
)
from camtrain.data.import_match import Matched, match, match_by_pattern
from camtrain.data.import_table import MadeTable, make_table, names_in_header, read_class_map, total_segmentator
from camtrain.data.organ_reporting import OrganReport, organ_report

MANIFEST, TABLE = "manifest.csv", "table.yaml"
_MOST = 50
_REMEDY = "rename or name them (--organs_at, --id_column), or --allow_unmatched"


@dataclass(frozen=True)
class ImportedCase:
    """One row of the manifest to be.

    Attributes:
        id: Name of the case.
        image: File, or folder of a DICOM series.
        organs: Multi-label file, folder of binary files, several binary files, or None.
        split: Word of the split.
        patient: "" = not known.
        label: 0, 1 or NaN per label.
    """

    id: str
    image: Path
    organs: Path | tuple[Path, ...] | None
    split: str
    patient: str
    label: tuple[float, ...]


@dataclass(frozen=True)
class Imported:
    """What was found, before it is written.

    Attributes:
        labels: Names of the labels.
        cases: All cases.
        made: The organ table; None where the user has one, and where there is no label to have a rule.
        notes: One sentence each for what was left out or assumed.
        kinds: Kind of scan or segmentation -> number.
    """

    labels: tuple[str, ...]
    cases: tuple[ImportedCase, ...]
    made: MadeTable | None
    notes: tuple[str, ...] = ()
    kinds: dict[str, int] = field(default_factory=dict)

    def report(self) -> OrganReport:
        """Who has organs, by label and split."""
        return organ_report(
            self.labels,
            [list(case.label) for case in self.cases],
            [case.organs is not None for case in self.cases],
            [case.split for case in self.cases],
            [case.patient for case in self.cases],
        )

    def write(
        self, out: Path, overwrite: bool = False, absolute: bool = False, made_by: str = "camtrain"
    ) -> list[Path]:
        """Write manifest and table.

        Args:
            out: Folder, made if missing.
            overwrite: Replace files of an earlier import.
            absolute: Write absolute paths; else relative ones, wherever the file system has a way from `out`.
            made_by: The command, for the head of the table.

        Returns:
            The files.

        Raises:
            InputError: They are there already.
        """
        files = [out / MANIFEST] + ([out / TABLE] if self.made is not None else [])
        check_free(files, overwrite)
        out.mkdir(parents=True, exist_ok=True)
        with files[0].open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["id", "image", "organs", "split", "patient", *self.labels])
            for case in self.cases:
                organs = _organs(case.organs, out, absolute)
                truths = ["" if math.isnan(value) else int(value) for value in case.label]
                image = _path(case.image, out, absolute)
                writer.writerow([case.id, image, organs, case.split, case.patient, *truths])
        if self.made is not None:
            files[1].write_text(self.made.to_yaml(made_by), encoding="utf-8")
        return files


def check_free(files: Sequence[Path], overwrite: bool) -> None:
    """Nothing is replaced unasked: a table may have been edited for an hour.

    Raises:
        InputError: A file is there.
    """
    there = [str(file) for file in files if file.exists()]
    if there and not overwrite:
        raise InputError(f"{' and '.join(there)} would be replaced: choose another --out, or --overwrite")


@dataclass(frozen=True)
class Options:
    """How scans are imported; see `camtrain import scans --help`."""

    organs: Path | None = None
    organs_at: str | None = None
    class_map: Path | None = None
    labels: Path | None = None
    labels_only: Sequence[str] | None = None
    id_column: str | None = None
    patient_column: str | None = None
    patient: str | None = None
    split: Sequence[float] | str | None = None
    split_column: str | None = None
    split_file: Path | None = None
    seed: int = 0
    allow_unmatched: bool = False
    own_table: bool = False


def import_scans(scans: Path, options: Options) -> Imported:
    """Find scans, their segmentations, labels, patients and splits.

    Args:
        scans: Folder of the scans.
        options: Everything else.

    Returns:
        What was found.

    Raises:
        InputError: Something is missing or ambiguous; everything that is gets a line.
    """
    _check_folder(scans, "--scans")
    organs_known = total_segmentator() if options.class_map is None else read_class_map(options.class_map)
    found, segmentations = _find(scans, options, organs_known)
    ids = _ids(found, scans)
    pattern = options.organs_at
    matched = (
        match(found, segmentations)
        if pattern is None
        else match_by_pattern(ids, scans if options.organs is None else options.organs, pattern)
    )
    faults = list(matched.faults)
    notes: list[str] = []
    if matched.alone and not options.allow_unmatched:
        faults += [f"{one.path} fits no scan" for one in matched.alone]
    elif matched.alone:
        notes.append(f"{len(matched.alone)} segmentations fit no scan and were left out")
    try:
        labels, truths, patients, splits = _read_rows(found, ids, options, faults, notes)
        patients = [own or told for own, told in zip(patients_of(ids, options.patient), patients, strict=True)]
        splits = _splits(found, scans, ids, patients, splits, options, faults)
    except InputError as error:
        if not faults:
            raise
        tell_all([*faults, *lines_of(error)], scans, _REMEDY)
        raise  # never reached: there are faults
    faults += faults_of_splits(ids, patients, splits)
    tell_all(faults, scans, _REMEDY)
    organs_known, source = _class_map(organs_known, options, matched)
    notes.append(source)
    more = {name for one in matched.organs.values() for name in one.organs}
    made = None if options.own_table or not labels else make_table(labels, organs_known, more)
    cases = [
        ImportedCase(
            id=ids[place],
            image=scan.path,
            organs=_organs_of(matched.organs.get(place)),
            split=splits[place],
            patient=patients[place],
            label=truths[place],
        )
        for place, scan in enumerate(found)
    ]
    kinds = Counter(f"scans: {scan.kind}" for scan in found)
    several = {SEVERAL: SEVERAL, FILES: FILES}
    kinds += Counter(f"segmentations: {several.get(one.kind, 'one file')}" for one in matched.organs.values())
    return Imported(tuple(labels), tuple(cases), made, tuple(notes), dict(kinds))


def tell_all(faults: Sequence[str], source: Path, remedy: str) -> None:
    """All faults at once.

    Raises:
        InputError: There is one.
    """
    if faults:
        shown = "".join(f"\n- {fault}" for fault in faults[:_MOST])
        more = f"\n- and {len(faults) - _MOST} more" if len(faults) > _MOST else ""
        raise InputError(f"{source}: {len(faults)} faults; {remedy}:{shown}{more}")


def _find(scans: Path, options: Options, organs: dict[str, int]) -> tuple[list[Found], list[Found]]:
    names = {*organs, *total_segmentator()}
    inside = options.organs is None or _contains(scans, options.organs) or _contains(options.organs, scans)
    found, segmentations = find_scans(scans, names, segmentations_too=inside and options.organs is None)
    if options.organs is not None:
        _check_folder(options.organs, "--organs")
        if options.organs.resolve() == scans.resolve():
            found, segmentations = find_scans(scans, names, segmentations_too=True)
        else:
            segmentations = find_segmentations(options.organs, names)
            own = {one.path.resolve() for one in segmentations} if inside else set()
            if _contains(options.organs, scans):
                segmentations = [one for one in segmentations if not _contains(scans, one.path)]
                own = set()
            found = [scan for scan in found if scan.path.resolve() not in own]
    if not found:
        raise InputError(
            f"{scans}: expected scans (NIfTI, NRRD, MetaImage, MRC, npz, npy, or folders of DICOM files), got none: "
            "set --scans to the folder that holds them"
        )
    return found, segmentations


def _ids(found: Sequence[Found], root: Path) -> list[str]:
    """Short names where they are unique, else the path below the folder."""
    counts = Counter(scan.stem for scan in found)
    ids = [
        scan.stem if counts[scan.stem] == 1 else "_".join(scan.path.relative_to(root).parts).partition(".")[0]
        for scan in found
    ]
    again = Counter(ids)
    return [
        name if again[name] == 1 else str(scan.path.relative_to(root)) for name, scan in zip(ids, found, strict=True)
    ]


def _read_rows(
    found: Sequence[Found], ids: Sequence[str], options: Options, faults: list[str], notes: list[str]
) -> tuple[list[str], list[tuple[float, ...]], list[str], list[str]]:
    """Labels, and truths, patient and split of each scan, as far as the CSV file says."""
    if options.labels is None:
        names = list(options.labels_only or [])
        return names, [(math.nan,) * len(names)] * len(found), [""] * len(found), [""] * len(found)
    file: LabelFile = read_label_file(
        options.labels, options.id_column, options.labels_only, options.patient_column, options.split_column
    )
    placed, ambiguous = rows_of(found, ids, [row[1] for row in file.rows])
    faults += [f"{options.labels}: {sentence}" for sentence in ambiguous]
    used = Counter(placed.values())
    unused = len(file.rows) - len(used)
    if not placed and not ambiguous:
        faults.append(f"{options.labels}: no id fits a scan, the first are {file.rows[0][1]!r} and {ids[0]!r}")
    elif unused - len(ambiguous) > 0:
        notes.append(f"{unused - len(ambiguous)} rows of {options.labels.name} have no scan and were left out")
    if len(placed) < len(found):
        notes.append(f"{len(found) - len(placed)} scans have no row in {options.labels.name}: their labels are unknown")
    if file.left_out:
        notes.append(f"columns that are no labels were left out: {', '.join(file.left_out)}")
    unknown = (0, "", (math.nan,) * len(file.labels), "", "")
    rows = [file.rows[placed[place]] if place in placed else unknown for place in range(len(found))]
    return list(file.labels), [row[2] for row in rows], [row[3] for row in rows], [row[4] for row in rows]


def _splits(
    found: Sequence[Found],
    root: Path,
    ids: Sequence[str],
    patients: Sequence[str],
    told: Sequence[str],
    options: Options,
    faults: list[str],
) -> list[str]:
    """Splits from the one source that was named, or the column split, or by lot."""
    if options.split_file is not None:
        file = read_label_file(options.split_file, options.id_column, [], None, options.split_column)
        placed, ambiguous = rows_of(found, ids, [row[1] for row in file.rows])
        faults += [f"{options.split_file}: {sentence}" for sentence in ambiguous]
        told = [file.rows[placed[place]][4] if place in placed else "" for place in range(len(found))]
    elif options.split == "folder":
        told = split_by_folder(found, root)
    elif options.split is not None or not any(told):
        shares = (0.7, 0.15, 0.15) if options.split is None else [float(part) for part in options.split]
        groups = [patient or f"\0{place}" for place, patient in enumerate(patients)]
        return split_by_lot(groups, shares, options.seed)
    faults += [f"{name} has no split" for name, split in zip(ids, told, strict=True) if not split]
    return list(told)


def _class_map(organs: dict[str, int], options: Options, matched: Matched) -> tuple[dict[str, int], str]:
    """Organs with their ids, and a sentence about where they come from."""
    if options.class_map is not None:
        return organs, f"organ ids are those of {options.class_map.name}"
    file = next((one.path for one in matched.organs.values() if one.kind == "NIfTI"), None)
    if file is not None and (named := names_in_header(file)):
        return named, f"organ names and ids were read from the header of {file.name}"
    if file is None or not matched.organs:
        return organs, "organs are TotalSegmentator's, version 2 (117 of the task total)"
    return organs, (
        "organ ids are taken for those of TotalSegmentator, version 2 (117 of the task total), since the files do not "
        "name them: pass --class_map for another version, task or segmenter"
    )


def _contains(folder: Path, path: Path) -> bool:
    return folder.resolve() in [path.resolve(), *path.resolve().parents]


def _check_folder(folder: Path, option: str) -> None:
    if not folder.is_dir():
        raise InputError(f"{option} expects a folder, got {folder}, which is none: correct the path")


def _organs_of(found: Found | None) -> Path | tuple[Path, ...] | None:
    return None if found is None else found.files or found.path


def _organs(organs: Path | tuple[Path, ...] | None, out: Path, absolute: bool) -> str:
    """The column organs; binary files end with the separator, so that a single one is not taken for a file of ids."""
    if isinstance(organs, tuple):
        return "|".join([*(_path(path, out, absolute) for path in organs), *([] if len(organs) > 1 else [""])])
    return "" if organs is None else _path(organs, out, absolute)


def _path(path: Path, out: Path, absolute: bool) -> str:
    """A path as the manifest says it; readers climb the real folders above the manifest, whatever links led there."""
    whole = path.absolute()
    if absolute:
        return str(whole)
    try:
        return Path(os.path.relpath(whole, out.resolve())).as_posix()
    except ValueError:  # another drive
        return str(whole)
