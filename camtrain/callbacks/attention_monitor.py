"""AttentionMonitor: every epoch, where does the network look, per label?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from camtrain._batch import Adapter
from camtrain._lightning import Callback
from camtrain.callbacks._after_fit import print_need
from camtrain.callbacks._alarms import Alarms
from camtrain.callbacks._case_scores import scored
from camtrain.callbacks._context import RunContext
from camtrain.callbacks._engines import refuse_engine
from camtrain.callbacks._layers import check_layers, new_watch
from camtrain.callbacks._logger_guard import LoggerGuard, OpensLoggers
from camtrain.callbacks._lot import Counting, Lot
from camtrain.callbacks._map_budget import MapBudget
from camtrain.callbacks._methods import read_methods, refuse_never
from camtrain.callbacks._nifti import NiftiMaps
from camtrain.callbacks._panel import Panel
from camtrain.callbacks._publish import Publisher
from camtrain.callbacks._recording import Recorder
from camtrain.callbacks._relief import SCORES, WRITTEN, Relief
from camtrain.callbacks._run_facts import monitor_facts
from camtrain.callbacks._scores import Score, ScoreBook, warn_of_thresholds
from camtrain.callbacks._settings import given
from camtrain.callbacks._splits import HOOKS, Repeats, split_name
from camtrain.callbacks._step_maps import StepMaps
from camtrain.callbacks._steps import WrappedStep, batch_of
from camtrain.cam.asked import Asked
from camtrain.cam.engine import Reshape
from camtrain.cam.watch import LogitsFrom, ModuleWatch


class AttentionMonitor(Callback):
    """Scores attention maps against organs in every validation and test epoch, and draws a fixed panel of cases.

    Works on an unmodified module. Scores add no forward: hooks on layers and the modules around them see the user's own
    validation step, also under inference mode. Maps are made of present labels only; of several layers their mean.

    Methods beyond the gradient family (`scorecam`, `relevancecam`, `lrp`, `guided_backprop`, `guided_gradcam`) are paid
    for with forwards of their own, in eval mode, of the module that the step called, of samples that have a present
    label. They are scored only where pictures are due (`every_n_epochs`, the last epoch), and in the sanity check, so
    that what cannot work shows before an epoch is spent. Their keys are new in those epochs only: no `monitor=`.

    Logged every epoch (usable as `monitor=`): `<split>/<score>` as mean over labels and `<split>/<score>/<label>`, for
    the scores auroc, auprc and calibration_error (the latter two only where the module logs none of its own),
    organ_iou, energy_inside, pointing_game, mask_iou, relevance_rank, empty_map_rate, class_sensitivity (among the
    present labels of a case), sum_to_score_l1 and bias_share (of a single layer), with `organ_iou_micro` (the paper's
    mean over cases and labels) and `energy_inside_chance`; methods after the first as `<split>/<score>@<method>`, and
    `<split>/alarm/<name>`: for how many labels an alarm is raised. OrganIoU thresholds are chosen on validation every
    epoch (of paid methods: whenever scored) and frozen for test, and in a checkpoint. Undefined scores are left out.

    Pictures go every `every_n_epochs` to every logger of the Trainer and to the run folder
    `<trainer.log_dir or default_root_dir>/camtrain/<run id>`, with `scores.csv`, `cases.csv` (docs/loggers.md) and
    `report.html`, one file that shows all of it (docs/report.md). The first scored pass chooses the cases.

    Args:
        layer: Tapped layer: dotted name, module, or None for the last feature map; or a list of them.
        table: `OrganTable`, path, shipped name, mapping with the sections of the YAML, or None for the data module's;
            without any, only pictures and the scores that need no organs.
        methods: Attention methods, by name or as a dict of `name` and options (`{"name": "scorecam", "channels": 16}`).
            The first has the plain keys, and must be of the gradient family. A method whose maps are on another grid
            (guided: the image's) is compared with the regions on that grid.
        every_n_epochs: Draw pictures and score paid methods once in so many epochs, and in the last one of `max_epochs`
            (0 = never). Scores of the others are computed every epoch.
        panel_cases: Cases of the panel; a quarter are hard ones, one is a negative.
        labels_per_case: Labels drawn of each positive case, as far as so many are present.
        max_label_keys: Up to so many labels the per-label scores go to the loggers one by one; beyond, as one table.
        mode: How regions come down to the map's grid: "fill", "nearest", "trilinear", "any".
        keys: Contract word -> key in the user's batch.
        adapter: Callable that makes a dict with the contract's words of the batch.
        logits: Where the logits are: None = output of the smallest module around the layer; a module's dotted name;
            or a callable that picks (B, L) from the model's output.
        reshape: Linear callable that makes (B, K, *S') of the layer's output.
        names: Label names in the order of the outputs.
        name: Tells two monitors apart; part of the keys.
        call: Which call of the layer counts, where one step runs it several times.
        report: Keep the panel's raw maps and write `report.html` into the run folder, rewritten every epoch. Once in a
            fit this runs one case again, to find what share of the image a cell has seen.
        alarms: Which alarms watch the validations of a fit (docs/alarms.md): None = all, [] = none; names, or dicts of
            `name` and options (`{"name": "reliance", "threshold": 0.4}`). `reliance` and `depth` ask the network about
            32 fixed cases every second epoch, with forwards of their own, in eval mode.
        stop_on: Alarms that end the training when they are raised.
        in_bar: Scores whose means stand in the progress bar, as `<score>` or `<score>@<method>`.
        table_after_fit: Print a table of the labels, the neediest first, when a fit ends (`camtrain fit` always does).
        wandb_budget_mb: Megabytes of pictures and case rows that W&B gets per pass; 0: nothing about single cases.
        nifti_cases: Maps as NIfTI files in the scan's geometry: of so many cases of the panel, or of the cases with
            these names, which then join the panel.
        nifti_epochs: Only in these epochs; None: in every pass with pictures.
        guard_loggers: A logger that fails (disk, network, service) gives one warning instead of ending the run.
        map_budget: Backward passes for maps (docs/loggers.md says where) may take so much of a validation's forwards;
            beyond, some present labels are not scored, the same each time: `<split>/scored_share`. None = score all.

    Raises:
        InputError: Unknown layer, method or option, batches that break the contract, a key that the module logs too.

    Example:
        >>> AttentionMonitor(layer="layer4", methods=["hirescam", "gradcam"]).methods
        ['hirescam', 'gradcam']
    """

    log = OpensLoggers()

    def __init__(
        self,
        layer: str | list[str] | None = None,
        table: Any = None,  # OrganTable | str | Path | Mapping | None; a union makes jsonargparse open the file itself
        methods: Sequence[str | dict[str, Any]] = ("hirescam",),
        every_n_epochs: int = 1,
        panel_cases: int = 6,
        labels_per_case: int = 2,
        max_label_keys: int = 20,
        mode: str = "fill",
        keys: Mapping[str, str] | None = None,
        adapter: Adapter | None = None,
        logits: LogitsFrom = None,
        reshape: Reshape | None = None,
        names: Sequence[str] | None = None,
        name: str | None = None,
        call: int | None = None,
        report: bool = True,
        alarms: Sequence[str | dict[str, Any]] | None = None,
        stop_on: Sequence[str] = (),
        in_bar: Sequence[str] = ("organ_iou", "energy_inside"),
        table_after_fit: bool = False,
        wandb_budget_mb: float = 8.0,
        nifti_cases: int | list[str] = 0,
        nifti_epochs: list[int] | None = None,
        guard_loggers: bool = True,
        map_budget: float | None = 0.03,
    ) -> None:
        self.given = given(locals())
        self._asked = read_methods(methods)
        self.methods = [asked.name for asked in self._asked]
        refuse_never(self._asked, every_n_epochs)
        self.layer, self.name, self.call, self.logits, self.reshape = layer, name, call, logits, reshape
        self.context = RunContext(table, keys, adapter, names, mode)
        self.recorder = Recorder(self.context, panel_cases) if report else None
        nifti, budget = NiftiMaps(nifti_cases, nifti_epochs), round(wandb_budget_mb * 1e6)
        facts = partial(monitor_facts, self.context, layer, self._asked, name)
        self.publisher = Publisher(self.methods[0], name, every_n_epochs, max_label_keys, facts, budget, nifti, in_bar)
        self.guard_loggers = guard_loggers
        self._guard: LoggerGuard | None = None
        self.alarms = Alarms(alarms, stop_on, self._asked[0], reshape)
        self.table_after_fit = table_after_fit
        self.scores, self.thresholds = dict[str, list[Score]](), dict[str, Tensor]()
        self._limits: dict[str, dict[str, Tensor]] = {}
        self.panels = defaultdict[str, Panel](partial(Panel, panel_cases, labels_per_case, nifti.named, nifti.number))
        self._books: dict[str, ScoreBook] = {}
        self._repeats, self.relief, self._at, self.budget = Repeats(), Relief(), (0, 0), MapBudget(map_budget)
        self._due, self._wrapped = list[Asked](), list[WrappedStep]()
        self._watch: ModuleWatch | None = None

    @property
    def state_key(self) -> str:
        """Two names, two states."""
        return f"{type(self).__qualname__}[{self.name or ''}]"

    def state_dict(self) -> dict[str, Any]:
        """Thresholds, the panel and its past maps, where the run writes; plain values, for `weights_only`."""
        panels = {split: panel.state() for split, panel in self.panels.items() if panel.complete}
        shown = [] if self.recorder is None else self.recorder.state()
        kept = {"thresholds": dict(self.thresholds), "panels": panels, "shown": shown, "alarms": self.alarms.state()}
        return {**kept, **self.publisher.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue an earlier run."""
        self.thresholds = dict(state_dict.get("thresholds", {}))
        for split, state in state_dict.get("panels", {}).items():
            self.panels[split].load(state)
        self.alarms.load(state_dict.get("alarms", {}))
        if self.recorder is not None:
            self.recorder.load(state_dict.get("shown", []))
        self.publisher.load(state_dict)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Know what is loaded: a Trainer that only validates counts from 0."""
        self.publisher.loads(int(checkpoint.get("epoch", 0)), int(checkpoint.get("global_step", 0)))

    # Lightning's hooks ------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check layer and table before anything is computed, then hook into the evaluation steps."""
        self._stop()
        if stage not in HOOKS:
            return
        refuse_engine(trainer, "AttentionMonitor")
        self.relief.start()
        self.context.setup(trainer)
        check_layers(pl_module, self.layer, self.logits)
        if stage == "fit":
            self.panels.clear()
            self.alarms.setup()
            if self.recorder is not None:
                self.recorder.start()
        self.publisher.setup(trainer, stage)
        self._guard = LoggerGuard(trainer.loggers) if self.guard_loggers else None
        step, end = HOOKS[stage]
        self._wrapped = [
            WrappedStep(pl_module, step, partial(self._step, trainer, pl_module)),
            WrappedStep(pl_module, end, partial(self._finish, trainer, pl_module)),
        ]

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave no hook behind, and no table that a server would take."""
        self.publisher.close()
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave no hook behind, also after an exception in the middle of a forward."""
        self._stop()

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count."""
        self._begin(trainer)

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Know where we are; the step itself need not be told."""
        self._at = (batch_idx, dataloader_idx)

    on_test_batch_start = on_validation_batch_start

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw, and see whether somebody else logged under our keys."""
        self._close(trainer)

    on_test_end = on_validation_end

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """The table of the labels, where it is wanted."""
        if self.table_after_fit and trainer.is_global_zero and "val" in self.scores:
            print_need(self.scores["val"], self.methods[0], self.alarms, self.publisher.run_dir)

    def _begin(self, trainer: Any) -> None:
        due = self.publisher.begin(trainer)
        self._due = [asked for asked in self._asked if due or not asked.paid]
        with torch.inference_mode(False):
            for book in self._books.values():
                book.reset()
        self._repeats.begin()
        self.budget.begin()
        self.alarms.begin(trainer)
        for panel in self.panels.values():
            panel.begin()
        if self.recorder is not None:
            self.recorder.begin()

    def _stop(self) -> None:
        for wrapped in self._wrapped:
            wrapped.undo()
        self._wrapped.clear()
        if self._guard is not None:
            self._guard.stop()
            self._guard = None
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        self._books.clear()
        self.alarms.questions.drop()
        for panel in self.panels.values():
            panel.begin()

    def _step(self, trainer: Any, pl_module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One evaluation step: the user's, watched; what it returns is not touched."""
        batch = batch_of(args, kwargs)
        if self.relief.blind:
            return self._blindly(trainer, pl_module, batch, partial(original, *args, **kwargs))
        watch = self._watching(trainer, pl_module, batch)
        watch.start(not self._rests(trainer, watch, batch), self.alarms.questions.due)
        try:
            with self.relief.watching(partial(self._unfinished, trainer, watch)) as ended, self.budget.counting(watch):
                output = original(*args, **kwargs)
            if ended:
                self.relief.entry = watch.entry
                watch.stop()
                return self._blindly(trainer, pl_module, batch, partial(original, *args, **kwargs))
            with self.relief.counting(partial(self._unfinished, trainer)):
                sources, logits = watch.take_all(self.context.outputs, self.context.expected(trainer, pl_module))
                names = self.context.resolve(trainer, pl_module, logits.shape[1])
                made = StepMaps(self._due, watch, sources, logits, self.reshape)
                self._count(trainer, batch, made, logits.detach(), names)
        finally:
            watch.stop()
        return output

    def _blindly(self, trainer: Any, pl_module: Any, batch: Any, step: Callable[[], Any]) -> Any:
        """The step without a watch; what the network gives is scored all the same."""
        with self.relief.outputs(self.context.expected(trainer, pl_module)) as given:
            output = step()
        with self.relief.counting(partial(self._unfinished, trainer)):
            for logits in given[-1:]:
                names = self.context.resolve(trainer, pl_module, logits.shape[1])
                words = self.context.read(batch, len(names))
                if words.label is not None:
                    label = self._repeats.unknown(trainer, words.label.to(logits.device), words.ids, *self._at)
                    self._open_book(trainer, names, logits.device).update_logits(logits, label)
        return output

    def _unfinished(self, trainer: Any, watch: ModuleWatch | None = None) -> bool:
        """May the step be run again, or left out? Processes count together, also one with nothing: it needs a book."""
        inside, split = watch is None or watch.inside, split_name(trainer, self._at[1])
        return inside and (trainer.world_size == 1 or split in self._books)

    def _watching(self, trainer: Any, pl_module: nn.Module, batch: Any) -> ModuleWatch:
        image = partial(self.context.image, batch)
        self._watch = self._watch or new_watch(trainer, pl_module, self.layer, image, self.logits, self.call)
        return self._watch

    def _draws(self, trainer: Any) -> bool:
        return self.publisher.draws(trainer) and self.relief.draws

    def _rests(self, trainer: Any, watch: ModuleWatch, batch: Any) -> bool:
        """Is there no map to be made of this batch, neither within the budget nor for a picture?"""
        label, cases = self.context.ahead(batch, self._at[0]) if self.budget.paces(watch) else (None, [])
        if self.budget.plan(trainer, label, self._at[1]) != 0:
            return not self.relief.maps
        return not (self._draws(trainer) and self.panels[split_name(trainer, self._at[1])].may_draw(cases))

    def _count(self, trainer: Any, batch: Any, step: StepMaps, logits: Tensor, names: list[str]) -> None:
        book = self._open_book(trainer, names, logits.device)
        words, given = self.context.labelled(batch, len(names), "AttentionMonitor")
        label = self._repeats.unknown(trainer, given.to(logits.device), words.ids, *self._at)
        book.update_logits(logits, label)
        segmented, split = self.context.segmented(words).to(logits.device), split_name(trainer, self._at[1])
        cases, drawn = words.names(self._at[0]), dict[int, list[int]]()
        if self._draws(trainer):
            drawn = self.panels[split].wanted(cases, label, segmented, logits.float().sigmoid())
        recorded = self.recorder.wanted(split, drawn, cases, label, logits) if self.recorder and drawn else None
        self.alarms.questions.collect(step.watch, words, logits, label, segmented, cases, self._at[1])
        within = self.budget.within(trainer, step, given, (label == 1) & segmented[:, None], self._at[1], book)
        panel, kind = self.panels.get(split), "sanity" if trainer.sanity_checking else trainer.state.fn
        if step.watch.graph:
            lot = Lot(words, logits, label, within, segmented, cases, drawn, recorded)
            made = Counting(self.context, step, book, panel, self.recorder, split, names, kind, self._at[0] == 0)
            self.relief.through(lot, book, made)

    def _open_book(self, trainer: Any, names: list[str], device: torch.device) -> ScoreBook:
        """Validation chooses thresholds on its own cases, each loader for itself; test takes those of `val`."""
        split = split_name(trainer, self._at[1])
        if split in self._books:
            return self._books[split]
        frozen = self.thresholds if trainer.testing else None
        if trainer.testing and self.context.has_table:
            warn_of_thresholds(split, [asked.name for asked in self._due], self.thresholds)
        one_layer = not isinstance(self.layer, list | tuple)
        self._books[split] = ScoreBook(names, self.methods, self.context.has_table, device, frozen, one_layer)
        return self._books[split]

    def _finish(self, trainer: Any, pl_module: Any, original: Callable[..., Any]) -> Any:
        """Log the scores, but not those of the sanity check, which has seen a batch or two.

        After the module's own end of the epoch: what it has logged by then can be looked at, while a key of ours that
        it logged later would end in an error of Lightning's which speaks of two calls to a user who made one.
        """
        output = original()
        if trainer.sanity_checking:
            return output
        with torch.inference_mode(False):
            due, alone, self._limits = [asked.name for asked in self._due], trainer.world_size == 1, {}
            self.scores, counts = self.relief.summed(self._books, due, alone), dict[str, list[Score]]()
            with self.relief.sparing(SCORES, alone):
                if "val" in self.scores:
                    self.scores["val"] += self.alarms.questions.measure(trainer, self.context, pl_module.device)
                counts |= {s: self.alarms.judge(trainer, s, self.scores[s], self._books[s]) for s in self.scores}
                self._limits = {split: book.thresholds(due) for split, book in self._books.items()}
                if "val" in self._books:
                    kept = {method: each for method, each in self.thresholds.items() if method in self.methods}
                    self.thresholds = kept | self._limits["val"]
        for split, scores in self.scores.items():
            labels = len(self.context.names or [])
            self.publisher.log_scores(trainer, pl_module, split, [*scores, *counts.get(split, [])], labels)
        return output

    def _close(self, trainer: Any) -> None:
        if trainer.sanity_checking:
            return
        self.publisher.check_clashes(trainer, self.scores)
        names = self.context.names or []
        with self.relief.sparing(WRITTEN):
            entries = {s: scored(panel.entries, self._limits.get(s, {}), names) for s, panel in self.panels.items()}
            self.publisher.write(trainer, self.scores, entries, names)
            self.alarms.publish(trainer, self.publisher.write_alarms, self.name)
            if self.recorder is not None:
                shown = {split: {entry.case for entry in listed} for split, listed in entries.items()}
                moment, files = self.publisher.moment(trainer), self.publisher.files
                self.recorder.write(trainer, self.publisher.run_dir, self.methods, shown, files, moment)
        for panel in self.panels.values():
            panel.end()
