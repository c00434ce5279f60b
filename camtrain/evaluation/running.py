"""An evaluation while it runs: split by split, case by case, every finished case on disk."""

from __future__ import annotations

import hashlib
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
from camtrain.cam.layer_lookup import find_layer, plain_name
from camtrain.evaluation.case import Case
from camtrain.evaluation.case_store import CaseRecord, CaseStore
from camtrain.evaluation.donors import DonorPool
from camtrain.evaluation.evaluation import Evaluation
from camtrain.evaluation.label_names import Names
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
    settings: dict[str, Any] = field(default_factory=dict)
    _folder: Path | None = None
    _splits: list[str] = field(default_factory=list)

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
        self.plan = replace(self.plan, measures=[m for m in self.plan.measures if m not in sums])
        return [f"{', '.join(sorted(sums))} were left out: maps that are enlarged to the image lose their sums"]

    def split(self, split: str, batches: Iterable[Any]) -> None:
        """Score the cases of a split that are not finished yet."""
        scorer: CaseScorer | None = None
        donors: DonorPool | None = None
        seen: set[str] = set()
        with self._bar(split, count_of(batches, self.limit)) as tick:
            for case in self.reader.cases(split, batches, self.limit):
                if scorer is None:
                    self._begin(case)
                    scorer = self._scorer(split)
                if case.id in seen:
                    self.repeated[split] = self.repeated.get(split, 0) + 1
                elif (split, case.id) in self.store:
                    self.store.check(split, case.id, case.checksum())
                else:
                    if donors is None and "case" in self.replacements:
                        donors = self._donors(split, batches)
                    record = scorer.score(case)
                    self._replace(case, record, donors)
                    self.store.add(record)
                seen.add(case.id)
                tick()
        if scorer is None:
            raise InputError(f"split {split!r} has no case: leave it out with splits=")
        if split == VAL and "organ_iou" in self.plan.measures and not self.thresholds:
            self.thresholds = choose_thresholds(self.store.of(VAL), self.plan.names)

    def _begin(self, case: Case) -> None:
        """What can be known once an image was seen: outputs, names, table, and so the settings."""
        if self.plan.names:
            return
        names = self.known.resolve(self.reader.outputs(case.image))
        table = None if self.known.table is None else self.known.table.select(names)
        self.plan = replace(self.plan, names=names, table=table)
        if self.given is not None:
            self.thresholds = read_thresholds(self.given, names)
        if table is None and self.plan.asks("region", "reliance"):
            self.notes.append("there is no organ table, so nothing that compares with organs was measured")
        self.settings = self._settings()
        self.store = CaseStore(self._folder, self.settings)
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
            "seed": self.seed,
            "limit": self.limit,
        }

    def _scorer(self, split: str) -> CaseScorer:
        """With frozen OrganIoU thresholds; the split that chooses them keeps all 53."""
        frozen = {tuple(key.split("@", 1)): _tensor(each, self.plan.names) for key, each in self.thresholds.items()}
        default = None
        if "organ_iou" in self.plan.measures and not frozen and split != VAL:
            self.notes.append(f"{split}: OrganIoU at the threshold 0.5, since no validation split was there to choose")
            default = torch.full((len(self.plan.names),), DEFAULT_THRESHOLD, dtype=torch.float64)
        return CaseScorer(self.model, self.plan, frozen, default)

    def _donors(self, split: str, batches: Iterable[Any]) -> DonorPool:
        pool = DonorPool()
        for case in self.reader.cases(split, batches, min(pool.search, self.limit or pool.search)):
            pool.offer([case.id], case.image, case.label)
        return pool

    def _replace(self, case: Case, record: CaseRecord, donors: DonorPool | None) -> None:
        """Probabilities with outside and inside replaced, for every known label that has organs in this case."""
        if self.plan.table is None or case.organs is None:
            return
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
                air=self.plan.air,
            )
            measured = {
                side: {c: v for c, v in enumerate(values[0].tolist()) if v == v}
                for side, values in zip(("outside", "inside"), sides, strict=True)
            }
            record.replaced[kind] = measured

    @contextmanager
    def _bar(self, split: str, total: int | None) -> Iterator[Any]:
        console = Console(stderr=True)
        columns = (TextColumn(f"evaluating {split}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not self.progress) as bar:
            task = bar.add_task(split, total=total)
            yield lambda: bar.advance(task)

    def evaluation(
        self,
        records: dict[str, list[CaseRecord]],
        groups: Mapping[str, Sequence[str]] | None,
        repeats: int,
        level: float,
    ) -> Evaluation:
        """The tables."""
        for split, count in self.repeated.items():
            self.notes.append(f"{split}: {count} cases came twice (same id) and count once")
        return Evaluation.of(
            records,
            names=self.plan.names,
            measures=self.plan.measures,
            thresholds=self.thresholds,
            groups=groups,
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


def fingerprint(model: nn.Module) -> str:
    """A short hash of all parameters and buffers: which weights were evaluated.

    Example:
        >>> a, b = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> _ = b.load_state_dict(a.state_dict())
        >>> fingerprint(a) == fingerprint(b), fingerprint(a) == fingerprint(nn.Linear(2, 1))
        (True, False)
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        if isinstance(tensor, torch.Tensor):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
