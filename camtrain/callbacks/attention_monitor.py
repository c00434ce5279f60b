"""AttentionMonitor: every epoch, where does the network look, per label?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from camtrain._batch import Adapter, Batch
from camtrain._errors import InputError
from camtrain._lightning import Callback
from camtrain.callbacks._context import RunContext
from camtrain.callbacks._layers import check_layers, needs_image, resolve_layers
from camtrain.callbacks._methods import maps_of_methods, read_methods
from camtrain.callbacks._panel import Panel
from camtrain.callbacks._publish import Publisher
from camtrain.callbacks._recording import Recorder
from camtrain.callbacks._scores import Score, ScoreBook
from camtrain.callbacks._side_maps import SideMaps
from camtrain.callbacks._splits import is_repeat, loader_of, split_name
from camtrain.callbacks._steps import WrappedStep, batch_of
from camtrain.cam.asked import Asked
from camtrain.cam.engine import Reshape
from camtrain.cam.watch import LogitsFrom, ModuleWatch


class AttentionMonitor(Callback):
    """Scores attention maps against organs in every validation and test epoch, and draws a fixed panel of cases.

    Works on an unmodified module and adds no forward: hooks on the layers and on the modules around them see the user's
    own validation step, under `no_grad` and inference mode alike. Maps are made of present labels only; of several
    layers the map is the mean of theirs, on the finest of their grids.

    Methods beyond the gradient family (`scorecam`, `relevancecam`, `lrp`, `guided_backprop`, `guided_gradcam`) are paid
    for with forwards of their own, in eval mode, of the module that the step called, of samples that have a present
    label. They are scored only where pictures are due: every `every_n_epochs` of a fit, and in the sanity check, so
    that what cannot work shows before an epoch is spent. Their keys are new in those epochs only: no `monitor=`.

    Logged every epoch (usable as `monitor=`): `<split>/<score>` as mean over labels and `<split>/<score>/<label>`, for
    the scores auroc, organ_iou, energy_inside, pointing_game, mask_iou, relevance_rank, empty_map_rate,
    class_sensitivity (among the present labels of a case), sum_to_score_l1 and bias_share (of a single layer), with
    `organ_iou_micro` (the paper's mean over cases and labels) and `energy_inside_chance`; methods after the first as
    `<split>/<score>@<method>`. OrganIoU thresholds are chosen on validation every epoch (of paid methods: whenever they
    are scored) and frozen for test; a checkpoint carries those of its epoch. Undefined scores are left out.

    Pictures go every `every_n_epochs` to every logger of the Trainer and to the run folder
    `<trainer.log_dir or default_root_dir>/camtrain/<run id>`, with `scores.csv` and `report.html`, one file that shows
    all of it (docs/report.md).

    Args:
        layer: Tapped layer: dotted name, module, or None for the last feature map; or a list of them.
        table: `OrganTable`, path, shipped name, mapping with the sections of the YAML, or None for the data module's;
            without any, only pictures and the scores that need no organs.
        methods: Attention methods, by name or as a dict of `name` and options (`{"name": "scorecam", "channels": 16}`).
            The first has the plain keys, and must be of the gradient family. A method whose maps are on another grid
            (guided: the image's) is compared with the regions on that grid.
        every_n_epochs: Draw pictures and score paid methods every so many epochs (0 = never). Scores of the others are
            computed every epoch.
        panel_cases: Cases of the panel.
        labels_per_case: Labels drawn of each panel case.
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

    Raises:
        InputError: Unknown layer, method or option, batches that break the contract, a key that the module logs too.

    Example:
        >>> AttentionMonitor(layer="layer4", methods=["hirescam", "gradcam"]).methods
        ['hirescam', 'gradcam']
    """

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
    ) -> None:
        self._asked = read_methods(methods)
        self.methods = [asked.name for asked in self._asked]
        paid = next((asked.name for asked in self._asked if asked.paid), None)
        if paid is not None and not every_n_epochs:
            raise InputError(
                f"method {paid!r} needs forwards of its own and is scored only in epochs with pictures, but "
                "every_n_epochs=0 means never: set it to 1 or more"
            )
        self.layer, self.name = layer, name
        self.logits, self.reshape, self.call = logits, reshape, call
        self.context = RunContext(table, keys, adapter, names, mode)
        self.panels: dict[str, Panel] = {}
        self.recorder = Recorder(self.context, panel_cases) if report else None
        self.publisher = Publisher(self.methods[0], name, every_n_epochs, max_label_keys)
        self.scores: dict[str, list[Score]] = {}
        self.thresholds: dict[str, Tensor] = {}
        self._new_panel = partial(Panel, panel_cases, labels_per_case)
        self._books: dict[str, ScoreBook] = {}
        self._due: list[Asked] = []
        self._seen_cases: dict[int, int] = {}
        self._at = (0, 0)
        self._wrapped: list[WrappedStep] = []
        self._watch: ModuleWatch | None = None

    @property
    def state_key(self) -> str:
        """Two callbacks with different names keep different states."""
        return f"{type(self).__qualname__}[{self.name or ''}]"

    def state_dict(self) -> dict[str, Any]:
        """Frozen thresholds, the panel, and where the run writes; plain values, so that `weights_only` loads them."""
        panels = {split: panel.state() for split, panel in self.panels.items() if panel.complete}
        shown = [] if self.recorder is None else self.recorder.state()
        return {"thresholds": dict(self.thresholds), "panels": panels, "shown": shown, **self.publisher.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue an earlier run."""
        self.thresholds = dict(state_dict.get("thresholds", {}))
        for split, state in state_dict.get("panels", {}).items():
            self._panel(split).load(state)
        if self.recorder is not None:
            self.recorder.load(state_dict.get("shown", []))
        self.publisher.load(state_dict)

    # Lightning's hooks ------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check layer and table before anything is computed, then hook into the evaluation steps."""
        self._stop()
        if stage not in _HOOKS:
            return
        self.context.setup(trainer)
        check_layers(pl_module, self.layer, self.logits)
        if stage == "fit":
            self.panels.clear()
            if self.recorder is not None:
                self.recorder.start()
        self.publisher.setup(trainer, stage)
        step, end = _HOOKS[stage]
        self._wrapped = [
            WrappedStep(pl_module, step, partial(self._step, trainer, pl_module)),
            WrappedStep(pl_module, end, partial(self._finish, trainer, pl_module)),
        ]

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave no hook behind."""
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave no hook behind, also after an exception in the middle of a forward."""
        self._stop()

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count."""
        self._begin(trainer)

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count."""
        self._begin(trainer)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Know where we are; the step itself need not be told."""
        self._at = (batch_idx, dataloader_idx)

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Know where we are; the step itself need not be told."""
        self._at = (batch_idx, dataloader_idx)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw, and see whether somebody else logged under our keys."""
        self._close(trainer)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw, and see whether somebody else logged under our keys."""
        self._close(trainer)

    # What they do -----------------------------------------------------------------------------------------------------

    def _begin(self, trainer: Any) -> None:
        due = self.publisher.due(trainer)
        self._due = [asked for asked in self._asked if due or not asked.paid]
        with torch.inference_mode(False):
            for book in self._books.values():
                book.reset()
        self._seen_cases.clear()
        for panel in self.panels.values():
            panel.begin()
        if self.recorder is not None:
            self.recorder.begin()

    def _stop(self) -> None:
        for wrapped in self._wrapped:
            wrapped.undo()
        self._wrapped.clear()
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        self._books.clear()
        for panel in self.panels.values():
            panel.begin()

    def _step(self, trainer: Any, pl_module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One evaluation step: the user's, watched; what it returns is not touched."""
        batch = batch_of(args, kwargs)
        watch = self._watching(trainer, pl_module, batch)
        watch.start()
        try:
            output = original(*args, **kwargs)
            # Metric states made under inference mode could never be updated again.
            with torch.inference_mode(False), torch.no_grad():
                outputs = None if self.context.names is None else len(self.context.names)
                sources, logits = watch.take_all(outputs, self.context.expected(trainer, pl_module))
                names = self.context.resolve(trainer, pl_module, logits.shape[1])
                maps = partial(maps_of_methods, self._due, watch, sources, logits, reshape=self.reshape)
                free = tuple(asked.name for asked in self._asked if not asked.paid)
                side = SideMaps(watch, sources, logits, free, self.reshape)
                self._count(trainer, self.context.read(batch, len(names)), maps, logits.detach(), names, side)
        finally:
            watch.stop()
        return output

    def _watching(self, trainer: Any, pl_module: nn.Module, batch: Any) -> ModuleWatch:
        if self._watch is None:
            image = self.context.image(batch) if needs_image(self.layer) else None
            layers = resolve_layers(trainer, pl_module, self.layer, image)
            self._watch = ModuleWatch(pl_module, layers, self.logits, self.call, cut=True)
        return self._watch

    def _count(
        self,
        trainer: Any,
        words: Batch,
        maps_of: Callable[[Tensor], dict[str, Tensor]],
        logits: Tensor,
        names: list[str],
        side: SideMaps,
    ) -> None:
        if words.label is None:
            raise InputError(
                "AttentionMonitor needs labels, but the batch has no key 'label': name yours with keys={'label': ...}"
            )
        batch_idx, dataloader_idx = self._at
        label = self._without_repeats(trainer, words.label.to(logits.device), dataloader_idx)
        segmented = words.has_organs if self.context.has_table else torch.ones_like(words.has_organs)
        segmented = segmented.to(logits.device)
        present = (label == 1) & segmented[:, None]
        # The sanity check only shows that a method works here; one map does, and K forwards of a Score-CAM are long.
        maps = maps_of(_first_only(present) if trainer.sanity_checking else present)
        split = split_name(trainer, dataloader_idx)
        if split not in self._books:
            self._books[split] = self._book(trainer, split, names, logits.device)
        self._books[split].update(maps, self._allowed(words, maps, present), label, segmented, logits)
        if self.publisher.draws(trainer):
            panel = self._panel(split)
            cases = words.ids or [f"case_{batch_idx}_{row}" for row in range(len(label))]
            rows = panel.wanted(cases, label, segmented)
            panel.collect(rows, cases, words, maps, logits, names, partial(self._region, words))
            if self.recorder is not None:
                paid = {method: each for method, each in maps.items() if method not in side.methods}
                self.recorder.collect(split, rows, cases, words, logits, paid, side, trainer.state.fn == "fit")

    def _allowed(self, words: Batch, maps: dict[str, Tensor], present: Tensor) -> dict[str, Tensor] | None:
        """Method -> (B, L, *S') bool on the grid of its maps; None without a table."""
        if not self.context.has_table:
            return None
        on_grid: dict[tuple[int, ...], Tensor] = {}
        for grid in {tuple(each.shape[2:]) for each in maps.values()}:
            allowed = self.context.allowed(words, grid)
            on_grid[grid] = present.new_zeros(*present.shape, *grid) if allowed is None else allowed.to(present.device)
        return {method: on_grid[tuple(each.shape[2:])] for method, each in maps.items()}

    def _book(self, trainer: Any, split: str, names: list[str], device: torch.device) -> ScoreBook:
        """Validation chooses thresholds on its own cases, each loader for itself; test takes those of `val`."""
        frozen = self.thresholds if trainer.testing else None
        missing = [asked.name for asked in self._due if asked.name not in self.thresholds]
        if trainer.testing and self.context.has_table and missing:
            which = "" if len(missing) == len(self._due) else f" of {', '.join(missing)}"
            ran = "no validation has run" if not which else "no validation has scored them"
            rank_zero_warn(f"camtrain: {ran}, so OrganIoU thresholds{which} are chosen on {split!r} itself")
        one_layer = not isinstance(self.layer, list | tuple)
        return ScoreBook(names, self.methods, self.context.has_table, device, frozen, one_layer)

    def _panel(self, split: str) -> Panel:
        if split not in self.panels:
            self.panels[split] = self._new_panel()
        return self.panels[split]

    def _without_repeats(self, trainer: Any, label: Tensor, dataloader_idx: int) -> Tensor:
        """Lightning's sampler fills up uneven ranks with cases that were already seen; they become unknown."""
        start = self._seen_cases.get(dataloader_idx, 0)
        self._seen_cases[dataloader_idx] = start + len(label)
        repeats = is_repeat(loader_of(trainer, dataloader_idx), start, len(label))
        if not any(repeats):
            return label
        return torch.where(torch.tensor(repeats, device=label.device)[:, None], torch.nan, label)

    def _region(self, words: Batch, row: int) -> Tensor | None:
        """(L, *S) bool of one case, at the image's resolution."""
        if words.organs is None or not bool(words.has_organs[row]):
            return None
        one = Batch(
            image=None,
            label=None,
            organs=words.organs[row : row + 1],
            has_organs=words.has_organs[row : row + 1],
            ids=None,
            affine=None if words.affine is None else words.affine[row : row + 1],
            allowed_organs=None if words.allowed_organs is None else words.allowed_organs[row : row + 1],
        )
        allowed = self.context.allowed(one, words.organs.shape[2:])
        return None if allowed is None else allowed[0]

    def _finish(self, trainer: Any, pl_module: Any, original: Callable[..., Any]) -> Any:
        """Log the scores, but not those of the sanity check, which has seen a batch or two.

        After the module's own end of the epoch: what it has logged by then can be looked at, while a key of ours that
        it logged later would end in an error of Lightning's which speaks of two calls to a user who made one.
        """
        output = original()
        if trainer.sanity_checking:
            return output
        with torch.inference_mode(False):
            due = [asked.name for asked in self._due]
            self.scores = {split: book.compute(due) for split, book in self._books.items()}
            if "val" in self._books:
                kept = {method: values for method, values in self.thresholds.items() if method in self.methods}
                self.thresholds = kept | self._books["val"].thresholds(due)
        for split, scores in self.scores.items():
            self.publisher.log_scores(trainer, pl_module, split, scores, len(self.context.names or []))
        return output

    def _close(self, trainer: Any) -> None:
        if trainer.sanity_checking:
            return
        self.publisher.check_clashes(trainer, self.scores)
        entries = {split: panel.entries for split, panel in self.panels.items()}
        self.publisher.write(trainer, self.scores, entries, self.context.names or [])
        if self.recorder is not None:
            shown = {split: {entry.case for entry in listed} for split, listed in entries.items()}
            self.recorder.write(trainer, self.publisher.run_dir, self.methods, shown)
        for panel in self.panels.values():
            panel.end()


def _first_only(present: Tensor) -> Tensor:
    """Of (B, L) bool all but the first True made False."""
    return present & (present.flatten().cumsum(0).view_as(present) == 1)


# Stage of the Trainer -> the module's step to watch, and the hook in which an epoch's scores are logged.
_HOOKS = {
    "fit": ("validation_step", "on_validation_epoch_end"),
    "validate": ("validation_step", "on_validation_epoch_end"),
    "test": ("test_step", "on_test_epoch_end"),
}
