"""All numbers of one case: maps of its wanted labels, compared with its organs, on the grid of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.anatomy import OrganTable, spacing_of
from camtrain.cam.asked import Asked
from camtrain.cam.channel_weights import WITH_WEIGHTS, channel_weights
from camtrain.cam.engine import Reshape
from camtrain.cam.explaining import explain
from camtrain.cam.logits import PickLogits
from camtrain.cam.question import WantedLayer, asking
from camtrain.evaluation.case import Case
from camtrain.evaluation.case_filter import CaseFilter, chosen_pairs
from camtrain.evaluation.case_store import CASE, CaseRecord
from camtrain.evaluation.measures import MEASURES
from camtrain.evaluation.perturbing import masked_probabilities, perturbation_curves
from camtrain.evaluation.predicting import logits_of
from camtrain.evaluation.region_scores import region_scores
from camtrain.evaluation.sum_of_maps import SumOfMaps
from camtrain.metrics import (
    average_drop,
    average_increase,
    channel_sparseness,
    class_sensitivity,
    deletion_auc,
    insertion_auc,
    sum_to_score,
)
from camtrain.metrics.sum_to_score import kendall_tau

# Bytes that the maps of one case may take at once; the scores need some twenty times as much beside them.
MAP_BYTES = 1 << 26
# Not a measure: the sums of all maps of a case, kept until the last of them is there.
_SUMS = "sums of maps"
At = Literal["layer", "image"]


@dataclass(frozen=True)
class Plan:
    """What is measured, and how; see `evaluate` for the arguments."""

    names: Sequence[str]
    table: OrganTable | None
    methods: Sequence[Asked]
    layers: Sequence[Any]
    measures: Sequence[str]
    cases: CaseFilter = "positives"
    cut: float = 0.5
    at: At = "layer"
    contrast_labels: int | None = 4
    baseline: str | float = "air"
    air: float | None = None
    seam: int = 1
    steps: int = 20
    tolerance_mm: float | None = None
    authors_edge_case: bool = False
    logits: PickLogits | None = None
    reshape: Reshape | None = None

    def asks(self, *families: str) -> list[str]:
        """The wanted measures of these families."""
        return [name for name in self.measures if MEASURES[name].family in families]


@dataclass
class CaseScorer:
    """Scores cases one at a time, so that memory is that of one case whatever the number of labels.

    Attributes:
        model: The model; it is left as it was.
        plan: What is measured.
        thresholds: (method, layer) -> OrganIoU threshold per label (L,).
        default: (L,) for what is not among them; None: all 53 are kept.
    """

    model: nn.Module
    plan: Plan
    thresholds: Mapping[tuple[str, ...], Tensor] = field(default_factory=dict)
    default: Tensor | None = None
    _share_of_voxels: dict[str, float] = field(default_factory=dict)
    _layers: list[tuple[Any, str]] = field(default_factory=list)
    _call: int | None = None
    _made: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def score(self, case: Case) -> CaseRecord:
        """Everything that needs a map, and the logits.

        Raises:
            InputError: What the model, a method or the table refuses.
        """
        scores = logits_of(self.model, case.image, self.plan.logits)
        label = case.label.to(scores.device)
        record = CaseRecord(
            id=case.id,
            split=case.split,
            patient=case.patient,
            label=[None if math.isnan(v) else v for v in label[0].tolist()],
            logits=scores[0].double().tolist(),
            segmented=case.organs is not None,
            geometry=case.affine is not None,
            seen=case.checksum(),
        )
        self._find_layers(case.image)
        wanted = chosen_pairs(label, scores.sigmoid(), self.plan.cases, self.plan.cut)[0]
        if bool(wanted.any()) and self.plan.asks("region", "map", "weights", "image"):
            for method in self.plan.methods:
                record.maps[method.key] = self._of_method(case, method, wanted, scores, record)
        return record

    def _of_method(
        self, case: Case, method: Asked, wanted: Tensor, scores: Tensor, record: CaseRecord
    ) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        if self.plan.asks("region", "map", "image"):
            asked = self._columns(wanted, case.id)
            sums = self._sums_of_maps(case, method, asked)
            for layer, columns, maps in self._maps(case, method, asked):
                into, others = found.setdefault(layer, {}), sums.get(layer)
                pairs, key = wanted[columns][None], (method.key, layer)
                for name, numbers in self._of_maps(case, key, columns, maps, pairs, scores, record, others):
                    into.setdefault(name, {}).update(numbers)
            for into in found.values():
                if (totals := into.pop(_SUMS, None)) is not None:
                    # A number of the case, not of a label.
                    into["kendall_tau"] = {CASE: _tau(totals, scores)}
        if self.plan.asks("weights") and method.name in WITH_WEIGHTS:
            self._of_weights(case, method, wanted, found)
        return found

    def _of_maps(
        self,
        case: Case,
        key: tuple[str, str],
        columns: list[int],
        maps: Tensor,
        pairs: Tensor,
        scores: Tensor,
        record: CaseRecord,
        others: SumOfMaps | None,
    ) -> Iterator[tuple[str, dict[int, Any]]]:
        """Measure -> numbers of the labels in these columns."""
        plan = self.plan
        chosen = [c for c, wanted in zip(columns, pairs[0].tolist(), strict=True) if wanted]
        broken = ~maps.flatten(2).isfinite().all(dim=2)[0]
        lost = record.broken.setdefault("@".join(key), [])
        lost += [c for c in chosen if bool(broken[columns.index(c)])]
        if not lost:
            del record.broken["@".join(key)]
        if plan.asks("region") and plan.table is not None and case.organs is not None:
            spacing = None if case.affine is None else spacing_of(case.affine)
            allowed = self._regions(case, columns, tuple(maps.shape[2:]), spacing).to(maps.device)
            counted = pairs[0] & allowed.flatten(2).any(dim=2)[0]
            full = pairs[0] & allowed.flatten(2).all(dim=2)[0]
            record.empty = sorted({*record.empty, *(c for c in chosen if not counted[columns.index(c)])})
            record.full = sorted({*record.full, *(c for i, c in enumerate(columns) if full[i])})
            step = None if spacing is None else _cell_spacing(spacing, case.image.shape[2:], maps.shape[2:])
            frozen = self._frozen(key)
            for name, values in region_scores(
                maps,
                allowed,
                pairs,
                plan.asks("region"),
                thresholds=None if frozen is None else frozen[columns],
                authors_edge_case=plan.authors_edge_case,
                tolerance_mm=plan.tolerance_mm,
                spacing=step,
            ):
                yield name, _numbers(values[0], columns, counted)
        yield from self._of_maps_alone(columns, maps, pairs, scores[:, columns], others)
        if plan.asks("image") and chosen:
            yield from self._of_images(case, columns, maps, pairs, scores)

    def _regions(self, case: Case, columns: list[int], size: tuple[int, ...], spacing: Tensor | None) -> Tensor:
        """(1, n, *S') bool; made once per grid for all methods, since a rule with a hull takes its time."""
        key = (case.split, case.id, tuple(columns), size)
        if key not in self._made:
            if any(other[:2] != key[:2] for other in self._made):
                self._made.clear()
            assert self.plan.table is not None and case.organs is not None  # noqa: S101, PT018 - for the type checker
            table = self.plan.table.select([self.plan.names[c] for c in columns])
            steps = spacing if table.needs_spacing else None
            told = None if case.allowed_organs is None else case.allowed_organs[:, columns]
            made = table.allowed(case.organs, size=size, spacing=steps, allowed_organs=told)
            if sum(each.numel() for each in self._made.values()) + made.numel() > MAP_BYTES:
                return made
            self._made[key] = made
        return self._made[key]

    def _frozen(self, key: tuple[str, str]) -> Tensor | None:
        """(L,) OrganIoU thresholds; None where all 53 are to be kept."""
        if key not in self.thresholds and self.thresholds and "organ_iou" in self.plan.measures:
            known = ", ".join("@".join(each) for each in self.thresholds)
            raise InputError(
                f"there are no thresholds for {'@'.join(key)!r}, only for {known}: choose them on validation cases, by "
                "leaving thresholds= out, or ask for that method and layer"
            )
        return self.thresholds.get(key, self.default)

    def _of_maps_alone(
        self, columns: list[int], maps: Tensor, pairs: Tensor, scores: Tensor, others: SumOfMaps | None
    ) -> Iterator[tuple[str, dict[int, Any]]]:
        asked = self.plan.asks("map")
        if "class_sensitivity" in asked:
            values = class_sensitivity(maps, pairs.float())[0] if others is None else others.sensitivity(maps)
            yield "class_sensitivity", _numbers(values, columns, pairs[0])
        if {"sum_to_score_l1", "bias_share", "kendall_tau"} & set(asked):
            sums = sum_to_score(maps, scores)
            each = {"sum_to_score_l1": sums.gap, "bias_share": sums.bias_share}
            for name, values in each.items():
                if name in asked:
                    yield name, _numbers(values[0], columns, pairs[0])
            if "kendall_tau" in asked:
                # Of all labels together, whose maps may come in several parts.
                yield (
                    _SUMS,
                    dict(zip(columns, maps.flatten(2).sum(dim=2, dtype=torch.float64)[0].tolist(), strict=True)),
                )

    def _of_images(
        self, case: Case, columns: list[int], maps: Tensor, pairs: Tensor, scores: Tensor
    ) -> Iterator[tuple[str, dict[int, Any]]]:
        plan, asked, truth = self.plan, self.plan.asks("image"), pairs.float()
        found: dict[str, Tensor] = {}
        if {"average_drop", "average_increase"} & set(asked):
            before = scores.sigmoid()[:, columns].to(maps.dtype)
            after = masked_probabilities(
                self.model, case.image, maps, pairs, plan.baseline, plan.logits, columns=columns
            )
            # A ratio to a small probability says little: the least one that has a score is what counts as predicted.
            found["average_drop"] = average_drop(before, after, truth, plan.cut)
            found["average_increase"] = average_increase(before, after, truth, plan.cut)
        if {"insertion_auc", "deletion_auc"} & set(asked):
            curves = perturbation_curves(
                self.model, case.image, maps, pairs, plan.baseline, plan.steps, plan.logits, columns=columns
            )
            found["insertion_auc"] = insertion_auc(curves.insertion, curves.share, truth)
            found["deletion_auc"] = deletion_auc(curves.deletion, curves.share, truth)
            for name, curve in (("insertion_curve", curves.insertion), ("deletion_curve", curves.deletion)):
                yield name, _numbers(_on_even_shares(curve[0], curves.share[0]), columns, pairs[0])
        for name in asked:
            yield name, _numbers(found[name][0], columns, pairs[0])

    def _of_weights(self, case: Case, method: Asked, wanted: Tensor, found: dict[str, dict[str, Any]]) -> None:
        columns = wanted.nonzero()[:, 0].tolist()
        for layer, key in self._layers:
            weights = channel_weights(
                self.model,
                case.image,
                method.name,
                layer,
                columns,
                logits=self.plan.logits,
                reshape=self.plan.reshape,
                call=self._call,
                **method.options,
            )
            numbers = _numbers(channel_sparseness(weights)[0], columns, torch.ones(len(columns), dtype=torch.bool))
            found.setdefault(key, {})["channel_sparseness"] = numbers

    def _columns(self, wanted: Tensor, case: str) -> list[int]:
        """The wanted labels, and some others to set them against, the same for every method."""
        columns = wanted.nonzero()[:, 0].tolist()
        if not {"class_sensitivity", "kendall_tau"} & set(self.plan.measures):
            return columns
        others = (~wanted).nonzero()[:, 0].tolist()
        if self.plan.contrast_labels is not None and len(others) > self.plan.contrast_labels:
            # Spread over the labels, and not the same ones for every case.
            start = sum(case.encode()) % len(others)
            turned = others[start:] + others[:start]
            step = len(others) / max(self.plan.contrast_labels, 1)
            others = [turned[int(i * step)] for i in range(self.plan.contrast_labels)]
        return sorted([*columns, *others])

    def _maps(self, case: Case, method: Asked, columns: list[int]) -> Iterator[tuple[str, list[int], Tensor]]:
        """Layer, columns and maps (1, n, *S'), as many labels at once as memory allows."""
        chunk = self._chunk(case, method, columns)
        for start in range(0, len(columns), chunk):
            part = columns[start : start + chunk]
            each = self._explain(case, method, part)
            for layer, maps in each.items():
                if maps.ndim < 3 or maps.shape[2:].numel() < 2:
                    raise InputError(
                        f"layer {layer!r} has a single cell on case {case.id!r}, so its maps cannot say where: choose "
                        "an earlier layer (camtrain layers, or ct.layers, lists them) or larger images"
                    )
                yield layer, part, maps

    def _sums_of_maps(self, case: Case, method: Asked, columns: list[int]) -> dict[str, SumOfMaps]:
        """What a label's map is set against, where the maps of a case come in parts; then they are made twice."""
        if "class_sensitivity" not in self.plan.measures or self._chunk(case, method, columns) >= len(columns):
            return {}
        sums: dict[str, SumOfMaps] = {}
        for layer, _, maps in self._maps(case, method, columns):
            sums[layer] = sums.get(layer, SumOfMaps()).plus(maps)
        return sums

    def _explain(self, case: Case, method: Asked, columns: list[int]) -> dict[str, Tensor]:
        each: dict[str, Tensor] = explain(
            self.model,
            case.image,
            method.name,
            layer=[layer for layer, _ in self._layers],
            labels=columns,
            size="image" if self.plan.at == "image" else None,
            logits=self.plan.logits,
            reshape=self.plan.reshape,
            call=self._call,
            **method.options,
        )
        return each

    def _find_layers(self, image: Tensor) -> None:
        """Names of the layers, once; the search for the last feature map costs a forward."""
        if self._layers:
            return
        with asking(self.model, image):
            wanted = [(layer, WantedLayer.of(self.model, image, layer)) for layer in self.plan.layers]
        if self.plan.layers == [None]:
            # A shared activation module counts by its last call.
            self._layers, self._call = [(wanted[0][1].key, wanted[0][1].key)], -1
        else:
            self._layers = [(layer, w.key) for layer, w in wanted]

    def _chunk(self, case: Case, method: Asked, columns: list[int]) -> int:
        """Labels at once; how large maps are is learned once from a single label."""
        if self.plan.at == "image" or method.row.family == "guided":
            self._share_of_voxels[method.key] = float(len(self.plan.layers))
        elif method.key not in self._share_of_voxels:
            cells = sum(maps.numel() for maps in self._explain(case, method, columns[:1]).values())
            self._share_of_voxels[method.key] = cells / case.image[0, 0].numel()
        one = self._share_of_voxels[method.key] * case.image[0, 0].numel() * 4
        return max(1, min(len(columns), int(MAP_BYTES / max(one, 1.0))))


def _tau(sums: Mapping[int, float], scores: Tensor) -> float | None:
    """Rank agreement of the sums of maps (label -> sum) and the logits (1, L); None where undefined."""
    of_maps = torch.tensor([list(sums.values())], dtype=torch.float64)
    logits = scores[:, list(sums)].double().cpu()
    known = of_maps.isfinite() & logits.isfinite()
    found: float | None = _number(kendall_tau(of_maps.nan_to_num(), logits, known)[0])
    return found


def _on_even_shares(curve: Tensor, share: Tensor) -> Tensor:
    """(L, T) probabilities at even shares, for mean curves; the areas are those of the real shares."""
    even = np.linspace(0, 1, curve.shape[1])
    rows = [np.interp(even, s, c) for s, c in zip(share.cpu().numpy(), curve.cpu().numpy(), strict=True)]
    return torch.from_numpy(np.stack(rows))


def _cell_spacing(spacing: Tensor, voxels: Sequence[int], cells: Sequence[int]) -> Tensor:
    """(B, rank) mm per cell of the maps."""
    ratio = torch.tensor([v / c for v, c in zip(voxels, cells, strict=True)], dtype=spacing.dtype)
    return spacing * ratio.to(spacing.device)


def _numbers(values: Tensor, columns: Sequence[int], counted: Tensor) -> dict[int, Any]:
    """Of the counted labels; None where undefined."""
    rows = zip(columns, values.tolist(), counted.tolist(), strict=True)
    return {column: _number(value) for column, value, counts in rows if counts}


def _number(value: Any) -> Any:
    """Nine digits, as many as float32 has; None for NaN. Curves stay exact: thresholds are chosen where they tie."""
    if isinstance(value, list):
        return None if any(math.isnan(v) for v in value) else value
    number = float(value)
    return None if math.isnan(number) else float(f"{number:.9g}")
