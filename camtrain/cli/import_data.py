"""`camtrain import`: folders of scans and segmentations become a manifest and an organ table."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from camtrain._errors import InputError, nearest
from camtrain.cli.consoles import wide_console
from camtrain.cli.exits import Parser
from camtrain.cli.folder import check_writable
from camtrain.cli.words import split_words
from camtrain.data.importing import MANIFEST, TABLE, Imported, Options, check_free, import_scans

_USAGE = """\
usage: camtrain import scans       --scans DIR [--organs DIR] [--labels CSV] --out DIR [options]
       camtrain import rad_chestct --root DIR [--organs DIR] --out DIR [options]
       camtrain import voc         --root DIR --out DIR [options]

Writes manifest.csv and table.yaml into --out and says what to run next. No scan is copied or opened.
camtrain import scans --help lists the options.
"""

_SCANS = """\
A manifest of scans and what TotalSegmentator (or another segmenter) made of them.

Scans:          files .nii.gz .nii .nrrd .nhdr .mha .mhd .mrc .npz .npy below --scans, and folders of DICOM files.
Segmentations:  one file with ids, a folder of binary files named after organs, or files named after case and organ
                (A12_heart.nii.gz, A12_aorta.nii.gz), matched by name: A12.nii.gz with A12.nii.gz, A12_seg.nii.gz,
                A12/, A12/segmentations/, the same path in another tree, A12/ct.nii.gz with A12/seg.nii.gz.
                Without --organs they are looked for among the scans.
