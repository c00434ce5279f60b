"""The report of a run: one HTML file that shows where the network looks, and of two runs one that sets them together.

No server, no account, no request: style, script, volumes and maps lie in the file. It is rewritten as a whole, but made
of pieces that are kept, so that it can be read while training goes on.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from camtrain import __version__
from camtrain._errors import InputError
from camtrain.reporting._files import replacing
from camtrain.reporting._pages import asset, environment, script_hash
from camtrain.reporting.kept_curves import KeptCurves
from camtrain.reporting.report_blocks import VOLUME_VOXELS, PieceStore, elements, script_json
from camtrain.reporting.report_digest import (
    INSIDE,
    MEASURES,
    OUTSIDE,
    Curves,
    ReportMeasure,
    differences,
    headline,
    heat_rows,
    sparkline,
    verdicts,
)
from camtrain.reporting.run_dir import MEAN
from camtrain.reporting.run_record import PAGE_BYTES, RunRecord, find_run, read_run

_SCRIPTS = ("report_data.js", "report_draw.js", "report_charts.js", "report_viewer.js", "report_page.js")
_MARK = secrets.token_hex(16)  # nothing that a user wrote can hold it
_NOT_EVIDENCE = (
    "Attention inside the organ does not show that the evidence lay there; to govern what the network uses, change "
    "what lies outside (OutsideSwap)."
)


class RunReport:
    """The report of one run, written again whenever something has been added to its folder.

    Args:
        folder: The run's folder, `<root>/camtrain/<run id>`.

    Example:
        >>> import tempfile
        >>> from camtrain.reporting import RunDir, Score
        >>> run = RunDir(tempfile.mkdtemp())
        >>> run.write_scores([Score(0, 9, "val", "hirescam", "nodule", "energy_inside", 0.25)])
        >>> RunReport(run.path).write().name
        'report.html'
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._store, self._curves = PieceStore(), KeptCurves()

    def write(self) -> Path:
        """Write `report.html`; the file is whole or as it was.

        Returns:
            The file.
        """
        return _write(self.folder / "report.html", [read_run(self.folder, self._store, kept=self._curves)])


def write_run_report(run: str | Path, out: str | Path | None = None, name: str | None = None) -> Path:
    """Build the report of a run anew from what its folder holds.

    Args:
        run: The run's folder, or one above it that holds a single run.
        out: The file; default: `report.html` in the run's folder.
        name: What to call the run; default: its id.

    Returns:
        The file.

    Raises:
        InputError: There is no run.

    Example:
        >>> import tempfile
        >>> from camtrain.reporting import RunDir, Score
        >>> run = RunDir(tempfile.mkdtemp())
        >>> run.write_scores([Score(0, 9, "val", "hirescam", "<b>", "energy_inside", 0.25)])
        >>> "&lt;b&gt;" in write_run_report(run.path).read_text(encoding="utf-8")
        True
    """
    folder = find_run(run)
    return _write(Path(out) if out else folder / "report.html", [read_run(folder)], None if name is None else [name])


def write_run_comparison(
    first: str | Path, second: str | Path, out: str | Path | None = None, names: Sequence[str] | None = None
) -> Path:
    """One page with two runs side by side: score differences per label, and the same cases with one slice and epoch.

    Args:
        first: Folder of the run A, such as the baseline.
        second: Folder of the run B.
        out: The file; default: `report_against_<A>.html` in the folder of B.
        names: What to call the two runs; default: their ids.

    Returns:
        The file.

    Raises:
        InputError: One of them is no run, both are the same, or the number of names is not two.
    """
    folders = [find_run(first), find_run(second)]
    if folders[0].resolve() == folders[1].resolve():
        raise InputError(f"expected two runs, got {folders[0]} twice")
    if names is not None and len(names) != 2:
        raise InputError(f"expected two names, one per run, got {len(names)}")
    half, voxels = PAGE_BYTES // 2, VOLUME_VOXELS // 2
    records = [read_run(folder, budget=half, voxels=voxels) for folder in folders]
    target = Path(out) if out else folders[1] / f"report_against_{folders[0].name}.html"
    return _write(target, records, names)


def _write(path: Path, records: Sequence[RunRecord], names: Sequence[str] | None = None) -> Path:
    head, tail = report_frame(records, names).split(_MARK)
    shown: set[tuple[str, str]] = set()
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
        file.write(head)
        # Of two runs with the same case one volume is enough: that of a run which knows the organs.
        for run, record in sorted(enumerate(records), key=lambda each: not each[1].facts.get("table")):
            fresh = [piece for piece in record.volumes if not {(piece.split, case) for case in piece.axes} <= shown]
            shown |= {(piece.split, case) for piece in fresh for case in piece.axes}
            file.writelines(elements([*fresh, *record.maps], run))
        file.write(tail)
    return path


