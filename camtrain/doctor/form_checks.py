"""Checks of the manifest's form. No volume is opened."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from camtrain._errors import nearest
from camtrain.data.manifest import REQUIRED
from camtrain.data.manifest_paths import SEVERAL
from camtrain.doctor.facts import Facts, Row
from camtrain.doctor.finding import Finding, Place, Severity, count, some
from camtrain.doctor.sheet import Sheet


def sheet(facts: Facts) -> list[Finding]:
    """Can the CSV file be read as one?"""
    read = facts.sheet
    if read is None:
        return []
    found = []

    def say(title: str, expected: str, got: str, todo: str, places: Iterable[Place] = ()) -> None:
        found.append(Finding("sheet", "error", title, expected, got, todo, tuple(places)))

    if read.fault:
        say("the manifest cannot be read", "a CSV file in UTF-8", f"{read.path}: {read.fault}", "check the path")
        return found
    if read.encoding != "utf-8":
        say("the manifest is not UTF-8", "CSV text in UTF-8", f"{read.path} in {read.encoding}", "save it as UTF-8")
    if read.delimiter != ",":
        mark = "tabs" if read.delimiter == "\t" else "semicolons"
        say("columns are not separated by commas", "commas", f"{read.path} with {mark}", "save it with commas")
    if read.ragged:
        wanted = len(read.columns)
        places = [Place(read.where(number), got=f"{n} fields") for number, n in read.ragged]
        todo = "put fields that contain a comma in quotes, and leave unknown fields empty"
        title = f"{count(len(places), 'row')} of another length than the header"
        say(title, f"{wanted} fields as in the header", "more or fewer", todo, places)
    if not read.rows:
        say("the manifest has no cases", "one row per case", f"no rows below the header of {read.path}", "write one")
    return found


def columns(facts: Facts) -> list[Finding]:
    """Are the columns there, each once, and is one of them a label?"""
    read = facts.sheet
    if read is None or not read.columns:
        return []
    found = []
    for name in REQUIRED:
        if name not in read.columns:
            near = nearest(name, read.columns)
            todo = "add the column (organs may be left empty)"
            got = f"{some(read.columns)}{near}"
            found.append(Finding("columns", "error", f"no column {name!r}", f"a column {name!r}", got, todo))
    for name in dict.fromkeys(read.columns):
        if (times := read.columns.count(name)) > 1 or not name:
            title = f"column {name!r} {times} times" if name else f"{count(times, 'column')} without a name"
            got = f"{read.path}: {title}"
            found.append(Finding("columns", "error", title, "a name for every column, once", got, "rename or delete"))
    if not read.labels:
        todo = "add one column per label with 0, 1 or nothing (unknown)"
        found.append(Finding("columns", "error", "no label", "a label column", some(read.columns), todo))
    return found


def ids(facts: Facts) -> list[Finding]:
    """Has every case a name of its own?"""
    read = facts.sheet
    if read is None:
        return []
    found = []
    for name in ("id", "image", "split"):
        places = [Place(read.where(n), fields.get("id", "")) for n, fields in read.rows if not fields.get(name)]
        if places and name in read.columns:
            title = f"{count(len(places), 'row')} without a value in the column {name!r}"
            found.append(Finding("ids", "error", title, "a value", "nothing", "fill it in", tuple(places)))
    first: dict[str, Row] = {}
    twice = [
        row.place(f"as in {_short(earlier.where)} ({earlier.split or 'no split'})")
        for row in facts.rows
        if row.id and (earlier := first.setdefault(row.id, row)) is not row
    ]
    if twice:
        title = f"{count(len(twice), 'id')} given again"
        todo = "give every case an id of its own"
        found.append(Finding("ids", "error", title, "every id once", "the same id again", todo, tuple(twice)))
    return found


def paths(facts: Facts) -> list[Finding]:
    """Are the files there that the rows name?"""
    lacking: dict[str, list[Place]] = {"image": [], "organs": []}
    for row in facts.rows:
        named = {"image": () if row.image is None else (row.image,), "organs": row.organ_files}
        for column, files in named.items():
            lacking[column] += [row.place(_why_missing(path), path) for path in files if not exists(path)]
    found = []
    for column, places in lacking.items():
        if places:
            title = f"{count(len(places), f'file of the column {column!r} is', f'files of the column {column!r} are')}"
            todo = "correct the paths: they start at the folder of the manifest"
            got = f"the first: {places[0].file}"
            found.append(Finding("paths", "error", f"{title} missing", "a file that exists", got, todo, tuple(places)))
    return found


def label_values(facts: Facts) -> list[Finding]:
    """Is every label 0, 1 or unknown?"""
    read = facts.sheet
    if read is None:
        return []
    found = []
    for label in read.labels:
        wrong = [
            Place(read.where(number), fields.get("id", ""), got=repr(fields[label]))
            for number, fields in read.rows
            if label in fields and label_value(fields[label]) is None
        ]
        if wrong:
            values = some(dict.fromkeys(place.got for place in wrong))
            todo = "correct the values, or name the label columns with labels= if this column is no label"
            title = f"label {label!r} has {count(len(wrong), 'value')} other than 0, 1 and unknown"
            expected = "0, 1, or empty / -1 / NaN for unknown"
            found.append(Finding("label_values", "error", title, expected, values, todo, tuple(wrong)))
    return found


def rules(facts: Facts) -> list[Finding]:
    """Has every label a rule in the organ table?"""
    if facts.sheet is None or facts.table is None:
        return []  # the data module knows it, and has taken them
    known = facts.rules
    expected = "a rule for every label"
    return [
        Finding(
            "rules",
            "error",
            f"label {label!r} has no rule in the organ table",
            expected,
            f"none{nearest(label, known)}",
            f"correct the name, add it to the table ('{label}: anywhere' sets no limit), or leave the column out with "
            "labels=",
        )
        for label in facts.labels
        if label not in known
    ]


def patients(facts: Facts) -> list[Finding]:
    """Is every patient, and every file, on one side of a split?"""
    found = []
    grouped = {"patient": lambda row: row.patient, "scan": lambda row: os.path.realpath(row.image) if row.image else ""}
    for what, key in grouped.items():
        places, groups = _in_several_splits(facts.rows, key)
        if places:
            names = [Path(name).name for name in groups]
            found.append(
                Finding(
                    "patients",
                    "error",
                    f"{count(len(groups), what)} in more than one split",
                    f"every {what} in one split",
                    some(names),
                    f"move all rows of a {what} to one split: a score on cases seen in training is worth nothing",
                    places,
                )
            )
    if facts.rows and not any(row.patient for row in facts.rows) and facts.files:
        found.append(
            Finding(
                "patients",
                "note",
                "the manifest does not say whose scans they are",
                "a column 'patient'",
                "none",
                "add it where a patient has several scans: then none can be in two splits, and camtrain evaluate "
                "takes its intervals over patients",
            )
        )
    return found


def splits(facts: Facts) -> list[Finding]:
    """Are there cases in the splits that training reads, and none that nobody reads?"""
    found = []
    there = facts.splits
    if not any(there):
        return []  # no cases, or a file of splits that says nothing of them, which is told in the data module's words
    for role, name, severity in _roles(facts):
        if name not in there:
            todo = f"write {name!r} into the column split of some rows, or set {role} to a split of the manifest"
            got = f"{some(there)}{nearest(name, there)}"
            title = f"no case in the split {name!r}"
            found.append(Finding("splits", severity, title, f"cases for {role}", got, todo))
    for name in there:
        if name not in facts.used_splits:
            number = len(facts.of_split(name))
            todo = "name the split in train_split, val_split or test_splits, or leave it"
            title = f"{count(number, 'case')} of the split {name!r} are read by nobody"
            found.append(Finding("splits", "note", title, some(facts.used_splits), repr(name), todo))
    return found


def config(facts: Facts) -> list[Finding]:
    """Can the config be read?"""
    if not facts.config:
        return []
    todo = "correct the config; what stands behind it has not been looked at"
    return [Finding("config", "error", "the config is refused", "keys and values that exist", facts.config, todo)]


def organ_table(facts: Facts) -> list[Finding]:
    """Can the organ table be read?"""
    if not facts.table_fault:
        return []
    todo = "correct the table, or name a shipped one; labels and organs have not been compared"
    expected = "a readable organ table"
    return [Finding("organ_table", "error", "the organ table is refused", expected, facts.table_fault, todo)]


def made(facts: Facts) -> list[Finding]:
    """Can the data module be made? Its own words, where no other check said why not, or where it has several."""
    first, *lines = facts.refused.splitlines() or [""]
    if not first:
        return []
    others = (organ_table, sheet, columns, ids, paths, label_values, rules, patients)
    errors = [finding for check in others for finding in check(facts) if finding.severity == "error"]
    if errors and not lines:
        return []
    told = sum(max(1, len(finding.places)) for finding in errors)
    title = "the data cannot be set up" if not told else "the data module in its own words"
    places = tuple(Place(line.removeprefix("- ")) for line in lines)
    expected = f"arguments and files that {facts.source} takes"
    # What others have told, kind by kind, is repeated in its words for who compares the two.
    severity: Severity = "note" if lines and told >= len(lines) else "error"
    return [Finding("made", severity, title, expected, first, "see what came", places)]


def built(facts: Facts) -> list[Finding]:
    """Can network, callbacks and test splits be made?"""
    found = []
    if facts.unbuilt:
        title = "the network or a callback cannot be made"
        todo = "see what came; the network has not been looked at"
        found.append(Finding("built", "error", title, "arguments that fit the data", facts.unbuilt, todo))
    if facts.untested:
        title = "the test splits cannot be read"
        todo = "see what came, or name other test_splits; a fit does not need them"
        found.append(Finding("built", "warning", title, "cases of every test split", facts.untested, todo))
    return found


def rows_of(read: Sheet) -> list[Row]:
    """Cases of a manifest that may have faults; what cannot be read of one is left out."""
    folder = read.path.parent

    def path(fields: Mapping[str, str], column: str) -> Path | None:
        return folder / fields[column] if fields.get(column) else None

    return [
        Row(
            where=read.where(number),
            id=fields.get("id", ""),
            split=fields.get("split", ""),
            patient=fields.get("patient", ""),
            label=tuple(_number(fields.get(label, "")) for label in read.labels),
            image=path(fields, "image"),
            organs=_several(folder, fields.get("organs", "")),
        )
        for number, fields in read.rows
    ]


def _several(folder: Path, text: str) -> Path | tuple[Path, ...] | None:
    """The column organs: nothing, a file or folder, or several files."""
    files = tuple(folder / part.strip() for part in text.split(SEVERAL) if part.strip())
    return files if len(files) > 1 else files[0] if files else None


def label_value(text: str) -> float | None:
    """0, 1 or NaN (unknown); None where the text says none of them.

    Example:
        >>> label_value("1.0"), label_value("-1"), label_value("yes")
        (1.0, nan, None)
    """
    if not text:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        return None
    if value in (0.0, 1.0):
        return value
    return math.nan if value == -1 or math.isnan(value) else None


def _number(text: str) -> float:
    value = label_value(text)
    return math.nan if value is None else value


def _roles(facts: Facts) -> list[tuple[str, str, Severity]]:
    """Argument, split, and how bad it is when the split is empty: training reads the first two before it begins."""
    val: list[tuple[str, str, Severity]] = [] if facts.val is None else [("val_split", facts.val, "error")]
    return [("train_split", facts.train, "error"), *val, *(("test_splits", name, "warning") for name in facts.tests)]


def _in_several_splits(rows: Iterable[Row], key: Callable[[Row], str]) -> tuple[tuple[Place, ...], list[str]]:
    by_key: dict[str, list[Row]] = {}
    for row in rows:
        if name := key(row):
            by_key.setdefault(name, []).append(row)
    groups = {name: members for name, members in by_key.items() if len({row.split for row in members}) > 1}
    places = tuple(row.place(f"{Path(name).name} in {row.split!r}") for name, many in groups.items() for row in many)
    return places, list(groups)


def exists(path: Path) -> bool:
    """Is something there?"""
    try:
        return path.exists()
    except OSError:  # a name that is too long, or a loop of links
        return False


def _why_missing(path: Path) -> str:
    if path.is_symlink():
        return "a link that leads nowhere, or in a circle"
    return "missing" if path.parent.exists() else f"no folder {path.parent}"


def _short(where: str) -> str:
    return where.rsplit(", ", 1)[-1]
