"""Labels, patients and splits of scans out of a CSV file, or splits by lot."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from camtrain._errors import InputError, nearest
from camtrain.data._faults import Faults
from camtrain.data.import_find import Found, stem_of, without_end

ID_COLUMNS = ("id", "case", "case_id", "caseid", "volumename", "volume", "scan", "filename", "file", "image", "name")
_SPLIT, _PATIENT = "split", "patient"
_TRUTHS = {"": math.nan, "nan": math.nan, "na": math.nan, "-1": math.nan, "0": 0.0, "1": 1.0}
_CT_RATE = re.compile(r"((?:train|valid)_\d+)_[a-z]+_\d+")
_WORDS = ("train", "val", "test")
_MOST = 6


@dataclass(frozen=True)
class LabelFile:
    """A CSV file with what is known of scans.

    Attributes:
        labels: Names of the label columns.
        rows: One row per case: the line, the id as written, the truths, the patient and the split ("" = not said).
        left_out: Columns that are no labels, nor anything else.
    """

    labels: tuple[str, ...]
    rows: tuple[tuple[int, str, tuple[float, ...], str, str], ...]
    left_out: tuple[str, ...]


def read_label_file(
    file: Path,
    id_column: str | None = None,
    labels: Sequence[str] | None = None,
    patient_column: str | None = None,
    split_column: str | None = None,
) -> LabelFile:
    """Read labels. Commas, semicolons or tabs separate; a byte-order mark does not matter.

    Args:
        file: CSV with a column of ids or file names.
        id_column: Its name; None = the first that is named as one.
        labels: Label columns; None = all in which at least half of the filled cells are 0, 1 or -1.
        patient_column: Name of the column of patients; None = `patient` if it is there.
        split_column: Name of the column of splits; None = `split` if it is there.

    Raises:
        InputError: A column is missing, or rows are wrong, one line each.
    """
    header, rows = _rows(file)
    id_column = _column(file, header, id_column, "id_column", ID_COLUMNS)
    if id_column is None:
        raise InputError(
            f"{file}: expected a column with ids or file names ({', '.join(ID_COLUMNS[:6])}, ...), got "
            f"{', '.join(header)}: name it with --id_column"
        )
    patient = _column(file, header, patient_column, "patient_column", (_PATIENT,))
    split = _column(file, header, split_column, "split_column", (_SPLIT,))
    others = [name for name in header if name not in (id_column, patient, split)]
    chosen = _label_columns(file, others, rows, header, labels)
    faults = Faults(str(file))
    seen: dict[str, int] = {}
    read = []
    for number, cells in rows:
        row = dict(zip(header, cells, strict=True))
        name = row[id_column]
        if not name:
            faults.add(f"{file}, row {number}: expected an id in the column {id_column!r}, got nothing: fill it in")
        elif name in seen:
            faults.add(
                f"{file}, row {number}: expected every id once, got {name!r} already in row {seen[name]}: keep one"
            )
        seen.setdefault(name, number)
        for label in chosen:
            if truth_of(row[label]) is None:
                faults.add(
                    f"{file}, row {number}, column {label!r}: expected 0, 1, or empty / -1 / NaN for unknown, got "
                    f"{row[label]!r}: correct it, or name the labels with --labels_only"
                )
        truths = tuple(math.nan if (truth := truth_of(row[label])) is None else truth for label in chosen)
        read.append((number, name, truths, row.get(patient or "", ""), row.get(split or "", "")))
    faults.stop()
    return LabelFile(tuple(chosen), tuple(read), tuple(name for name in others if name not in chosen))


def truth_of(cell: str) -> float | None:
    """A cell as 0, 1 or NaN = unknown; None where it is none of them.

    Example:
        >>> truth_of("1.0"), truth_of("yes"), truth_of("")
        (1.0, None, nan)
    """
    text = cell.strip().lower()
    if text in _TRUTHS:
        return _TRUTHS[text]
    try:
        return _TRUTHS.get(f"{float(text):g}")
    except ValueError:
        return None


def rows_of(scans: Sequence[Found], ids: Sequence[str], names: Sequence[str]) -> tuple[dict[int, int], list[str]]:
    """Row of each scan, found by id, file name, path or folder.

    Args:
        scans: What was found.
        ids: Their ids.
        names: What the rows say.

    Returns:
        Place of a scan -> place of its row, and one sentence for each row that fits several scans.
    """
    indices: list[dict[str, list[int]]] = [{}, {}, {}, {}]
    for place, (scan, own) in enumerate(zip(scans, ids, strict=True)):
        for index, name in zip(indices, (own.lower(), *scan.names), strict=True):
            if name:
                index.setdefault(name, []).append(place)
    found: dict[int, int] = {}
    faults: list[str] = []
    for row, text in enumerate(names):
        path = text.strip().replace("\\", "/").strip("/").lower()
        parts = [*path.split("/")[:-1], without_end(stem_of(path.split("/")[-1]))]
        wanted = (path, "/".join(parts), parts[-1])
        hits = next((hit for index in indices for name in wanted if (hit := index.get(name))), [])
        if len(hits) > 1:
            faults.append(f"{text!r} fits {len(hits)} scans: {', '.join(ids[place] for place in hits[:4])}")
        elif hits:
            found[hits[0]] = row
    return found, faults


def patients_of(ids: Sequence[str], pattern: str | None) -> list[str]:
    """Patient of each id: what the first group of a pattern finds; without a pattern those of CT-RATE's names.

    Raises:
        InputError: The pattern is none, has no group, or fits no id.

    Example:
        >>> patients_of(["train_1_a_1", "train_1_a_2"], None), patients_of(["p7-02"], r"(p[0-9]+)-")
        (['train_1', 'train_1'], ['p7'])
    """
    if pattern is None:
        matches = [_CT_RATE.fullmatch(name) for name in ids]
        return [match[1] if match else "" for match in matches] if all(matches) else [""] * len(ids)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--patient expects a regular expression, got {pattern!r}: {error}") from None
    if not expression.groups:
        raise InputError(f"--patient expects a pattern with a group, such as '(p[0-9]+)_', got {pattern!r}")
    found = [match[1] if (match := expression.search(name)) else "" for name in ids]
    if not any(found):
        raise InputError(f"--patient {pattern!r} fits no id, the first is {ids[0]!r}: correct the pattern")
    return found


def split_by_lot(groups: Sequence[str], shares: Sequence[float], seed: int) -> list[str]:
    """`train`, `val` and `test` by lot, so that a group (a patient) is on one side.

    Args:
        groups: Group of each case.
        shares: Parts of train, val and (optional) test; they are taken in proportion.
        seed: Another seed, another lot.

    Raises:
        InputError: Wrong shares, or fewer groups than splits.

    Example:
        >>> split_by_lot(["a", "a", "b", "c"], (0.5, 0.25, 0.25), 0)
        ['val', 'val', 'test', 'train']
    """
    if len(shares) not in (2, 3) or min(shares) < 0 or not shares[0] > 0:
        raise InputError(f"--split expects two or three parts, train first, got {list(shares)}: such as 0.7,0.15,0.15")
    words = [word for word, share in zip(_WORDS, shares, strict=False) if share]
    names = list(dict.fromkeys(groups))
    if len(names) < len(words):
        raise InputError(
            f"--split expects at least one patient for each of {', '.join(words)}, got {len(names)} patients: "
            "name fewer parts, such as 0.8,0.2, or give more scans"
        )
    bounds = np.cumsum([share for share in shares if share]) / sum(shares) * len(names)
    # Each split gets one patient at least: the bounds keep a distance of one, from both ends.
    ends = [
        min(max(round(bound), place + 1), len(names) - (len(words) - 1 - place)) for place, bound in enumerate(bounds)
    ]
    order = np.random.default_rng(seed).permutation(len(names))
    sides = {
        names[index]: words[next(k for k, end in enumerate(ends) if place < end)] for place, index in enumerate(order)
    }
    return [sides[group] for group in groups]


def split_by_folder(scans: Sequence[Found], root: Path) -> list[str]:
    """Name of the first folder below `root` as split, `valid` and `validation` as `val`, without `_fixed`."""
    words = [scan.path.relative_to(root).parts[0].lower().removesuffix("_fixed") for scan in scans]
    return [{"valid": "val", "validation": "val", "training": "train"}.get(word, word) for word in words]


def faults_of_splits(ids: Sequence[str], patients: Sequence[str], splits: Sequence[str]) -> list[str]:
    """One sentence for each patient who is in two splits."""
    first: dict[str, int] = {}
    told: dict[str, str] = {}
    for place, patient in enumerate(patients):
        if patient and splits[first.setdefault(patient, place)] != splits[place]:
            one = first[patient]
            told.setdefault(
                patient,
                f"patient {patient!r} is in {splits[one]!r} ({ids[one]}) and in {splits[place]!r} ({ids[place]})",
            )
    return list(told.values())


def _rows(file: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        first = text.partition("\n")[0]
        mark = max(",;\t", key=first.count)
        lines = [
            (number, [cell.strip() for cell in cells])
            for number, cells in enumerate(csv.reader(text.splitlines(), delimiter=mark, strict=True), start=1)
            if any(cell.strip() for cell in cells)
        ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: expected a CSV file in UTF-8, got {error}: export it again") from None
    if len(lines) < 2:
        raise InputError(f"{file}: expected a row of names and one row per case, got {len(lines)} rows")
    header = lines[0][1]
    faults = [f"row {number} has {len(cells)} cells" for number, cells in lines if len(cells) != len(header)]
    faults += [f"the name {name!r} stands twice" for name in dict.fromkeys(header) if header.count(name) > 1]
    if faults:
        raise InputError(f"{file}: expected {len(header)} named cells in each row, got {'; '.join(faults[:_MOST])}")
    return header, lines[1:]


def _column(file: Path, header: Sequence[str], asked: str | None, option: str, usual: Sequence[str]) -> str | None:
    if asked is None:
        lower = {name.lower(): name for name in reversed(header)}
        return next((lower[name] for name in usual if name in lower), None)
    if asked not in header:
        raise InputError(f"{file}: --{option} names {asked!r}, which is no column{nearest(asked, header)}")
    return asked


def _label_columns(
    file: Path,
    others: Sequence[str],
    rows: Sequence[tuple[int, list[str]]],
    header: Sequence[str],
    labels: Sequence[str] | None,
) -> list[str]:
    if labels is not None:
        for name in labels:
            if name not in others:
                raise InputError(f"{file}: --labels_only names {name!r}, which is no column{nearest(name, others)}")
        return list(labels)
    found = []
    for name in others:
        place = list(header).index(name)
        filled = [truth_of(cells[place]) for _, cells in rows if cells[place]]
        # Ages and words are no labels; a few wrong cells in a column of labels are faults, and told as such.
        if 2 * sum(truth is not None for truth in filled) >= len(filled):
            found.append(name)
    return found