def report_frame(records: Sequence[RunRecord], names: Sequence[str] | None = None) -> str:
    """The page around the volumes and maps, with a mark where these go.

    Args:
        records: One run or two.
        names: What to call them; default: their ids.
    """
    called = list(names or [record.name for record in records])
    script = Markup("\n").join(asset(name) for name in _SCRIPTS)
    difference = _difference(records) if len(records) == 2 else None
    page = {
        "runs": [_for_script(record, name) for record, name in zip(records, called, strict=True)],
        "order": [label for label, _ in difference["rows"][:-1]] if difference else _worst_first(records[-1]),
        "measures": {name: measure._asdict() for name, measure in MEASURES.items()},
    }
    text = (
        environment()
        .get_template("run_report.html.j2")
        .render(
            title=" and ".join(called),
            runs=[_static(record, name) for record, name in zip(records, called, strict=True)],
            difference=difference,
            settings=differing_settings(*(record.facts.get("config") for record in records)) if difference else [],
            footer=seen_sentence(records[0].facts.get("seen")),
            mark=_MARK,
            made=f"Made by camtrain {__version__}, {time.strftime('%Y-%m-%d %H:%M')}.",
            style=asset("run_report.css"),
            script=script,
            digest=script_hash(script),
            page=Markup(script_json(page)),  # noqa: S704  (escaped there)
        )
    )
    return str(text)


def seen_sentence(seen: Any) -> str:
    """What a map can say, with the share of the scan that a cell has seen where it is known.

    Args:
        seen: Layer -> share of the image that a central cell depends on, or None.

    Example:
        >>> seen_sentence({"layer3": 0.25}).endswith("of the image.")
        True
    """
    known = {str(k): v for k, v in seen.items() if isinstance(v, int | float)} if isinstance(seen, Mapping) else {}
    text = "A map locates cells, not evidence"
    if not known:
        return f"{text}: a cell may have seen the whole scan (ct.layers prints how much). {_NOT_EVIDENCE}"
    shares = [f"{100 * share:.0f}\u00a0%" for share in known.values()]
    if len(known) == 1:
        depends = f"a central cell of {next(iter(known))} depends on {shares[0]} of the image"
    else:
        listed = ", ".join(f"{layer}: {share}" for layer, share in zip(known, shares, strict=True))
        depends = f"of the image a central cell depends on a share that grows with depth ({listed})"
    # Above a half, as camtrain.cam.layer_table says.
    return f"{text}: {depends}." + (f" {_NOT_EVIDENCE}" if max(known.values()) > 0.5 else "")


def _for_script(record: RunRecord, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "labels": record.labels,
        "methods": record.methods,
        "layers": [str(layer) for layer in record.facts.get("layers") or []],
        "splits": record.curves.splits,
        "scale": {method: value for method, value in record.scale.items() if math.isfinite(value)},
        "curves": record.drawn,
        "cases": record.cases,
    }


def _worst_first(record: RunRecord) -> list[str]:
    return [each.label for each in verdicts(record.curves, record.labels, *_judging(record), record.free_labels)]


def _static(record: RunRecord, name: str) -> dict[str, Any]:
    """What the page says of a run without its script."""
    curves = record.curves
    split, method = _judging(record)
    found = verdicts(curves, record.labels, split, method, record.free_labels)
    states = {each.state for each in found}
    judged = "outside" in states or "partly" in states or "inside" in states
    return {
        "name": name,
        "summary": _summary(record),
        "headline": headline(found),
        "mood": "wrong" if "outside" in states else "mixed" if "partly" in states else "right" if judged else "",
        "judged_by": _judged_by(curves, split, method) if judged else _why_not(record),
        "verdicts": found,
        "sparks": {each.label: Markup(sparkline(each.points)) for each in found},  # noqa: S704  (numbers)
        "heats": _heats(record, [each.label for each in found]),
        "raised": [alarm for alarm in record.alarms if alarm.raised],
        "cleared": [alarm for alarm in record.alarms if not alarm.raised],
        "command": str(record.facts.get("command") or ""),
        "saved_config": str(record.facts.get("saved_config") or ""),
        "versions": ", ".join(f"{k} {v}" for k, v in dict(record.facts.get("versions") or {}).items()),
        "organs": organ_rules(record.facts.get("table")),
        "config": config_rows(record.facts.get("config")),
        "notes": record.notes,
    }


