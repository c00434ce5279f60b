"""The organ table of an import: organs as the segmenter names them, and rules for labels that a shipped table knows."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nibabel as nib
import yaml

from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable
from camtrain.data.manifest_csv import one_letter_apart

SHIPPED = ("ct_rate", "totalsegmentator_chest", "totalsegmentator_abdomen")
"""Tables that are asked for a rule, in this order."""
_SAME = {
    "effusion": "pleural_effusion",
    "ground_glass_opacity": "ground_glass",
    "groundglass": "ground_glass",
    "lung_nodules": "lung_nodule",
    "pulmonary_nodule": "lung_nodule",
    "pulmonary_nodules": "lung_nodule",
    "coronary_artery_calcification": "coronary_calcification",
    "lung_mass": "mass",
    "ptx": "pneumothorax",
}
_FIRST_OWN = 201  # ids of organs that a folder of binary files has beyond those of the class map


@dataclass(frozen=True)
class MadeTable:
    """A table and where its parts come from.

    Attributes:
        table: The table.
        sources: Label -> shipped table of its rule, or "" where there was none and the label may be read from anywhere.
        near: Label without a rule -> label of a shipped table that differs by a letter.
    """

    table: OrganTable
    sources: Mapping[str, str]
    near: Mapping[str, str] = field(default_factory=dict)

    @property
    def without_rule(self) -> list[str]:
        """Labels that may be read from anywhere because no shipped table knows them."""
        return [label for label, source in self.sources.items() if not source]

    def to_yaml(self, made_by: str) -> str:
        """The table as a file that says what to edit.

        Args:
            made_by: The command, for the first line.
        """
        content = self.table.to_dict()
        parts = [
            f"# Organ table, written by {made_by}. Edit the labels; the organs are those of the segmenter.",
            "# A label is a list of organs or groups, anywhere, or {organs, hull, close_mm, fill, minus, dilate_mm}.",
            _flow({"organs": content["organs"]}, block=True),
        ]
        if content.get("groups"):
            parts.append(_flow({"groups": content["groups"]}))
        parts.append("labels:")
        for label, entry in content["labels"].items():
            source = self.sources.get(label, "")
            comment = f"as in the shipped table {source}" if source else "no shipped table knows it: write a rule"
            parts.append(f"  # {comment}\n  {_line({label: entry})}")
        return "\n".join(parts) + "\n"


def total_segmentator() -> dict[str, int]:
    """Organs of TotalSegmentator's task `total`, version 2, with their ids."""
    return {name: ids[0] for name, ids in OrganTable.load(SHIPPED[0]).organs.items()}


def read_class_map(file: Path) -> dict[str, int]:
    """Organ names and ids from a file.

    Args:
        file: CSV with two columns (id, name, in any order), JSON with names and ids, the `dataset.json` of an nnU-Net,
            or a NIfTI file of TotalSegmentator, which holds its names.

    Raises:
        InputError: None of them, or an id stands twice.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "map.json")
        >>> _ = file.write_text('{"labels": {"background": 0, "heart": 51}}')
        >>> read_class_map(file)
        {'heart': 51}
    """
    if file.name.lower().endswith((".nii", ".nii.gz")):
        found = names_in_header(file)
        if not found:
            raise InputError(f"{file}: expected the names of organs in the header, got none: write them as CSV")
        return found
    try:
        text = file.read_text(encoding="utf-8-sig")
        pairs = _json_pairs(json.loads(text)) if text.lstrip().startswith("{") else _csv_pairs(text)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: expected a class map (CSV id,name or JSON), got {error}") from None
    found = {name.strip(): number for name, number in pairs if number}
    if not found or len(set(found.values())) < len(found) or len(found) < sum(bool(n) for _, n in pairs):
        raise InputError(f"{file}: expected every name and id once and above 0, got {len(pairs)} pairs that are not so")
    return found


def names_in_header(file: Path) -> dict[str, int]:
    """Names that TotalSegmentator writes into the header of a multi-label file; empty where there are none."""
    try:
        extensions = nib.load(file).header.extensions
    except Exception:  # whatever the file is, its voxels are read later, and what is wrong is told then
        return {}
    for extension in extensions:
        content = extension.get_content()
        raw = content if isinstance(content, bytes) else str(content).encode()
        # Entities need a document type, and that is refused: nothing expands.
        if b"<LabelTable" not in raw or b"<!DOCTYPE" in raw:
            continue
        try:
            root = ElementTree.fromstring(raw.strip(b"\0 \n"))  # noqa: S314
        except ElementTree.ParseError:
            continue
        return {(node.text or "").strip(): int(node.get("Key", "0")) for node in root.iter("Label") if node.text}
    return {}


