"""RAD-ChestCT and PASCAL VOC as a manifest and an organ table, for those who want all their data read in one way."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable
from camtrain.data.import_table import MadeTable
from camtrain.data.importing import Imported, ImportedCase, tell_all
from camtrain.data.rad_chestct_dataset import organ_file
from camtrain.data.rad_chestct_files import (
    SPLITS,
    find_beside,
    find_scans,
    find_table,
    has_table,
    read_header,
    read_patients,
    read_table,
)
from camtrain.data.rad_chestct_labels import LabelSet, columns_of, make_truths
from camtrain.data.voc_files import CLASSES, VOID, Picture, read_split

_RAD_TABLES = {"located": "rad_chestct", "plain": "rad_chestct_plain"}


def import_rad_chestct(
    root: Path, tables: Path | None = None, organs: Path | None = None, label_set: LabelSet = "located"
) -> Imported:
    """RAD-ChestCT as `RadChestCTDataModule` reads it, in one manifest.

    A manifest cannot say which lung a report names; the mask loss then allows both. Where lungs come from the
    partition (`<id>_seg.npz`) the table has the organ `lungs` alone, since left and right are not told apart in it.

    Args:
        root: Folder of the volumes.
        tables: Folder of the CSV files; None = `root`.
        organs: Folder with `<id>_organs.npz` or `<id>_seg.npz`; None = nobody has organs.
        label_set: `"located"` (80 labels) or `"plain"` (84).

    Returns:
        What was found.

    Raises:
        InputError: The folder or a table is not as described, a patient is in two splits, or organs of both kinds lie
            together.
    """
    if label_set not in _RAD_TABLES:
        raise InputError(f"--label_set expects located or plain, got {label_set!r}")
    tables = root if tables is None else tables
    scans = find_scans(root)
    table = OrganTable.load(_RAD_TABLES[label_set])
    if not (splits := [split for split in SPLITS if has_table(tables, split)]):
        find_table(tables, "train")  # says what is missing
    header = read_header(find_table(tables, splits[0]))
    if label_set == "located" and not any("*" in name for name in header):
        raise InputError(f"{tables}: expected columns finding*place, got findings without places: --label_set plain")
    there = {name.partition("*")[0] for name in header}
    labels = [name for name in table.labels if label_set == "located" or name in there]
    metadata = find_beside(tables, "CT_Scan_Metadata*.csv", "all_identifiers.csv")
    patients = {} if metadata is None else read_patients(metadata, scans)
    cases: list[ImportedCase] = []
    rows = 0
    for split in splits:
        read = read_table(
            find_table(tables, split),
            lambda names: [column for label in labels for column in columns_of(label, label_set, names)],
            scans,
        )
        rows += read.rows
        truths = make_truths(read.columns, labels, label_set, "authors").label
        for name, truth in zip(read.ids, truths, strict=True):
            file = None if organs is None else organ_file(organs, name)
            label = tuple(float(value) for value in truth)
            cases.append(ImportedCase(name, scans[name], file, split, patients.get(name, ""), label))
    _check(cases, root)
    notes = [
        f"{rows - len(cases)} rows of the tables have no volume and were left out",
        "axes of these files run down, back, left, voxels are 0.8 mm, and the files say neither: leave spacing out",
        "camtrain.data.RadChestCTDataModule does more with this folder: places of findings, affines, flips",
    ]
    made = _rad_table(table.select(labels), cases)
    return Imported(tuple(labels), tuple(cases), made, tuple(notes), _kinds(cases, "scans: numpy"))


def import_voc(root: Path, image_set: str = "Segmentation", splits: tuple[str, ...] = ("train", "val")) -> Imported:
    """A tree of PASCAL VOC in one manifest: pictures, class masks as organs, twenty labels.

    Args:
        root: Folder with JPEGImages, Annotations and ImageSets.
        image_set: `"Segmentation"` or `"Main"`.
        splits: Names of the lists.

    Returns:
        What was found.

    Raises:
        InputError: The tree is not as described, or a picture is in two lists.
    """
    read: dict[str, list[Picture]] = {split: read_split(root, image_set, split) for split in splits}
    there = {name for pictures in read.values() for picture in pictures for name in picture.objects}
    labels = [name for name in CLASSES if name in there]
    if not labels:
        raise InputError(f"{root}: expected objects of VOC's classes, got {', '.join(sorted(there)) or 'none'}")
    cases = [
        ImportedCase(picture.id, picture.image, picture.mask, split, "", picture.label(labels))
        for split, pictures in read.items()
        for picture in pictures
    ]
    _check(cases, root)
    table = OrganTable(
        organs={name: number for number, name in enumerate(CLASSES, 1)} | {"void": VOID},
        labels={name: [name] for name in labels},
    )
    made = MadeTable(table, dict.fromkeys(labels, "PascalVOCDataModule"))
    return Imported(tuple(labels), tuple(cases), made, (), _kinds(cases, "scans: JPEG"))


def _rad_table(table: OrganTable, cases: list[ImportedCase]) -> MadeTable:
    """The shipped table, or one with the lungs alone where only the partition's lungs are there."""
    kinds = {case.organs.stem.rsplit("_", 1)[1] for case in cases if isinstance(case.organs, Path)}
    if kinds == {"organs", "seg"}:
        raise InputError(
            "expected organs of one kind, got <id>_organs.npz beside <id>_seg.npz: ids of a segmenter and lungs of the "
            "partition need different tables; keep one kind in the folder"
        )
    source = "rad_chestct_plain" if "lung_nodule" not in table.labels else "rad_chestct"
    if kinds != {"seg"}:
        return MadeTable(table, dict.fromkeys(table.labels, source))
    lungs = {
        label
        for label, rule in table.rules.items()
        if rule.organs and all("lung" in o or "rough" in o for o in rule.organs)
    }
    entries = {label: ["lungs"] if label in lungs else "anywhere" for label in table.labels}
    return MadeTable(OrganTable({"lungs": 1}, entries), {label: source if label in lungs else "" for label in entries})


def _check(cases: list[ImportedCase], root: Path) -> None:
    splits: dict[str, str] = {}
    faults = [
        f"{who!r} is in {splits[who]!r} and in {case.split!r} ({case.id})"
        for case in cases
        for who in sorted({case.id, case.patient} - {""})
        if splits.setdefault(who, case.split) != case.split
    ]
    if not cases:
        faults.append("no case has a file")
    tell_all(faults, root, "correct the tables or lists")


def _kinds(cases: list[ImportedCase], scans: str) -> dict[str, int]:
    kinds = Counter({scans: len(cases)})
    with_organs = int(np.sum([case.organs is not None for case in cases]))
    return dict(kinds | Counter({"segmentations: one file": with_organs}))
