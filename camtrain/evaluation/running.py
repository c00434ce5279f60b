"""An evaluation while it runs: split by split, case by case, every finished case on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.anatomy import spacing_of
from camtrain.anatomy.donors import DonorPool
from camtrain.cam.layer_lookup import find_layer, plain_name
from camtrain.evaluation.case import Case
from camtrain.evaluation.case_store import CaseRecord, CaseStore
from camtrain.evaluation.evaluation import Evaluation, averages_of
from camtrain.evaluation.fingerprints import fingerprint, named
from camtrain.evaluation.label_names import Names
from camtrain.evaluation.predicting import logits_of
from camtrain.evaluation.reading_cases import VAL, CaseReader, count_of
from camtrain.evaluation.reliance import reliance_probabilities
from camtrain.evaluation.scoring import CaseScorer, Plan
from camtrain.evaluation.thresholds import Thresholds, choose_thresholds, read_thresholds
from camtrain.metrics import DEFAULT_THRESHOLD

_log = logging.getLogger(__name__)


@dataclass
class Run:
    """One evaluation while it runs."""

    model: nn.Module
    plan: Plan
    reader: CaseReader
    known: Names
    replacements: Sequence[str]
    seed: int
    limit: int | None
    progress: bool
    given: Thresholds | str | Path | None
    notes: list[str] = field(default_factory=list)
    store: CaseStore = field(init=False)
    thresholds: Thresholds = field(default_factory=dict)
    repeated: dict[str, int] = field(default_factory=dict)
    seen: dict[str, list[str]] = field(default_factory=dict)
    groups: Mapping[str, Sequence[str]] | None = None
    overwrite: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    _folder: Path | None = None
    _splits: list[str] = field(default_factory=list)
    _checked: bool = False

    @contextmanager
    def stored(self, folder: Path | None, splits: Sequence[str]) -> Iterator[None]:
        """Open the store when the labels are known; say where finished cases lie when the work is stopped."""
        self._folder, self._splits = folder, list(splits)
        try:
            yield
        except KeyboardInterrupt:
            if folder is not None and hasattr(self, "store"):
                done = len(self.store.records)
                _log.info("%d finished cases are kept in %s; the same call goes on there", done, folder)
            raise

    def without_sums(self) -> list[str]:
        """Leave out what compares sums of maps: enlarging does not keep them."""
        sums = {"sum_to_score_l1", "bias_share", "kendall_tau"} & set(self.plan.measures)
        if not sums:
            return []
        left = [m for m in self.plan.measures if m not in sums]
        if not left:
            raise InputError(
                f"{', '.join(sorted(sums))} compare sums of maps, which at='image' does not keep: at='layer'"
            )
        self.plan = replace(self.plan, measures=left)
        return [f"{', '.join(sorted(sums))} were left out: maps that are enlarged to the image lose their sums"]

    def split(self, split: str, batches: Iterable[Any]) -> None:
        """Score the cases of a split that are not finished yet."""
        # Before the loop: a loader with persistent workers has one iterator, which a second reading would start anew.
        donors = self._donors(split, batches) if "case" in self.replacements else None
        scorer: CaseScorer | None = None
        seen = self.seen.setdefault(split, [])
        expected = count_of(batches, self.limit)
        with self._bar(split, expected) as tick:
            for case in self.reader.cases(split, batches, self.limit):
                if scorer is None:
                    self._begin(case)
                    scorer = self._scorer(split)
                tick()
                if case.id in seen:
                    self.repeated[split] = self.repeated.get(split, 0) + 1
                    continue
                seen.append(case.id)
                if (split, case.id) in self.store:
                    self.store.check(split, case.id, case.checksum())
                    self._check_model(case)
                else:
                    self.store.add(self._scored(scorer, case, donors))
        if scorer is None:
            raise InputError(f"split {split!r} has no case: leave it out with splits=")
        self._say_what_came(split, expected)
        if split == VAL and "organ_iou" in self.plan.measures and not self.thresholds:
            self._choose_thresholds()

    def _scored(self, scorer: CaseScorer, case: Case, donors: DonorPool | None) -> CaseRecord:
        try:
            record = scorer.score(case)
            self._replace(case, record, donors)
        except InputError as error:
            raise InputError(f"case {case.id!r} of {case.split}: {error}") from error
        return record

    def _say_what_came(self, split: str, expected: int | None) -> None:
        came = len(self.seen[split]) + self.repeated.get(split, 0)
        if expected is not None and came < expected:
            self.notes.append(f"{split}: the loader gave {came} of the {expected} cases of its data set")
        others = len(self.store.of(split)) - len(self.seen[split])
        if others:
            self.notes.append(f"{split}: {others} finished cases are not in the data any more and do not count")

    def _choose_thresholds(self) -> None:
        """On the validation cases; a label without any scored pair there has the default."""
        names = self.plan.names
        self.thresholds, scored = choose_thresholds(self.records(VAL), names)
        if self.thresholds:
            self.notes.append(
                f"{VAL}: OrganIoU's thresholds were chosen on these very cases, so that it is too good here; the other "
                "splits have them frozen"
            )
        for key, columns in scored.items():
            without = [name for c, name in enumerate(names) if c not in columns]
            if without:
                self.notes.append(
                    f"OrganIoU thresholds of {key} for {_few(without)} are the default {DEFAULT_THRESHOLD}: no "
                    f"scored pair on {VAL} to choose them on"
                )

    def _check_model(self, case: Case) -> None:
        """Once: does the model, with its `logits=`, still say what it said of a finished case?

        Raises:
            InputError: It says something else.
        """
        if self._checked:
            return
        self._checked = True
        before = torch.tensor(self.store.records[case.split, case.id].logits, dtype=torch.float64)
        now = logits_of(self.model, case.image, self.plan.logits)[0].double().cpu()
        if before.shape != now.shape or not torch.allclose(before, now, rtol=1e-2, atol=1e-2):
            raise InputError(
                f"the model gives other logits for case {case.id!r} than when it was finished in {self._folder}: "
                "another network, logits= or preprocessing; choose another folder"
            )

    def records(self, split: str) -> list[CaseRecord]:
        """The finished cases of a split that are in the data."""
        return [self.store.records[split, case] for case in self.seen.get(split, [])]

    def _begin(self, case: Case) -> None:
        """What can be known once an image was seen: outputs, names, table, and so the settings."""
        if self.plan.names:
            return
        names = self.known.resolve(self.reader.outputs(case.image))
        table = None if self.known.table is None else self.known.table.select(names)
        self.plan = replace(self.plan, names=names, table=table)
        averages_of(self.groups or {}, names)  # said now, and not after hours of scoring
        if self.given is not None:
            self.thresholds = read_thresholds(self.given, names)
        if table is None and self.plan.asks("region", "reliance"):
            self.notes.append("there is no organ table, so nothing that compares with organs was measured")
        self.settings = self._settings()
        self.store = CaseStore(self._folder, self.settings, self.overwrite)
        if self.store.resumed:
            self.notes.append(f"{self.store.resumed} cases were finished in an earlier run of the same settings")

    def _settings(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "made_by": "camtrain evaluate",
            "model": fingerprint(self.model),
            "labels": list(plan.names),
            "table": None if plan.table is None else plan.table.to_dict(),
            "methods": [method.key for method in plan.methods],
            "layers": [
                plain_name(find_layer(self.model, layer)[0]) if isinstance(layer, nn.Module) else layer
                for layer in plan.layers
            ],
            "measures": list(plan.measures),
            "cases": plan.cases,
            "cut": plan.cut,
            "at": plan.at,
            "contrast_labels": plan.contrast_labels,
            "baseline": plan.baseline,
            "air": plan.air,
            "steps": plan.steps,
            "tolerance_mm": plan.tolerance_mm,
            "authors_edge_case": plan.authors_edge_case,
            "replacements": list(self.replacements),
            "thresholds": self.thresholds or None,
            "chosen_on": VAL if VAL in self._splits and "organ_iou" in plan.measures and not self.thresholds else None,
            "seam": plan.seam,
            "limit": self.limit,
            "logits": named(plan.logits),
            "reshape": named(plan.reshape),
            "keys": None if self.reader.keys is None else dict(self.reader.keys),
            "adapter": named(self.reader.adapter),
        }

    def _scorer(self, split: str) -> CaseScorer:
        """With frozen OrganIoU thresholds; the split that chooses them keeps all 53."""
        frozen = {tuple(key.split("@", 1)): _tensor(each, self.plan.names) for key, each in self.thresholds.items()}
        default = None
        if "organ_iou" in self.plan.measures and not frozen and split != VAL:
            self.notes.append(
                f"{split}: OrganIoU at the threshold 0.5, since no validation case was there to choose on"
            )
            default = torch.full((len(self.plan.names),), DEFAULT_THRESHOLD, dtype=torch.float64)
        return CaseScorer(self.model, self.plan, frozen, default)

    def _donors(self, split: str, batches: Iterable[Any]) -> DonorPool:
        if iter(batches) is batches:
            raise InputError(
                f"the data of {split!r} can be read once only, but other cases' voxels are needed beside it: pass a "
                "loader or a list of batches, or leave 'case' out of replacements="
            )
        pool = DonorPool()
        for case in self.reader.cases(split, batches, min(pool.search, self.limit or pool.search)):
            pool.offer([case.id], case.image, case.label, [case.patient])
        return pool

    def _replace(self, case: Case, record: CaseRecord, donors: DonorPool | None) -> None:
        """Probabilities with outside and inside replaced, for every known label that has organs in this case."""
        if self.plan.table is None or case.organs is None:
            return
        if donors is not None:
            donors.belongs(case.id, case.patient)
        for kind in self.replacements:
            spacing = None if case.affine is None else spacing_of(case.affine)
            sides = reliance_probabilities(
                self.model,
                case.image,
                case.organs,
                self.plan.table,
                case.label,
                kind,
                donors=donors,
                ids=[case.id],
                spacing=spacing if self.plan.table.needs_spacing else None,
                logits=self.plan.logits,
                air=self.plan.air if kind == "air" else None,
                seam=self.plan.seam,
            )
            measured = {
                side: {c: v for c, v in enumerate(values[0].tolist()) if v == v}
                for side, values in zip(("outside", "inside"), sides, strict=True)
            }
            record.replaced[kind] = measured
        if donors is not None:
            record.replaced["case"]["no_donor"] = self._without_donor(case, record, donors)

    def _without_donor(self, case: Case, record: CaseRecord, donors: DonorPool) -> dict[int, None]:
        """Columns that could have been measured, had there been another case of this shape."""
        others = [sides["outside"] for kind, sides in record.replaced.items() if kind != "case"]
        shape = tuple(case.image.shape[1:])
        return {
            column: None
            for column, truth in enumerate(record.label)
            if truth is not None
            and donors.donor(case.id, column, truth, shape) is None
            and (not others or any(column in each for each in others))
        }

    @contextmanager
    def _bar(self, split: str, total: int | None) -> Iterator[Any]:
        console = Console(stderr=True)
        columns = (
            TextColumn("evaluating {task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True, disable=not self.progress) as bar:
            task = bar.add_task(split, total=total)
            yield lambda: bar.advance(task)

    def evaluation(
        self,
        splits: Iterable[str],
        repeats: int,
        level: float,
    ) -> Evaluation:
        """The tables."""
        for split, count in self.repeated.items():
            self.notes.append(f"{split}: {count} cases came twice (same id) and count once")
        return Evaluation.of(
            # Validation comes last: it chose thresholds for itself.
            {split: self.records(split) for split in sorted(splits, key=lambda split: split == VAL)},
            names=self.plan.names,
            measures=self.plan.measures,
            thresholds=self.thresholds,
            groups=self.groups,
            settings=self.settings,
            notes=self.notes,
            repeats=repeats,
            level=level,
            seed=self.seed,
            progress=self.progress,
        )


def _tensor(thresholds: Mapping[str, float], names: Sequence[str]) -> Tensor:
    """(L,)."""
    return torch.tensor([thresholds[name] for name in names], dtype=torch.float64)


def _few(names: Sequence[str], most: int = 5) -> str:
    """The names, or the first of them and how many more there are."""
    more = len(names) - most
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:most])} and {more} more"
