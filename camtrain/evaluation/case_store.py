"""Finished cases on disk, one line each: what an interruption leaves, and what the tables are made of."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from camtrain._errors import InputError
from camtrain.reporting._files import replacing

CASE = -1
"""The column of a number that belongs to the whole case."""
Numbers = dict[int, Any]
"""Column of the label -> number (a list for a curve), None where undefined; pairs that do not count are absent."""


@dataclass
class CaseRecord:
    """All raw numbers of one case.

    Attributes:
        id: Name of the case.
        split: Its split.
        patient: Name of the patient, or None.
        label: Truth per label, None = unknown.
        logits: Per label.
        segmented: Does the case have organs?
        geometry: Is its voxel size known?
        seen: Checksum of image, organs and truth: what the numbers were made of.
        empty: Columns of wanted labels whose organs are missing in this case.
        full: Columns of wanted labels whose region covers everything.
        broken: "method@layer" -> columns of wanted labels whose map has NaN or Inf.
        maps: Method -> layer -> measure -> numbers.
        replaced: Replacement -> "outside" | "inside" -> probability per measured label.
    """

    id: str
    split: str
    patient: str | None
    label: list[float | None]
    logits: list[float]
    segmented: bool
    geometry: bool = False
    seen: str = ""
    empty: list[int] = field(default_factory=list)
    full: list[int] = field(default_factory=list)
    broken: dict[str, list[int]] = field(default_factory=dict)
    maps: dict[str, dict[str, dict[str, Numbers]]] = field(default_factory=dict)
    replaced: dict[str, dict[str, Numbers]] = field(default_factory=dict)

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), allow_nan=False, separators=(",", ":"))

    @staticmethod
    def read(line: str) -> CaseRecord:
        """The record of such a line."""
        record = CaseRecord(**json.loads(line))
        # JSON knows keys of text only.
        for layers in record.maps.values():
            for measures in layers.values():
                for name, numbers in measures.items():
                    measures[name] = {int(column): value for column, value in numbers.items()}
        for sides in record.replaced.values():
            for side, numbers in sides.items():
                sides[side] = {int(column): value for column, value in numbers.items()}
        return record


class CaseStore:
    """Finished cases of one evaluation.

    Args:
        folder: Where `cases.jsonl` and `settings.json` lie; None keeps cases in memory only.
        settings: What the numbers depend on; an evaluation goes on only under equal settings.
        overwrite: Throw away what an earlier evaluation has finished there.

    Raises:
        InputError: The folder holds cases of other settings, or a damaged file; it is a file.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.folder = folder
        self.records: dict[tuple[str, str], CaseRecord] = {}
        self._settings = json.loads(json.dumps(settings))
        if folder is not None:
            if folder.exists() and not folder.is_dir():
                raise InputError(f"out= expects a folder, got the file {folder}: choose another name")
            folder.mkdir(parents=True, exist_ok=True)
            if not overwrite:
                self._load(folder / "cases.jsonl")
            if self.records:  # settings of a call that finished nothing bind nobody
                self._check_settings(folder / "settings.json")
        self.resumed = len(self.records)

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self.records

    def __iter__(self) -> Iterator[CaseRecord]:
        return iter(self.records.values())

    def of(self, split: str) -> list[CaseRecord]:
        """The finished cases of a split, in the order in which they were finished."""
        return [record for record in self if record.split == split]

    def add(self, record: CaseRecord) -> None:
        """Keep a finished case; it is on disk when this returns."""
        first = not self.records
        if self.folder is not None and first:
            with replacing(self.folder / "settings.json") as temporary:
                Path(temporary).write_text(json.dumps(self._settings, indent=1) + "\n", encoding="utf-8")
        self.records[record.split, record.id] = record
        if self.folder is None:
            return
        # What is to be overwritten goes when there is something to take its place.
        with (self.folder / "cases.jsonl").open("w" if first else "a", encoding="utf-8") as file:
            file.write(record.line() + "\n")
            file.flush()
            os.fsync(file.fileno())

    def check(self, split: str, case: str, seen: str) -> None:
        """Is a case that comes again the one that was finished?

        Raises:
            InputError: Its image, organs or labels are others.
        """
        if self.records[split, case].seen != seen:
            raise InputError(
                f"case {case!r} of {split} has another image, other organs or labels than when it was finished in "
                f"{self.folder}: other data under the same name, or a loader that shuffles cases without 'id'; choose "
                "another folder, or add the key 'id'"
            )

    def _check_settings(self, path: Path) -> None:
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read ({error}), so nobody knows what the cases beside it are: choose another "
                "folder, or --overwrite (overwrite=True)"
            ) from error
        for key in {**earlier, **self._settings}:
            if earlier.get(key) != self._settings.get(key):
                raise InputError(
                    f"{path.parent} holds an evaluation with {key} = {_short(earlier.get(key))}, now asked with "
                    f"{_short(self._settings.get(key))}: choose another folder, or repeat the earlier settings to go on"
                )

    def _load(self, path: Path) -> None:
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        whole, _, rest = text.rpartition("\n")
        if rest:
            # The process was stopped in the middle of a line: that case is scored again.
            with replacing(path) as temporary:
                Path(temporary).write_text(whole + "\n" if whole else "", encoding="utf-8")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = CaseRecord.read(line)
            except (ValueError, TypeError) as error:
                raise InputError(f"{path}, line {number}, is damaged: delete that line, or the folder") from error
            self.records[record.split, record.id] = record


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
