"""What the report needs of a panel: each case's volume once, and its maps of many labels, raw, whenever it is drawn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from camtrain._batch import Batch
from camtrain.anatomy import spacing_of
from camtrain.callbacks._context import RunContext
from camtrain.callbacks._fine_maps import REPORTED, coarse, on_host
from camtrain.callbacks._run_facts import run_facts
from camtrain.callbacks._step_maps import Made, StepMaps
from camtrain.metrics import energy_inside
from camtrain.reporting import Patience, RunDir, geometry
from camtrain.reporting.panel_files import CaseMap, PanelVolume, write_maps, write_volume
from camtrain.reporting.run_report import RunReport

LABELS_PER_CASE = 8
VOLUME_BYTES = 12 << 20  # of all volumes of a split together


class Recorder:
    """Collects the raw panel of a pass, and writes it into the run's folder with the report. Rank zero only.

    The labels of a case are chosen when it is first seen: the present ones, then those that the network finds
    likeliest. Nothing that goes wrong here stops a training: it is said once.

    Args:
        context: What the monitor reads of the run.
        cases: Cases of the panel at most; they share the bytes of the volumes.
    """

    def __init__(self, context: RunContext, cases: int) -> None:
        self._context, self._cases = context, max(1, cases)
        self._labels: dict[tuple[str, str], list[int]] = {}
        self._maps: dict[str, list[CaseMap]] = {}
        self._volumes: dict[tuple[str, str], PanelVolume] = {}
        self._known: set[tuple[str, str]] = set()
        self._facts: dict[str, Any] | None = None
        self._report: RunReport | None = None
        self._failed = False
        self._started = ""

    def begin(self) -> None:
        """A new pass: forget what an interrupted one has left."""
        self._maps.clear()

    def start(self) -> None:
        """A new run."""
        self._labels.clear()
        self._known.clear()
        self._volumes.clear()
        self._report, self._facts = None, None
        self._started = time.strftime("%Y-%m-%d %H:%M")
        self.begin()

    def wanted(self, split: str, rows: Iterable[int], cases: Sequence[str], label: Tensor, logits: Tensor) -> Tensor:
        """(B, L) bool: the labels that the report shows of the panel's rows of a batch.

        Args:
            split: Split of the batch.
            rows: Rows of the panel's cases.
            cases: B names.
            label: (B, L), NaN = unknown.
            logits: (B, L).
        """
        asked = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        for row in rows:
            asked[row, self._chosen(split, cases[row], label[row], logits[row])] = True
        return asked

    def collect(
        self,
        split: str,
        wanted: Tensor,
        cases: Sequence[str],
        words: Batch,
        logits: Tensor,
        made: Made,
        step: StepMaps,
        fitting: bool,
    ) -> None:
        """Copy the panel's rows of one batch to the host.

        Args:
            split: Split of the batch.
            wanted: What `wanted` said.
            cases: B names.
            words: The batch.
            logits: (B, L).
            made: The maps of the step.
            step: What it can be asked for.
            fitting: Is this a pass of a fit?
        """
        with self._harmless():
            self._collect(split, wanted, cases, words, logits, made, step, fitting)

    def _collect(
        self,
        split: str,
        wanted: Tensor,
        cases: Sequence[str],
        words: Batch,
        logits: Tensor,
        made: Made,
        step: StepMaps,
        fitting: bool,
    ) -> None:
        if words.image is None or words.label is None:
            return
        chosen = {row: wanted[row].nonzero()[:, 0].tolist() for row in wanted.any(dim=1).nonzero()[:, 0].tolist()}
        inside = _Inside(self._context, words, wanted)
        for row, labels in chosen.items():
            self._volume(split, cases[row], words, row, labels)
            for index in labels:
                self._maps.setdefault(split, []).extend(
                    _record(cases[row], row, index, self._name(index), words.label, logits, made.shown, inside)
                )
        if self._facts is None:
            # One case is run again, once in a fit; validate and test add no forward.
            self._facts = {"layers": step.layers(), "seen": step.seen() if fitting else {}}

    def write(
        self,
        trainer: Any,
        run_dir: RunDir | None,
        methods: Sequence[str],
        shown: Mapping[str, Collection[str]],
        files: Patience | None = None,
        moment: tuple[int, int] | None = None,
    ) -> None:
        """Write what was collected, and the report.

        Args:
            trainer: The Trainer.
            run_dir: The run's folder.
            methods: Attention methods, the first with the plain keys first.
            shown: Split -> cases of its panel; others were wanted for a while only, and are dropped.
            files: What scores and pictures go through: while that fails, of which it has told, nothing is tried here.
            moment: Epoch and step that the pass stands for; None = those of the Trainer.
        """
        if run_dir is None or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        with self._harmless():
            self._drop_others(shown)
            if files is None or not files.failing:
                self._write(trainer, run_dir, methods, moment or (int(trainer.current_epoch), int(trainer.global_step)))
        self.begin()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """A report is not worth a night of training: whatever goes wrong is said, once, and the run goes on."""
        try:
            yield
        except Exception as error:
            if not self._failed:
                self._failed = True
                rank_zero_warn(f"camtrain: the report is not complete ({type(error).__name__}: {error})")

    def state(self) -> list[list[Any]]:
        """What a checkpoint keeps: the labels of each case, so that a run that is resumed shows the same."""
        return [[split, case, list(labels)] for (split, case), labels in self._labels.items()]

    def load(self, state: Iterable[Sequence[Any]]) -> None:
        """Take the choice of an earlier run."""
        self._labels = {(str(split), str(case)): [int(i) for i in labels] for split, case, labels in state}

    def _drop_others(self, shown: Mapping[str, Collection[str]]) -> None:
        """The first pass over a split may change its mind about which cases are hard."""
        for split in list(self._maps):
            cases = shown.get(split, ())
            self._maps[split] = [each for each in self._maps[split] if each.case in cases]
            for made in (self._volumes, self._labels):
                for key in [key for key in made if key[0] == split and key[1] not in cases]:
                    del made[key]

    def _write(self, trainer: Any, run_dir: RunDir, methods: Sequence[str], moment: tuple[int, int]) -> None:
        if self._report is None or self._report.folder != run_dir.path:
            self._report = RunReport(run_dir.path)
            # A test of the finished run joins its folder; how to reproduce it is the command of the fit.
            if trainer.state.fn == "fit" or not run_dir.facts_path.exists():
                known = self._facts or {"layers": [], "seen": {}}
                facts = run_facts(
                    trainer, trainer.lightning_module, self._context, methods, root=run_dir.path.parents[1], **known
                )
                run_dir.write_facts({**facts, "started": self._started})
        for (split, case), volume in self._volumes.items():
            write_volume(run_dir.volume_path(case, split), volume)
        self._known.update(self._volumes)
        self._volumes.clear()
        epoch, step = moment
        for split, maps in self._maps.items():
            write_maps(run_dir.maps_path(epoch, split), maps, epoch=epoch, step=step, split=split)
        self._report.write()

    def _name(self, index: int) -> str:
        names = self._context.names or []
        return names[index] if index < len(names) else f"label_{index}"

    def _chosen(self, split: str, case: str, label: Tensor, logits: Tensor) -> list[int]:
        key = (split, case)
        if key not in self._labels:
            known = torch.nan_to_num(label.detach().float().cpu(), nan=-1.0)
            likely = torch.sigmoid(logits.detach().float().cpu()).nan_to_num(0.0)
            order = torch.argsort(known * 2 + likely, descending=True)[:LABELS_PER_CASE]
            self._labels[key] = sorted(order.tolist())
        return [index for index in self._labels[key] if index < len(label)]

    def _volume(self, split: str, case: str, words: Batch, row: int, labels: Sequence[int]) -> None:
        if (split, case) in self._known or (split, case) in self._volumes or words.image is None:
            return
        axes, spacing = (None, None)
        if words.affine is not None and words.image.ndim == 5:
            axes, spacing = geometry(words.affine[row].double().cpu().numpy())
        self._volumes[split, case] = PanelVolume.make(
            case,
            words.image[row].float().cpu().numpy(),
            allowed=self._regions(words, row, labels),
            split=split,
            spacing=spacing,
            axes=axes,
            budget=VOLUME_BYTES // self._cases,
        )

    def _regions(self, words: Batch, row: int, labels: Sequence[int]) -> dict[str, Any]:
        """Label -> (*S) bool, of the case's own labels only: those of all at full size would be gigabytes."""
        if words.organs is None or not self._context.has_table or not bool(words.has_organs[row]):
            return {}
        # One label stands for all with its rule: four regions instead of eight of a full volume.
        told = words.allowed_organs
        place = {self._name(index): index for index in labels}
        kinds = {
            name: (self._context.selected.rules[name], None if told is None else tuple(told[row, index].tolist()))
            for name, index in place.items()
        }
        first = {kind: name for name, kind in reversed(kinds.items())}
        table = self._context.selected.select(dict.fromkeys(first[kind] for kind in kinds.values()))
        spacing = None
        if table.needs_spacing:
            if words.affine is None:
                return {}
            spacing = spacing_of(words.affine[row : row + 1])
        some = None if told is None else told[row : row + 1, [place[name] for name in table.labels]]
        allowed = table.allowed(words.organs[row : row + 1], spacing=spacing, allowed_organs=some)[0].cpu().numpy()
        return {name: allowed[table.labels.index(first[kind])] for name, kind in kinds.items()}