def _judging(record: RunRecord) -> tuple[str, str]:
    """The split and the method that the verdicts are made of."""
    return next(iter(record.curves.splits), "val"), next(iter(record.methods), "")


def _summary(record: RunRecord) -> list[str]:
    facts, curves = record.facts, record.curves
    split, _ = _judging(record)
    items = [f"epoch {curves.epochs[split][-1]}" if curves.epochs.get(split) else "no epoch yet"]
    items.append(f"{len(record.labels)} label{'' if len(record.labels) == 1 else 's'}")
    if record.methods:
        items.append(", ".join(record.methods))
    if facts.get("layers"):
        items.append("at " + ", ".join(map(str, facts["layers"])))
    if facts.get("started"):
        items.append(f"started {facts['started']}")
    return items


def _judged_by(curves: Curves, split: str, method: str) -> str:
    chance = curves.last(split, method, "energy_inside_chance", MEAN)
    even = f" An evenly spread map would have {chance:.2f} on average." if chance is not None else ""
    return (
        f"Inside: share of the positive evidence ({method}, {split}) that lies within the allowed organs. Mostly "
        f"outside is less than {OUTSIDE:g}, partly less than {INSIDE:g}.{even}"
    )


def _why_not(record: RunRecord) -> str:
    if not record.curves.labels:
        return "There are no scores yet."
    if not record.facts.get("table"):
        return "The run has no organ table: give the monitor table=, or a data module that has one."
    return ""


def _heats(record: RunRecord, order: Sequence[str]) -> list[dict[str, Any]]:
    curves = record.curves
    tables = []
    for split in curves.splits:
        for method in curves.methods or [""]:
            measures = curves.measures(split, method)
            tables.append(
                {
                    "split": split,
                    "method": method,
                    "epoch": curves.epochs[split][-1],
                    "measures": [_measure(name) for name in measures],
                    "rows": heat_rows(curves, order, split, method),
                    "mean": heat_rows(curves, [MEAN], split, method)[0][1],
                }
            )
    return tables


def _measure(name: str) -> ReportMeasure:
    return MEASURES.get(name, ReportMeasure(name.replace("_", " "), None, name))


def _difference(records: Sequence[RunRecord]) -> dict[str, Any] | None:
    first, second = records
    shared = [split for split in first.curves.splits if split in second.curves.splits]
    labels = [label for label in first.labels if label in second.labels]
    if not shared or not labels:
        return None
    methods = (_judging(first)[1], _judging(second)[1])
    measures, rows = differences(first.curves, second.curves, labels, shared[0], methods)
    return {"split": shared[0], "measures": [_measure(name) for name in measures], "rows": rows}


def organ_rules(table: Any) -> list[tuple[str, str]]:
    """Label and where it may be read from, in words, of an organ table as plain values.

    Example:
        >>> organ_rules({"labels": {"nodule": ["lungs"], "effusion": {"organs": ["lungs"], "hull": True}}})
        [('nodule', 'lungs'), ('effusion', 'lungs; hull: True')]
    """
    rules = table.get("labels") if isinstance(table, Mapping) else None
    return [(str(label), _rule(rule)) for label, rule in rules.items()] if isinstance(rules, Mapping) else []


def _rule(rule: Any) -> str:
    if isinstance(rule, Mapping):
        organs = ", ".join(map(str, rule.get("organs") or []))
        return "; ".join([organs, *(f"{key}: {value}" for key, value in rule.items() if key != "organs")])
    return ", ".join(map(str, rule)) if isinstance(rule, list | tuple) else str(rule)


def config_rows(config: Any) -> list[tuple[str, list[tuple[str, str]]]]:
    """The settings of a run by section, as text.

    Example:
        >>> config_rows({"model": {"lr": 0.1, "net": {"class_path": "Net"}}})
        [('model', [('lr', '0.1'), ('net.class_path', 'Net')])]
    """
    sections = config.items() if isinstance(config, Mapping) else ()
    return [(str(title), rows) for title, values in sections if (rows := list(_flat(values)))]


def differing_settings(first: Any, second: Any) -> list[tuple[str, str, str]]:
    """Settings that two runs do not share: name, value in the first, value in the second.

    Example:
        >>> differing_settings({"model": {"lr": 0.1, "labels": 3}}, {"model": {"lr": 0.2, "labels": 3}})
        [('model.lr', '0.1', '0.2')]
    """
    mine, theirs = dict(_flat(first)), dict(_flat(second))
    keys = dict.fromkeys([*mine, *theirs])
    return [(k, mine.get(k, "–"), theirs.get(k, "–")) for k in keys if mine.get(k) != theirs.get(k)]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, str(value)