def make_table(labels: Sequence[str], organs: Mapping[str, int], more: Iterable[str] = ()) -> MadeTable:
    """A table for labels, with rules of the shipped ones.

    Args:
        labels: Names of the labels.
        organs: Organ -> id.
        more: Names of binary files that have no id yet.

    Example:
        >>> made = make_table(["Pleural effusion", "mystery"], total_segmentator())
        >>> made.sources, made.table.anywhere
        ({'Pleural effusion': 'ct_rate', 'mystery': ''}, (False, True))
    """
    ids = dict(organs)
    free = max(_FIRST_OWN, max(ids.values(), default=0) + 1)
    ids |= {name: number for number, name in enumerate(sorted(set(more) - set(ids)), start=free)}
    shipped = {name: OrganTable.load(name) for name in SHIPPED}
    groups: dict[str, tuple[str, ...]] = {}
    for table in shipped.values():
        groups = {**table.groups, **groups}
    entries: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for label in labels:
        wanted = _plain(label)
        known = next(((name, table) for name, table in shipped.items() if _known(wanted, table)), None)
        entry = None if known is None else known[1].to_dict()["labels"][_known(wanted, known[1])]
        entries[label], sources[label] = "anywhere", ""
        if known is not None and _fits(known[1], _known(wanted, known[1]), ids):
            entries[label], sources[label] = entry, known[0]
    kept = {name: members for name, members in groups.items() if _leaves(name, groups) <= set(ids)}
    kept = {name: members for name, members in kept.items() if name not in ids}
    return MadeTable(OrganTable(ids, entries, kept), sources, _near(sources, shipped))


def _near(sources: Mapping[str, str], shipped: Mapping[str, OrganTable]) -> dict[str, str]:
    """Labels that may be misspelt."""
    known = dict.fromkeys(name for table in shipped.values() for name in table.labels)
    found = {
        label: next((name for name in known if one_letter_apart(_plain(label), name)), "")
        for label, source in sources.items()
        if not source
    }
    return {label: name for label, name in found.items() if name}


def _known(wanted: str, table: OrganTable) -> str:
    """The table's own name of a label, "" where it has none."""
    for name in (wanted, _SAME.get(wanted, "")):
        if name in table.labels:
            return name
    return ""


def _fits(table: OrganTable, label: str, ids: Mapping[str, int]) -> bool:
    """Are all organs of a rule there, those that are taken out included?"""
    rule = table.rules[label]
    return {*rule.organs, *rule.minus} <= set(ids)


def _leaves(name: str, groups: Mapping[str, Sequence[str]]) -> set[str]:
    return {leaf for member in groups[name] for leaf in (_leaves(member, groups) if member in groups else {member})}


def _plain(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")


def _json_pairs(content: Mapping[str, Any]) -> list[tuple[str, int]]:
    inner = content.get("labels", content)
    if not isinstance(inner, dict):
        raise ValueError("no names and ids in it")
    return [(str(value), int(key)) if str(key).isdigit() else (str(key), int(value)) for key, value in inner.items()]


def _csv_pairs(text: str) -> list[tuple[str, int]]:
    mark = max(",;\t", key=text.partition("\n")[0].count)
    pairs = []
    for cells in csv.reader(text.splitlines(), delimiter=mark):
        numbers = [cell for cell in cells[:2] if cell.strip().isdigit()]
        words = [cell for cell in cells[:2] if not cell.strip().isdigit()]
        if len(numbers) == len(words) == 1:
            pairs.append((words[0], int(numbers[0])))
    return pairs


def _flow(content: Mapping[str, Any], block: bool = False) -> str:
    """YAML with short lists in one line."""
    style = False if block else None
    return yaml.safe_dump(dict(content), default_flow_style=style, sort_keys=False, width=110).rstrip()


def _line(content: Mapping[str, Any]) -> str:
    """YAML of a mapping with one entry, in one line."""
    return yaml.safe_dump(dict(content), default_flow_style=True, sort_keys=False, width=10**6).strip()[1:-1]