class _Inside:
    """Energy inside of panel maps, each grid's allowed cells made once."""

    def __init__(self, context: RunContext, words: Batch, wanted: Tensor) -> None:
        self._allowed: Callable[[tuple[int, ...]], Tensor | None] = partial(context.allowed, words)
        self._known = context.has_table and words.organs is not None
        self._segmented = words.has_organs.to(wanted.device)
        self._wanted = wanted
        self._made: dict[int, Tensor] = {}
        self._grids: dict[tuple[int, ...], Tensor | None] = {}

    def of(self, maps: Tensor) -> Tensor | None:
        """(B, L), NaN where undefined; None without organs."""
        if not self._known:
            return None
        if id(maps) not in self._made:
            grid = tuple(maps.shape[2:])
            if grid not in self._grids:
                self._grids[grid] = self._allowed(grid)
            allowed = self._grids[grid]
            if allowed is None:
                return None
            asked = self._wanted.float()
            self._made[id(maps)] = energy_inside(maps, allowed.to(maps.device), asked, self._segmented).cpu()
        return self._made[id(maps)]


def _record(
    case: str,
    row: int,
    index: int,
    name: str,
    label: Tensor,
    logits: Tensor,
    made: Sequence[tuple[str, str, Tensor]],
    inside: _Inside,
) -> list[CaseMap]:
    truth = float(label[row, index])
    probability = float(torch.sigmoid(logits[row, index].float()))
    records = []
    for method, layer, maps in made:
        values = on_host(maps[row, index])
        if not np.isfinite(values).any():
            continue
        shares = inside.of(maps)
        share = math.nan if shares is None else float(shares[row, index])
        records.append(CaseMap(case, name, truth, probability, method, layer, coarse(values, REPORTED), share))
    return records