Labels:         CSV with a column of ids or file names and columns of 0, 1, or empty / -1 / NaN.

  camtrain import scans --scans CT --organs TotalSegmentator --labels findings.csv --out study
  camtrain import scans --scans CT --organs SEG --organs_at '{id}/total.nii.gz' --labels_only nodule --out study"""

_RAD = """\
RAD-ChestCT in its published layout as a manifest. camtrain.data.RadChestCTDataModule does more with it.

  camtrain import rad_chestct --root RAD-ChestCT --organs LUNGS --out study"""

_VOC = """\
A tree of PASCAL VOC as a manifest: pictures, class masks as organs, labels from the annotations.

  camtrain import voc --root VOCdevkit/VOC2012 --out study"""


def import_data(args: Sequence[str]) -> None:
    """Make a manifest and an organ table.

    Raises:
        InputError: An option, a folder or a file is not as it should be.
    """
    actions = {"scans": _scans, "rad_chestct": _rad_chestct, "voc": _voc}
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        if not args:
            raise InputError(f"camtrain import expects {', '.join(actions)}")
        return
    if args[0] not in actions:
        raise InputError(f"camtrain import has no source {args[0]!r}{nearest(args[0], actions)}")
    actions[args[0]](list(args[1:]))


def _scans(args: list[str]) -> None:
    options = _scans_parser().parse_args(args)
    given = [name for name in ("split", "split_column", "split_file") if getattr(options, name) is not None]
    given = [name for name in given if name != "split_column" or not options.split_file]  # a column of that file
    if len(given) > 1:
        raise InputError(f"expected one source of splits, got {' and '.join('--' + name for name in given)}: keep one")
    named = options.id_column or options.patient_column or options.split_column
    if named and not (options.labels or options.split_file):
        raise InputError("--id_column, --patient_column and --split_column name columns of --labels, which is missing")
    if options.organs_at and "{id}" not in options.organs_at:
        raise InputError(
            f"--organs_at expects a path with {{id}}, got {options.organs_at!r}: such as {{id}}_seg.nii.gz"
        )
    own_table = options.table is not None
    out = _out(options, with_table=not own_table)
    # Only a terminal shows it, and it goes when the search ends.
    with Console(stderr=True).status(f"looking for scans in {options.scans}"):
        found = import_scans(Path(options.scans), _options(options, own_table))
    if own_table:
        _check_table(options.table, found)
    _finish(found, out, options, options.table or str(out / TABLE), "configs/real_ct.yaml")


def _options(options: argparse.Namespace, own_table: bool) -> Options:
    return Options(
        organs=_folder(options.organs),
        organs_at=options.organs_at,
        class_map=_folder(options.class_map),
        labels=_folder(options.labels),
        labels_only=split_words(options.labels_only) or None,
        id_column=options.id_column,
        patient_column=options.patient_column,
        patient=options.patient,
        split=_split(options.split),
        split_column=options.split_column,
        split_file=_folder(options.split_file),
        seed=options.seed,
        allow_unmatched=options.allow_unmatched,
        own_table=own_table,
    )


def _rad_chestct(args: list[str]) -> None:
    from camtrain.data.import_known import import_rad_chestct

    options = _rad_parser().parse_args(args)
    out = _out(options)
    found = import_rad_chestct(Path(options.root), _folder(options.tables), _folder(options.organs), options.label_set)
    _finish(found, out, options, str(out / TABLE), "configs/real_ct.yaml", "--data.spacing null")


def _rad_parser() -> argparse.ArgumentParser:
    parser = _parser("rad_chestct", _RAD)
    add = parser.add_argument
    add("--root", required=True, metavar="DIR", help="folder of the volumes <id>.npz")
    add("--tables", metavar="DIR", help="folder of the CSV files (default: --root)")
    add("--organs", metavar="DIR", help="folder of <id>_organs.npz or <id>_seg.npz")
    add("--label_set", default="located", choices=("located", "plain"), help="80 findings by place, or 84 anywhere")
    return parser


def _voc(args: list[str]) -> None:
    from camtrain.data.import_known import import_voc

    options = _voc_parser().parse_args(args)
    out = _out(options)
    found = import_voc(Path(options.root), options.image_set, tuple(split_words(options.splits)))
    _finish(found, out, options, str(out / TABLE), None)


def _voc_parser() -> argparse.ArgumentParser:
    parser = _parser("voc", _VOC)
    add = parser.add_argument
    add("--root", required=True, metavar="DIR", help="folder with JPEGImages, Annotations and ImageSets")
    add("--image_set", default="Segmentation", choices=("Segmentation", "Main"), help="where the lists are taken from")
    add("--splits", default="train,val", metavar="A,B", help="names of the lists (default: train,val)")
    return parser


def _parser(name: str, text: str) -> argparse.ArgumentParser:
    parser = Parser(f"camtrain import {name}", text)
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder of manifest.csv and table.yaml")
    add("--overwrite", action="store_true", help="replace those of an earlier import")
    add("--absolute", action="store_true", help="absolute paths in the manifest (default: relative to it)")
    return parser


def _scans_parser() -> argparse.ArgumentParser:
    parser = _parser("scans", _SCANS)
    add = parser.add_argument
    add("--scans", required=True, metavar="DIR", help="folder of the scans")
    add("--organs", metavar="DIR", help="folder of the segmentations (default: among the scans)")
    add("--organs_at", metavar="PATH", help="their path in that folder with {id} in it, instead of matching by name")
    add("--class_map", metavar="FILE", help="names and ids of organs: CSV, JSON, nnU-Net's dataset.json, or NIfTI")
    add("--table", metavar="YAML", help="your own organ table, or a shipped one (default: one is written)")
    add("--labels", metavar="CSV", help="table of labels; may have columns patient and split")
    add("--labels_only", metavar="A,B", help="these label columns; without --labels: names of empty columns to fill in")
    add("--id_column", metavar="NAME", help="column of ids or file names")
    add("--patient_column", metavar="NAME", help="column of patients (default: patient)")
    add("--patient", metavar="REGEX", help="its first group is the patient in an id, such as '(p[0-9]+)_'")
    add(
        "--split",
        metavar="PARTS",
        help="0.7,0.15,0.15 by lot and patient (default); or folder: its first name",
    )
    add("--split_column", metavar="NAME", help="column of splits (default: split, if it is there)")
    add("--split_file", metavar="CSV", help="file with ids and a column split")
    add("--seed", type=int, default=0, help="of the lot")
    add("--allow_unmatched", action="store_true", help="leave out segmentations that fit no scan")
    return parser


def _out(options: argparse.Namespace, with_table: bool = True) -> Path:
    """The folder, checked before anything is searched."""
    out = Path(options.out)
    check_writable(out)
    check_free([out / MANIFEST, *([out / TABLE] if with_table else [])], options.overwrite)
    return out


def _folder(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _split(text: str | None) -> list[float] | str | None:
    if text is None or text == "folder":
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--split expects parts such as 0.7,0.15,0.15, or folder, got {text!r}") from None


def _check_table(source: str, found: Imported) -> None:
    from camtrain.anatomy.organ_table import OrganTable

    known = OrganTable.load(source).labels
    if missing := [label for label in found.labels if label not in known]:
        raise InputError(
            f"{source}: expected a rule for every label, got none for {', '.join(missing[:6])}"
            f"{' and more' if len(missing) > 6 else ''}: add them, or leave --table out to have a table written"
        )


def _finish(
    found: Imported, out: Path, options: argparse.Namespace, table: str, config: str | None, more: str = ""
) -> None:
    """Write, and say what was found and what to do next."""
    files = found.write(out, options.overwrite, options.absolute, "camtrain import")
    console = wide_console()
    console.print(_counts(found))
    if found.labels:
        report = found.report()
        for split in report.cases:
            console.print(report.table(split) if split == "train" else report.line(split), soft_wrap=True, markup=False)
        for sentence in report.warnings():
            console.print(f"warning: {sentence}", style="red", highlight=False, soft_wrap=True, markup=False)
    for note in found.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)
    if found.made is not None and found.made.without_rule:
        names = ", ".join(found.made.without_rule)
        console.print(
            f"note: no rule for {names}: they may be read from anywhere until you write one in {table}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    near = {} if found.made is None else found.made.near
    for label, known in near.items():
        text = (
            f"warning: {label!r} differs from {known!r}, which has a rule, by a letter: rename the column if it is that"
        )
        console.print(text, style="red", highlight=False, soft_wrap=True, markup=False)
    for file in files:
        sys.stdout.write(f"{file}\n")
    sys.stdout.write(_next(found, out / MANIFEST, table, config, more))


def _counts(found: Imported) -> Table:
    table = Table(title="what was found", title_justify="left")
    table.add_column("")
    table.add_column("number", justify="right")
    for name, number in found.kinds.items():
        table.add_row(Text(name), str(number))
    without = sum(case.organs is None for case in found.cases)
    table.add_row("scans without a segmentation", str(without))
    patients = {case.patient for case in found.cases} - {""}
    table.add_row("patients", str(len(patients)) if patients else "not known: each scan stands for itself")
    table.add_row("labels", str(len(found.labels)))
    return table


def _next(found: Imported, manifest: Path, table: str, config: str | None, more: str) -> str:
    if not found.labels:
        return (
            "next: run this again with --labels CSV, or with --labels_only NAME,NAME for empty columns to fill in, and "
            "--overwrite\n"
        )
    data = f"--data.manifest {shlex.quote(str(manifest))} --data.table {shlex.quote(table)}{' ' if more else ''}{more}"
    if config is None:
        return f"next: camtrain fit --config YOURS.yaml --data.class_path camtrain.data.ManifestDataModule {data}\n"
    from camtrain.cli.main import COMMANDS

    check = f"next: camtrain doctor --config {config} {data}\n" if "doctor" in COMMANDS else ""
    return f"{check}{'then' if check else 'next'}: camtrain fit --config {config} {data}\n"
