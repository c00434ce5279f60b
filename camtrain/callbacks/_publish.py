"""Scores and pictures to every logger of the Trainer, and to the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from camtrain._errors import InputError
from camtrain.callbacks._panel import PanelEntry
from camtrain.callbacks._scores import Score
from camtrain.reporting import RunDir, Sink, shared_scale, sinks_for
from camtrain.reporting import Score as Row


class Publisher:
    """Where the numbers and pictures of one monitor go.

    Args:
        first_method: The method with the plain keys.
        name: Name of the monitor, part of the keys.
        every_n_epochs: Pictures every so many epochs, 0 = never.
        max_label_keys: Above so many labels the loggers get one table instead of a chart per label.
    """

    def __init__(self, first_method: str, name: str | None, every_n_epochs: int, max_label_keys: int) -> None:
        if every_n_epochs < 0:
            raise InputError(f"every_n_epochs= expects 0 (never) or more, got {every_n_epochs}")
        self.first_method, self.name = first_method, name
        self.every_n_epochs, self.max_label_keys = every_n_epochs, max_label_keys
        self.run_id: str | None = None
        self.run_dir: RunDir | None = None
        self.draws = every_n_epochs > 0
        self._root: str | None = None
        self._sinks: list[Sink] | None = None
        self._scale: float | None = None
        self._logged: dict[str, float] = {}

    def setup(self, trainer: Any, stage: str) -> None:
        """A fit is a run of its own, unless a checkpoint says which one goes on; validate and test join it."""
        if stage == "fit":
            self.run_id, self._scale = None, None
        self.run_dir, self._sinks = None, None
        self.draws = self.every_n_epochs > 0 and not trainer.fast_dev_run
        # `log_dir` is a broadcast: every process must ask for it.
        self._root = str(trainer.log_dir or trainer.default_root_dir)

    def log_scores(self, trainer: Any, pl_module: Any, split: str, scores: Sequence[Score]) -> None:
        """Hand the scores to Lightning: loggers, `callback_metrics`, `monitor=`."""
        _refuse_taken(trainer, [score.key(split, self.first_method, self.name) for score in scores])
        many = len({score.label for score in scores if score.label}) > self.max_label_keys
        for score in scores:
            key = score.key(split, self.first_method, self.name)
            self._logged[key] = score.value
            to_loggers = not (many and score.label)
            pl_module.log(key, score.value, logger=to_loggers, rank_zero_only=False, batch_size=1, add_dataloader_idx=False)

    def check_clashes(self, trainer: Any, scores: Mapping[str, Sequence[Score]]) -> None:
        """Lightning silently averages two values that were logged under one key: find out and say so.

        Raises:
            InputError: A value under one of our keys is not the one that was logged.
        """
        for split, rows in scores.items():
            for score in rows:
                key = score.key(split, self.first_method, self.name)
                found = trainer.callback_metrics.get(key)
                # callback_metrics are float32.
                if found is not None and abs(float(found) - score.value) > 1e-4 * max(1.0, abs(score.value)):
                    raise InputError(_clash(key))

    def write(
        self, trainer: Any, scores: Mapping[str, Sequence[Score]], entries: Sequence[PanelEntry], names: Sequence[str]
    ) -> None:
        """Run folder, tables and pictures; rank zero only, nothing under `fast_dev_run`."""
        if not trainer.is_global_zero or trainer.fast_dev_run or not scores:
            return
        if self.run_dir is None or self._sinks is None:
            self.run_dir = RunDir(self._root or ".", self.run_id)
            self.run_id = self.run_dir.id
            self._sinks = sinks_for(trainer.loggers, self.run_dir)
        epoch, step = int(trainer.current_epoch), int(trainer.global_step)
        self.run_dir.write_scores(_rows(scores, epoch, step))
        for split, rows in scores.items():
            self._table(split, rows, names, step)
        if self.draws and entries and (not trainer.training or epoch % self.every_n_epochs == 0):
            self._pictures(next(iter(scores)), entries, epoch, step)

    def _table(self, split: str, scores: Sequence[Score], names: Sequence[str], step: int) -> None:
        if len(names) <= self.max_label_keys or self._sinks is None:
            return
        columns = list(dict.fromkeys(s.key("", self.first_method).split("/")[0] for s in scores if s.label))
        values = {(s.label, s.key("", self.first_method).split("/")[0]): s.value for s in scores}
        rows = [[label, *(values.get((label, column)) for column in columns)] for label in names]
        for sink in self._sinks:
            sink.table("/".join(p for p in (split, self.name, "scores") if p), ["label", *columns], rows, step)

    def _pictures(self, split: str, entries: Sequence[PanelEntry], epoch: int, step: int) -> None:
        if self._scale is None:
            # One colour scale for all epochs, from the first maps: growing evidence shall look like growing evidence.
            self._scale = shared_scale(m for entry in entries for m in entry.maps.values()) or None
        for label in dict.fromkeys(entry.label for entry in entries):
            chosen = [entry for entry in entries if entry.label == label]
            pictures = [entry.draw(self._scale) for entry in chosen]
            key = "/".join(p for p in (split, self.name, "attention", label) if p)
            for sink in self._sinks or []:
                sink.images(
                    key, pictures, [e.caption for e in chosen], step, epoch, [f"{e.case}_{e.label}" for e in chosen]
                )
        if self.run_dir is not None:
            self.run_dir.write_panel(
                {"scale": self._scale, "cases": [{"case": e.case, "label": e.label, "present": e.present} for e in entries]}
            )


def _rows(scores: Mapping[str, Sequence[Score]], epoch: int, step: int) -> list[Row]:
    return [
        Row(epoch, step, split, s.method or "", s.label or "mean", s.measure, s.value) for split, rows in scores.items() for s in rows
    ]


def _refuse_taken(trainer: Any, keys: Sequence[str]) -> None:
    """The module has logged one of our keys in its own step."""
    # Entries made in an epoch-end hook may be ours of an earlier epoch; `check_clashes` looks at those.
    metas = [getattr(entry, "meta", None) for entry in (getattr(trainer, "_results", None) or {}).values()]
    taken = {meta.name for meta in metas if meta is not None and not str(meta.fx).endswith("epoch_end")}
    for key in keys:
        if key in taken:
            raise InputError(_clash(key))


def _clash(key: str) -> str:
    return (
        f"{key!r} is logged by AttentionMonitor and by somebody else (the module, or a second monitor), and Lightning averages the "
        "two: log yours under another key, or give this monitor a name= of its own"
    )
