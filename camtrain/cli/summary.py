"""What stands on the terminal after a run: scores per label, and where everything was written."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from camtrain.callbacks import AttentionMonitor
from camtrain.cli.consoles import wide_console
from camtrain.cli.lightning_cli import SaveRunConfig
from camtrain.reporting import Score, describe_loggers, score_table
from camtrain.reporting.alarm_log import NAME as ALARMS_FILE
from camtrain.reporting.need_table import MEASURES, need_table
from camtrain.reporting.run_dir import MEAN, readable_scores


def show(trainer: Any, command: str, console: Console | None = None) -> None:
    """Print the tables and the places of a finished run, on rank zero.

    Args:
        trainer: The Trainer that ran.
        command: `fit`, `validate` or `test`.
        console: Where to print; default: stdout.
    """
    if not trainer.is_global_zero:
        return
    console = console or wide_console()
    monitors = [c for c in trainer.callbacks if isinstance(c, AttentionMonitor)]
    epoch = _best_epoch(trainer) if command == "fit" else None
    for monitor in monitors:
        for split, title, rows in _splits(monitor, epoch, _best_key(trainer), command == "fit"):
            watched = command == "fit" and monitor.alarms.active
            _show_split(console, monitor, title, rows, monitor.alarms.board.by_label(split) if watched else None)
    if not monitors:
        console.print("No AttentionMonitor in trainer.callbacks, so there are no scores per label.")
    # Paths are printed unbroken, so that they can be copied.
    for line in _places(trainer, monitors, command):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _splits(
    monitor: AttentionMonitor, epoch: int | None, key: str, fit: bool
) -> Iterator[tuple[str, str, list[Score]]]:
    """Split, title and rows: those of the best epoch where a file has them, else the last ones."""
    run, last = monitor.publisher.run_dir, monitor.alarms.epoch
    watched = monitor.alarms.active
    alarms = f", alarms of epoch {last} (the last)" if watched else ""
    plain = f", scores{' and alarms' if watched else ''} of epoch {last} (the last)" if fit else ""
    stored = readable_scores(run.scores_path)[0] if run is not None and epoch is not None else []
    for split, scores in monitor.scores.items():
        best = [row for row in stored if row.epoch == epoch and row.split == split]
        if best:
            step = max(row.step for row in best)
            title = f"{split}, scores of epoch {epoch} (best {key}){alarms}"
            yield split, title, [row for row in best if row.step == step]
        else:
            rows = [Score(0, 0, split, s.method or "", s.label or MEAN, s.measure, s.value) for s in scores]
            yield split, f"{split}{plain}", rows


def _show_split(
    console: Console,
    monitor: AttentionMonitor,
    title: str,
    rows: Iterable[Score],
    raised: dict[str, list[str]] | None,
) -> None:
    """The first method label by label, after a fit the neediest first; of the others the means."""
    first = monitor.methods[0]
    by_measure: dict[str, dict[str, float]] = {}
    means: dict[str, dict[str, float]] = {first: {}}
    for row in rows:
        method = row.method or first
        if row.label == MEAN:
            means.setdefault(method, {})[row.measure] = row.value
        elif method == first:
            by_measure.setdefault(row.measure, {})[row.label] = row.value
    name = f"{monitor.name}: " if monitor.name else ""
    run = monitor.publisher.run_dir
    full = "scores.csv" if run is None else str(run.scores_path)
    if by_measure:
        heading = f"{name}{title}, maps by {first}"
        if raised is None:
            console.print(score_table(by_measure, title=heading, full=full, measures=MEASURES))
        else:
            console.print(need_table(by_measure, raised, title=heading, full=full, measures=MEASURES))
    for method, values in means.items():
        shown = [f"{key} {value:.3f}" for key, value in values.items() if method != first or key not in by_measure]
        if shown:
            console.print(f"{method}: {'  '.join(shown)}", highlight=False, markup=False)


def _places(trainer: Any, monitors: Iterable[AttentionMonitor], command: str) -> Iterator[str]:
    best = _best_path(trainer)
    if command == "fit" and best:
        yield f"checkpoint: {best}"
    config = next((c.path for c in trainer.callbacks if isinstance(c, SaveRunConfig)), None)
    if config is not None:
        yield f"config: {config}"
    for monitor in monitors:
        if (run := monitor.publisher.run_dir) is not None:
            yield f"run folder: {run.path}"
            yield f"scores: {run.scores_path}"
            if run.report_path.exists():
                yield f"report: {run.report_path}"
            if (run.path / ALARMS_FILE).exists() and command == "fit":
                yield f"alarms: {run.path / ALARMS_FILE}"
            if run.panel_path.exists():
                yield f"pictures: {run.path / 'epochs'}"
    yield from describe_loggers(trainer.loggers)
    if command == "fit" and best and config is not None:
        yield f"next: camtrain test --config {shlex.quote(str(config))} --ckpt_path {shlex.quote(best)}"
        yield f"      camtrain explain --ckpt_path {shlex.quote(best)} --image CT.nii.gz --out maps"


def _best_path(trainer: Any) -> str:
    callback = trainer.checkpoint_callback
    found = (getattr(callback, "best_model_path", "") or getattr(callback, "last_model_path", "")) if callback else ""
    return str(found) if found and Path(found).exists() else ""


def _best_key(trainer: Any) -> str:
    return str(getattr(trainer.checkpoint_callback, "monitor", None) or "checkpoint")


def _best_epoch(trainer: Any) -> int | None:
    """Epoch in which the best checkpoint was written; None without one or without a monitored score."""
    path = _best_path(trainer)
    if not path or not getattr(trainer.checkpoint_callback, "monitor", None):
        return None
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return int(content["epoch"])
