"""Scores and pictures to every logger of the Trainer, and to the run folder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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
        in_bar: Scores whose means over labels stand in the progress bar.
    """

    def __init__(
        self,
        first_method: str,
        name: str | None,
        every_n_epochs: int,
        max_label_keys: int,
        in_bar: Sequence[str] = (),
    ) -> None:
        if every_n_epochs < 0:
            raise InputError(f"every_n_epochs= expects 0 (never) or more, got {every_n_epochs}")
        self.first_method, self.name = first_method, name
        self.every_n_epochs, self.max_label_keys = every_n_epochs, max_label_keys
        self.in_bar = frozenset(in_bar)
        self.run_dir: RunDir | None = None
        self._run_id: str | None = None
        self._root: str | None = None
        self._sinks: list[Sink] | None = None
        self._scale: dict[str, float] = {}
        self._due_at: int | None = None

    def setup(self, trainer: Any, stage: str) -> None:
        """A fit is a run of its own, unless a checkpoint says which one goes on; validate and test join it."""
        if stage == "fit":
            self._run_id, self._scale, self._due_at = None, {}, None
        self.run_dir, self._sinks = None, None
        # `log_dir` is a broadcast: every process must ask for it.
        self._root = str(trainer.log_dir or trainer.default_root_dir)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: which run this is, and its colour scale per method."""
        return {"run_id": self._run_id, "scale": dict(self._scale)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with an earlier run, as far as it had begun."""
        self._run_id = state.get("run_id") or self._run_id
        self._scale = dict(state.get("scale") or self._scale)

    def due(self, trainer: Any) -> bool:
        """Is this a pass with pictures? Once in every n epochs of a fit, always otherwise; the same on every process.

        The first validation of epochs 0 ... n - 1, of n ... 2 n - 1, and so on: where only every second epoch is
        validated, multiples of n may never be.
        """
        n, epoch, last = self.every_n_epochs, int(trainer.current_epoch), self._due_at
        if not n or trainer.state.fn != "fit" or trainer.sanity_checking:
            return bool(n)
        if last is not None and last != epoch and last // n == epoch // n:
            return False
        self._due_at = epoch
        return True

    def draws(self, trainer: Any) -> bool:
        """Are there pictures to be made of this pass? On rank zero, where they are due."""
        if trainer.fast_dev_run or trainer.sanity_checking or not trainer.is_global_zero:
            return False
        return self.due(trainer)

    def log_scores(self, trainer: Any, pl_module: Any, split: str, scores: Sequence[Score], labels: int) -> None:
        """Hand the scores to Lightning: loggers, `callback_metrics`, `monitor=`.

        Raises:
            InputError: The module has logged one of the keys.
        """
        keys = [score.key(split, self.first_method, self.name) for score in scores]
        refuse_taken(trainer, keys)
        quiet: dict[str, Tensor] = {}
        for key, score in zip(keys, scores, strict=True):
            if score.label is not None and labels > self.max_label_keys:
                # Not thousands of charts: the loggers get one table. Lightning's own record of so many keys would take
                # longer than all scores together, and a collective for each of them.
                quiet[key] = torch.tensor(score.value, dtype=torch.float32, device=pl_module.device)
                continue
            # All processes have the same value; without sync_dist Lightning warns once per key.
            in_bar = score.label is None and score.heading(self.first_method) in self.in_bar
            pl_module.log(key, score.value, batch_size=1, sync_dist=True, prog_bar=in_bar)
        trainer.callback_metrics.update(quiet)

    def check_clashes(self, trainer: Any, scores: Mapping[str, Sequence[Score]]) -> None:
        """Lightning silently averages two values that were logged under one key: find out and say so.

        Raises:
            InputError: A value under one of our keys is not the one that was logged.
        """
        seen = trainer.callback_metrics  # asked once: Lightning computes all of them anew each time
        for split, rows in scores.items():
            for score in rows:
                key = score.key(split, self.first_method, self.name)
                found = seen.get(key)
                # callback_metrics are float32.
                if found is not None and abs(float(found) - score.value) > 1e-4 * max(1.0, abs(score.value)):
                    raise InputError(_clash(key))

    def write(
        self,
        trainer: Any,
        scores: Mapping[str, Sequence[Score]],
        entries: Mapping[str, Sequence[PanelEntry]],
        names: Sequence[str],
    ) -> None:
        """Run folder, tables and pictures; rank zero only, nothing under `fast_dev_run`.

        Args:
            trainer: The Trainer.
            scores: Split -> scores.
            entries: Split -> what to draw of it.
            names: Label names.
        """
        if not trainer.is_global_zero or trainer.fast_dev_run or not scores:
            return
        if self.run_dir is None or self._sinks is None:
            self.run_dir = RunDir(self._root or ".", self._run_id)
            self._run_id = self.run_dir.id
            self._sinks = sinks_for(trainer.loggers, self.run_dir)
        epoch, step = int(trainer.current_epoch), int(trainer.global_step)
        self.run_dir.write_scores(_rows(scores, epoch, step))
        for split, rows in scores.items():
            if len(names) > self.max_label_keys:
                self._table(self._sinks, split, rows, names, step)
        if drawn := {split: listed for split, listed in entries.items() if listed}:
            self._pictures(self.run_dir, self._sinks, drawn, epoch, step)

    def _table(
        self, sinks: Iterable[Sink], split: str, scores: Sequence[Score], names: Sequence[str], step: int
    ) -> None:
        values = {(s.label, s.heading(self.first_method)): s.value for s in scores if s.label}
        columns = list(dict.fromkeys(heading for _, heading in values))
        rows = [[label, *(values.get((label, column)) for column in columns)] for label in names]
        for sink in sinks:
            sink.table(_key(split, self.name, "scores"), ["label", *columns], rows, step)

    def _pictures(
        self,
        run_dir: RunDir,
        sinks: Iterable[Sink],
        entries: Mapping[str, Sequence[PanelEntry]],
        epoch: int,
        step: int,
    ) -> None:
        # One colour scale per method (Grad-CAM behind a flatten head is a hundredth of HiResCAM), in powers of two. It
        # only grows: a scale fixed on the maps of an untrained net would show nothing but saturated colours later.
        every = [entry for listed in entries.values() for entry in listed]
        for method in every[0].maps if every else ():
            needed = shared_scale(entry.maps[method] for entry in every)
            self._scale[method] = max(self._scale.get(method, 0.0), 2.0 ** math.ceil(math.log2(needed)))
        for split, listed in entries.items():
            for label in dict.fromkeys(entry.label for entry in listed):
                chosen = [entry for entry in listed if entry.label == label]
                pictures = [entry.draw(self._scale) for entry in chosen]
                captions, names = [e.caption for e in chosen], [f"{e.case}_{e.label}" for e in chosen]
                for sink in sinks:
                    sink.images(_key(split, self.name, "attention", label), pictures, captions, step, epoch, names)
        cases = [
            {"split": split, "case": e.case, "label": e.label, "present": e.present}
            for split, listed in entries.items()
            for e in listed
        ]
        known = run_dir.read_panel() or {}
        kept = [case for case in known.get("cases", []) if case.get("split") not in entries]
        run_dir.write_panel({"scale": dict(self._scale), "cases": kept + cases})


def _key(*parts: str | None) -> str:
    return "/".join(part for part in parts if part)


def _rows(scores: Mapping[str, Sequence[Score]], epoch: int, step: int) -> list[Row]:
    return [
        Row(epoch, step, split, s.method or "", s.label or "mean", s.measure, s.value)
        for split, rows in scores.items()
        for s in rows
    ]


def refuse_taken(trainer: Any, keys: Sequence[str]) -> None:
    """Stop when somebody has logged one of our keys in this epoch.

    Raises:
        InputError: Somebody has.
    """
    # What is left of an earlier epoch, ours too, is marked as reset; of several loaders each has a suffix of its own.
    entries = [e for e in (getattr(trainer, "_results", None) or {}).values() if not getattr(e, "has_reset", True)]
    taken = {e.meta.name for e in entries if e.meta.dataloader_idx is None or not e.meta.add_dataloader_idx}
    for key in keys:
        if key in taken:
            raise InputError(_clash(key))


def _clash(key: str) -> str:
    return (
        f"{key!r} is logged by camtrain and by somebody else (the module, or a second callback), and Lightning "
        "averages the two: log yours under another key, or give this callback a name= of its own"
    )
