"""What a run's folder says, read for its report: whatever cannot be read is left out and named."""

from __future__ import annotations

import contextlib
import csv
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from camtrain._errors import InputError
from camtrain.reporting._logs import finite
from camtrain.reporting.kept_curves import KeptCurves
from camtrain.reporting.panel_files import LAYOUT
from camtrain.reporting.report_blocks import VOLUME_VOXELS, Piece, PieceStore, script_json, thinned
from camtrain.reporting.report_digest import Curves

Row = TypeVar("Row")

PAGE_BYTES = 18_000_000  # of what grows with a run; the rest of a page, its own script among it, is a tenth of that
_ROW_BYTES, _CELL_BYTES = 1500, 50  # of a label's rows in the tables of a page; of each of its scores there

_Cases = dict[tuple[str, int], list[list[Any]]]  # split and epoch -> rows


@dataclass(frozen=True)
class Alarm:
    """An alarm of a label of a split: raised since an epoch, or cleared again."""

    split: str
    alarm: str
    label: str
    raised: bool
    since: int
    until: int | None
    sentence: str


@dataclass(frozen=True)
class RunRecord:
    """All that a report shows of a run.

    Attributes:
        folder: The run's folder.
        facts: `run.json`, empty where there is none.
        curves: Scores.
        drawn: The curves of the page, as `Curves.for_script` makes them.
        alarms: Raised ones first.
        volumes: Pieces of the page: the panel's cases.
        maps: Pieces of the page: maps by split and epoch.
        scale: Method -> end of the colour scale, as the run's pictures have it.
        cases: Of `cases.csv`, where there are maps: split, epoch, case, label, method, OrganIoU or None, why shown.
        notes: What was left out, and why.
    """

    folder: Path
    facts: Mapping[str, Any]
    curves: Curves
    drawn: Mapping[str, Any]
    alarms: tuple[Alarm, ...]
    volumes: tuple[Piece, ...]
    maps: tuple[Piece, ...]
    scale: Mapping[str, float]
    cases: tuple[list[Any], ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The run's id."""
        return str(self.facts.get("name") or self.folder.name)

    @property
    def labels(self) -> list[str]:
        """Label names in the order of the outputs."""
        return [str(name) for name in self.facts.get("labels") or self.curves.labels]

    @property
    def methods(self) -> list[str]:
        """Attention methods, the first with the plain keys first."""
        return [str(name) for name in self.facts.get("methods") or self.curves.methods]

    @property
    def free_labels(self) -> list[str]:
        """Labels that the organ table lets be read from anywhere."""
        rules = (self.facts.get("table") or {}).get("labels") or {}
        return [label for label, rule in rules.items() if rule == "anywhere"] if isinstance(rules, dict) else []


def is_run(folder: Path) -> bool:
    """Does this look like the folder of a run?"""
    return (folder / "run.json").is_file() or (folder / "scores.csv").is_file()


def find_run(given: str | Path) -> Path:
    """The run's folder: the given one, or the only one below it.

    Args:
        given: Folder of a run, or a folder above one, such as the Trainer's log folder.

    Raises:
        InputError: There is no run, or there are several.
    """
    folder = Path(given)
    folder = folder.parent if folder.is_file() else folder
    if is_run(folder):
        return folder
    if not folder.is_dir():
        raise InputError(f"expected the folder of a run, got {folder}: there is no such folder")
    found = sorted(path.parent for path in folder.glob("**/camtrain/*/scores.csv"))
    found += sorted(path.parent for path in folder.glob("*/scores.csv") if path.parent not in found)
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(str(path.relative_to(folder)) for path in found[-4:])
        raise InputError(f"{folder} holds {len(found)} runs: name one of them, such as {listed}")
    raise InputError(f"{folder} holds no run: expected scores.csv or run.json, as AttentionMonitor writes them")


def read_run(
    folder: Path,
    store: PieceStore | None = None,
    budget: int = PAGE_BYTES,
    voxels: int = VOLUME_VOXELS,
    kept: KeptCurves | None = None,
) -> RunRecord:
    """Read a run's folder; nothing in it can make this fail.

    Args:
        folder: The run's folder.
        store: Keeps pieces between calls.
        budget: Bytes of the page that volumes, curves, tables, maps and what is known of their cases may take.
        voxels: Voxels of all volumes together.
        kept: Keeps curves between calls.
    """
    store = store or PieceStore()
    notes: list[str] = []
    facts = _facts(folder, notes)
    volume_files = sorted(folder.glob("volumes/*.npz")) + sorted(folder.glob("volumes/*/*.npz"))
    volumes, more = store.volumes(volume_files, voxels)
    notes += more
    curves = _curves(folder, kept or KeptCurves(), notes)
    alarms, cases, scale = _alarms(folder, notes), _cases(folder, notes), _scale(folder, notes)
    drawn = curves.for_script()
    tables = _ROW_BYTES * len(curves.labels) + _CELL_BYTES * len(curves)
    left = budget - sum(piece.size for piece in volumes) - len(script_json(drawn)) - tables
    maps, more = store.maps(_map_files(folder, left, cases, notes), volumes)
    shown = {(piece.split, piece.epoch) for piece in maps}
    return RunRecord(
        folder=folder,
        facts=facts,
        curves=curves,
        drawn=drawn,
        alarms=tuple(alarms),
        volumes=tuple(volumes),
        maps=tuple(sorted(maps, key=lambda piece: (piece.split, piece.epoch))),
        scale=scale,
        cases=tuple(row for place, rows in cases.items() if place in shown for row in rows),
        notes=(*notes, *more),
    )


def _facts(folder: Path, notes: list[str]) -> dict[str, Any]:
    facts = _json(folder / "run.json", notes)
    if not facts:
        notes.append("run.json: not there, so labels, config and command are not known")
    elif facts.get("layout") != LAYOUT:
        notes.append(
            f"run.json: written in layout {facts.get('layout')}, this version reads {LAYOUT}: what it understands is "
            "shown"
        )
    broken = [k for k, kind in _KINDS.items() if not isinstance(facts.get(k, kind()), kind | None)]
    if broken:
        notes.append(f"run.json: {', '.join(broken)} not as expected: left out")
    return {key: value for key, value in facts.items() if key not in broken}


# What the report relies on; a file that somebody has changed may hold anything.
_KINDS: dict[str, type] = {
    "labels": list,
    "methods": list,
    "layers": list,
    "table": dict,
    "config": dict,
    "versions": dict,
}


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{path.name}: not readable ({type(error).__name__}): left out")
        return {}
    return content if isinstance(content, dict) else {}


def _scale(folder: Path, notes: list[str]) -> dict[str, float]:
    scale = _json(folder / "panel.json", notes).get("scale", {})
    found: dict[str, float] = {}
    for method, value in scale.items() if isinstance(scale, dict) else ():
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            found[str(method)] = finite(value)
    if not isinstance(scale, dict) or len(found) < len(scale):
        notes.append("panel.json: scale holds what is no number: left out, the pictures' colours end at what they show")
    return found


def _curves(folder: Path, kept: KeptCurves, notes: list[str]) -> Curves:
    try:
        curves, rows, faults = kept.read(folder / "scores.csv")
    except OSError as error:
        curves, rows, faults = Curves([]), 0, [f": not readable ({type(error).__name__})"]
    if faults:
        more = f", and {len(faults) - 1} more lines" if len(faults) > 1 else ""
        left = f"the other {rows} rows are shown" if rows else "no scores are shown"
        notes.append(f"scores.csv{faults[0]}{more}: {left}")
    return curves


def _map_files(folder: Path, budget: int, cases: _Cases, notes: list[str]) -> list[Path]:
    """The maps that a page can hold: of every split its first and last epoch, and evenly some between them."""
    splits: dict[str, dict[int, Path]] = {}
    for path in [*folder.glob("epochs/*/maps.npz"), *folder.glob("epochs/*/*/maps.npz")]:
        place = path.relative_to(folder).parts
        if place[1].isdecimal():
            splits.setdefault(place[2] if len(place) == 4 else "", {})[int(place[1])] = path
    chosen: list[Path] = []
    for split, files in sorted(splits.items()):
        # A split's folder need not bear its very name; what is known of cases is counted for `val` where it does not.
        rows = {epoch: len(script_json(found)) for (name, epoch), found in cases.items() if name == (split or "val")}
        kept = thinned(files, max(0, budget) // len(splits), rows)
        if len(kept) < len(files):
            notes.append(
                f"{split or 'val'}: maps of {len(kept)} of {len(files)} epochs are shown, to keep this page small; all "
                "are in the run's folder"
            )
        chosen += [files[epoch] for epoch in kept]
    return chosen


def _cases(folder: Path, notes: list[str]) -> _Cases:
    """What `cases.csv` knows of the panel beyond the maps."""

    def case(row: Mapping[str, str]) -> list[Any]:
        score = finite(row["organ_iou"]) if row.get("organ_iou") else None
        names = [str(row[name]) for name in ("case", "label", "method")]
        return [row["split"], int(row["epoch"]), *names, None if score is None else round(score, 3), row["kind"] or ""]

    found: _Cases = defaultdict(list)
    for row in _rows_of(folder / "cases.csv", case, "OrganIoU of these cases is left out", notes):
        found[row[0], row[1]].append(row)
    return found


def _rows_of(path: Path, make: Callable[[Mapping[str, str]], Row], left: str, notes: list[str]) -> list[Row]:
    """The rows of a CSV file that can be read; of the others one note."""
    found: list[Row] = []
    faults: list[str] = []
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            reader = csv.DictReader(file)
            for row in reader:
                try:
                    found.append(make(row))
                except (ValueError, KeyError, TypeError) as error:
                    faults.append(f"line {reader.line_num}: not readable ({type(error).__name__}: {error})")
    except FileNotFoundError:
        return []
    except (OSError, csv.Error) as error:
        faults.append(f"not readable to its end ({type(error).__name__})")
    if faults:
        more = f", and {len(faults) - 1} more lines" if len(faults) > 1 else ""
        notes.append(f"{path.name}, {faults[0]}{more}: {left}")
    return found


def _alarms(folder: Path, notes: list[str]) -> list[Alarm]:
    """The last state of every alarm, raised ones first."""

    def event(row: Mapping[str, str]) -> tuple[tuple[str, str, str], bool, int, str]:
        key = (str(row["split"]), str(row["alarm"]), str(row["label"]))
        if row["state"] not in ("raised", "cleared"):
            raise ValueError(f"expected raised or cleared, got {row['state']}")
        return key, row["state"] == "raised", int(row["epoch"]), row["sentence"] or ""

    last: dict[tuple[str, str, str], Alarm] = {}
    for key, raised, epoch, sentence in _rows_of(folder / "alarms.csv", event, "these alarms are left out", notes):
        known = last.get(key)
        since = known.since if known is not None and known.raised else epoch
        last[key] = Alarm(*key, raised, since, None if raised else epoch, sentence)
    return sorted(last.values(), key=lambda alarm: (not alarm.raised, alarm.since))
