"""Scores and pictures to every logger of the Trainer, and to the run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.callbacks._last_pass import comes_last
from camtrain.callbacks._nifti import NiftiMaps
from camtrain.callbacks._outlets import Opening, Outlets, bring_run
from camtrain.callbacks._panel import PanelEntry
from camtrain.callbacks._past_maps import PastMaps
from camtrain.callbacks._pictures import publish_pictures
from camtrain.callbacks._scores import MEASURES, Score
from camtrain.reporting import Patience, RunDir
from camtrain.reporting import Score as Row
from camtrain.reporting.alarm_log import AlarmEvent
from camtrain.reporting.opening import wandb_runs
from camtrain.reporting.run_dir import MEAN

# Measures whose curves per label, of the first method, are worth a chart each; the others are logged too, and can be
# put into any chart.
_CHARTED = ("auroc", "organ_iou", "energy_inside")
# Measures that are not of attention and that `LitClassifier(scores=...)` and many modules log themselves, per patient
# or with bins of their own: theirs is the logged one then, ours stands in the run folder only.
_YIELDING = ("auprc", "calibration_error")


class Publisher:
    """Where the numbers and pictures of one monitor go.

    Args:
        first_method: The method with the plain keys.
        name: Name of the monitor, part of the keys.
        every_n_epochs: Pictures every so many epochs, 0 = never.
        max_label_keys: Above so many labels the loggers get one table instead of a chart per label.
        facts: Gives, of Trainer and log folder, what a logger keeps as config, the organ table as plain values or
            None, and what gives all that is known of the run.
        wandb_budget: Bytes per pass for W&B.
        nifti: Which maps become NIfTI files.
        in_bar: Scores whose means over labels stand in the progress bar.
    """

    def __init__(
        self,
        first_method: str,
        name: str | None,
        every_n_epochs: int,
        max_label_keys: int,
        facts: Callable[[Any, str], tuple[dict[str, Any], dict[str, Any] | None, Callable[[], dict[str, Any]]]],
        wandb_budget: int,
        nifti: NiftiMaps,
        in_bar: Sequence[str] = (),
    ) -> None:
        if every_n_epochs < 0:
            raise InputError(f"every_n_epochs= expects 0 (never) or more, got {every_n_epochs}")
        if wandb_budget < 0:
            raise InputError(
                f"wandb_budget_mb= expects 0 (no single case) or more megabytes, got {wandb_budget / 1e6:g}"
            )
        self.first_method, self.name = first_method, name
        self.every_n_epochs, self.max_label_keys = every_n_epochs, max_label_keys
        self.in_bar = frozenset(in_bar)
        self._facts, self._wandb_budget, self._nifti = facts, wandb_budget, nifti
        self._run_id: str | None = None
        self._root: str | None = None
        self._earlier: str | None = None
        self._wandb: list[str] = []
        self._outlets: Outlets | None = None
        self._opening = Opening()
        self._introduced: list[int] = []
        self._scale: dict[str, float] = {}
        self._past = PastMaps()
        self._best: dict[str, float] = {}
        self._due = False
        self._due_at: int | None = None
        self._moment: tuple[int, int] | None = None
        self._loaded: tuple[int, int] | None = None
        self._stands: tuple[int, int] | None = None
        self._left: dict[str, set[str]] = {}

    @property
    def run_dir(self) -> RunDir | None:
        """The run's folder, once something was written."""
        return self._outlets.run_dir if self._outlets is not None else None

    @property
    def files(self) -> Patience | None:
        """What every write to the run's folder goes through."""
        return self._outlets.files if self._outlets is not None else None

    def setup(self, trainer: Any, stage: str) -> None:
        """A fit is a run of its own, unless a checkpoint says which one goes on; validate and test join it."""
        if stage == "fit":
            self._earlier = None
            self._run_id, self._scale, self._best, self._due_at, self._introduced = None, {}, {}, None, []
            self._moment = None
            self._past, self._wandb = PastMaps(), []
        self._outlets, self._opening, self._loaded, self._stands = None, Opening(), None, None
        # `log_dir` is a broadcast: every process must ask for it.
        self._root = str(trainer.log_dir or trainer.default_root_dir)

    def close(self) -> None:
        """The fit, validation or test is over."""
        if self._outlets is not None:
            self._outlets.close()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: which run and where, also in W&B, scales, best scores, last pictures, past maps."""
        where = self._earlier if self._root is None else str(Path(self._root).absolute())
        kept = {"run_id": self._run_id, "root": where, "wandb": list(self._wandb), "drawn": self._due_at}
        moment = None if self._moment is None else list(self._moment)
        drawn = {"moment": moment, "scale": dict(self._scale), "past": self._past.state()}
        return {**kept, **drawn, "best": dict(self._best)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with an earlier run, as far as it had begun."""
        self._run_id = state.get("run_id") or self._run_id
        self._earlier = state.get("root")
        self._wandb = list(state.get("wandb") or [])
        # An earlier checkpoint, looked at behind a fit, does not take its scale back.
        self._scale |= {m: max(end, self._scale.get(m, 0.0)) for m, end in (state.get("scale") or {}).items()}
        self._best = dict(state.get("best") or self._best)
        self._due_at = state.get("drawn", self._due_at)
        self._past = PastMaps()
        if "past" in state:
            self._past.load(state["past"])
        moment = state.get("moment")
        self._moment = None if moment is None else (int(moment[0]), int(moment[1]))

    def loads(self, epoch: int, step: int) -> None:
        """A checkpoint is loaded, of this epoch and step; its state comes next."""
        self._loaded = epoch, step

    def moment(self, trainer: Any) -> tuple[int, int]:
        """Epoch and step that a pass stands for: outside a fit those of the checkpoint, where one was loaded.

        A Trainer that validates a checkpoint counts from 0, and would take the place of the fit's first epoch. One that
        was saved between two validations is none of the fit's passes: it gets an epoch of which nothing is there yet.
        """
        if trainer.state.fn == "fit" or self._loaded is None:
            return int(trainer.current_epoch), int(trainer.global_step)
        if self._stands is None:
            epoch, step = self._loaded
            self._stands = self._moment if self._moment is not None and self._moment[1] == step else None
            while self._stands is None:
                taken = self.run_dir is not None and self.run_dir.epoch_path(epoch).exists()
                self._stands, epoch = None if taken else (epoch, step), epoch + 1
        return self._stands

    def begin(self, trainer: Any) -> bool:
        """A pass begins: is it one with pictures? Always outside of a fit; the same on every process.

        In a fit once in every n epochs: in the first validation of epochs 0 ... n - 1, of n ... 2 n - 1, and so on, for
        where only every second epoch is validated, multiples of n may never be. And in the last validation of all,
        where max_epochs says which that is; the other validations of its epoch make none, but for the first one of all,
        for max_steps or early stopping may end the fit before.
        """
        n, epoch, last = self.every_n_epochs, int(trainer.current_epoch), self._due_at
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._moment = self.moment(trainer)
        if not n or trainer.state.fn != "fit" or trainer.sanity_checking:
            self._due = bool(n)
            return self._due
        ends = comes_last(trainer)
        self._due = (last is None or last // n != epoch // n) if ends is None or last is None else ends
        if self._due:
            self._due_at = epoch
        return self._due

    def draws(self, trainer: Any) -> bool:
        """Are there pictures to be made of this pass? On rank zero, where they are due."""
        return self._due and trainer.is_global_zero and not trainer.fast_dev_run and not trainer.sanity_checking

    def log_scores(self, trainer: Any, pl_module: Any, split: str, scores: Sequence[Score], labels: int) -> None:
        """Hand the scores to Lightning: loggers, `callback_metrics`, `monitor=`.

        Raises:
            InputError: The module has logged one of the keys.
        """
        taken = _taken(trainer)
        left = {s.measure for s in scores if s.measure in _YIELDING and self._key(s, split) in taken}
        self._left[split] = left
        scores = [score for score in scores if score.measure not in left]
        keys = [self._key(score, split) for score in scores]
        refuse_taken(trainer, keys)
        self._announce(trainer, keys, scores, labels)
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

    def _key(self, score: Score, split: str) -> str:
        return score.key(split, self.first_method, self.name)

    def _announce(self, trainer: Any, keys: Sequence[str], scores: Sequence[Score], labels: int) -> None:
        """Before the loggers see them: which scores get a chart, and which are the best so far."""
        if (outlets := self._opened(trainer)) is None:
            return
        shown = [
            (key, score)
            for key, score in zip(keys, scores, strict=True)
            if score.label is None or labels <= self.max_label_keys
        ]
        outlets.define({key: score.label is None or self._charted(score) for key, score in shown})
        if trainer.state.fn != "fit":
            return
        for key, score in shown:
            if (more := MEASURES.get(score.measure.removesuffix("_micro"))) is not None:
                best = self._best.get(key, score.value)
                self._best[key] = max(best, score.value) if more else min(best, score.value)
        outlets.send("summary", {f"best/{key}": self._best[key] for key, _ in shown if key in self._best})

    def _charted(self, score: Score) -> bool:
        """Of one label: a chart of its own, or one among the many that can be asked for?"""
        return score.measure in _CHARTED and score.heading(self.first_method) == score.measure

    def _opened(self, trainer: Any) -> Outlets | None:
        """Folder and sinks, made when they are first needed; None where nothing may be written."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return None
        if self._outlets is None:
            if self._earlier is not None and self._run_id is not None:
                bring_run(Path(self._earlier), Path(self._root or "."), self._run_id)
            self._outlets = self._opening(self._root or ".", self._run_id, trainer.loggers, self._wandb_budget)
            if self._outlets is not None:
                self._run_id = self._outlets.run_dir.id
                self._wandb = wandb_runs(trainer.loggers)
                if self._introduced != (loggers := [id(logger) for logger in trainer.loggers]):
                    self._introduced = loggers
                    self._outlets.send("about", *self._facts(trainer, self._root or "."))
        return self._outlets

    def write_alarms(self, events: Sequence[AlarmEvent]) -> None:
        """Rows of `alarms.csv`, where anything is written at all."""
        if self._outlets is not None:
            self._outlets.alarms.add(events)

    def check_clashes(self, trainer: Any, scores: Mapping[str, Sequence[Score]]) -> None:
        """Lightning silently averages two values that were logged under one key: find out and say so.

        Raises:
            InputError: A value under one of our keys is not the one that was logged.
        """
        seen = trainer.callback_metrics  # asked once: Lightning computes all of them anew each time
        for split, rows in scores.items():
            for score in rows:
                key = self._key(score, split)
                found = None if score.measure in self._left.get(split, ()) else seen.get(key)
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
        outlets = self._opened(trainer) if scores else None
        if outlets is None:
            return
        (epoch, step), fitting = self.moment(trainer), trainer.state.fn == "fit"
        outlets.scores.add(_rows(scores, epoch, step))
        for split, rows in scores.items():
            if len(names) > self.max_label_keys:
                self._table(outlets, split, rows, names, step)
        if drawn := {split: listed for split, listed in entries.items() if listed}:
            how = self._scale, self._past, self.name, epoch, step, fitting
            outlets.drawing(publish_pictures, outlets, drawn, *how)
            if self._nifti.due(epoch):
                outlets.nifti(self._nifti, drawn, epoch)
        outlets.send("flush", step)

    def _table(self, outlets: Outlets, split: str, scores: Sequence[Score], names: Sequence[str], step: int) -> None:
        values = {(s.label, s.heading(self.first_method)): s.value for s in scores if s.label}
        columns = list(dict.fromkeys(heading for _, heading in values))
        rows = [[label, *(values.get((label, column)) for column in columns)] for label in names]
        outlets.send("table", "/".join(p for p in (split, self.name, "scores") if p), ["label", *columns], rows, step)


def _rows(scores: Mapping[str, Sequence[Score]], epoch: int, step: int) -> list[Row]:
    return [
        Row(epoch, step, split, s.method or "", s.label or MEAN, s.measure, s.value)
        for split, rows in scores.items()
        for s in rows
    ]


def refuse_taken(trainer: Any, keys: Sequence[str]) -> None:
    """Stop when somebody has logged one of our keys in this epoch.

    Raises:
        InputError: Somebody has.
    """
    taken = _taken(trainer)
    for key in keys:
        if key in taken:
            raise InputError(_clash(key))


def _taken(trainer: Any) -> set[str]:
    """Keys that somebody has logged in this epoch."""
    # What is left of an earlier epoch, ours too, is marked as reset; of several loaders each has a suffix of its own.
    entries = [e for e in (getattr(trainer, "_results", None) or {}).values() if not getattr(e, "has_reset", True)]
    return {e.meta.name for e in entries if e.meta.dataloader_idx is None or not e.meta.add_dataloader_idx}


def _clash(key: str) -> str:
    return (
        f"{key!r} is logged by camtrain and by somebody else (the module, or a second callback), and Lightning "
        "averages the two: log yours under another key, or give this callback a name= of its own"
    )
