"""The scores of one split in one epoch: which measures, for which methods, under which keys."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from camtrain._errors import InputError
from camtrain._label_rates import label_rates
from camtrain.callbacks._alarm_seen import ALL
from camtrain.callbacks._memory import out_of_memory
from camtrain.callbacks._scored_share import ScoredShare
from camtrain.callbacks._waiting_rows import WaitingRows
from camtrain.metrics import (
    ClassSensitivity,
    EmptyMapRate,
    EnergyInside,
    LabelAUROC,
    MaskIoU,
    OrganIoU,
    PointingGame,
    RelevanceRank,
    SamePlace,
    SumToScore,
    label_auroc,
)
from camtrain.metrics._pair_metric import sum_dtype, synced
from camtrain.metrics._pairs import select_pairs
from camtrain.reporting.run_dir import MEAN

_MAPS, _ALLOWED = "maps of ", "allowed of "
# Measure -> is more better? None: neither. For tables and for whoever sets `monitor=`.
MEASURES: dict[str, bool | None] = {
    "auroc": True,
    "auprc": True,
    "calibration_error": False,
    "organ_iou": True,
    "energy_inside": True,
    "pointing_game": True,
    "mask_iou": True,
    "relevance_rank": True,
    "empty_map_rate": False,
    "class_sensitivity": False,
    "sum_to_score_l1": False,
    "bias_share": None,
    "outside_share": False,
    "outside_pull": False,
    "inside_pull": True,
    "mid_energy_inside": True,
    "last_energy_inside": True,
    "scored_share": None,
}


@dataclass(frozen=True)
class Score:
    """One number.

    Attributes:
        measure: A key of `MEASURES`, with `_micro` or `_chance` where it is that.
        method: Attention method, or None for what needs no map.
        label: Label name, or None for the mean over labels.
        value: The number, never NaN.
    """

    measure: str
    method: str | None
    label: str | None
    value: float

    def key(self, split: str, first_method: str, name: str | None = None) -> str:
        """The logged key: `val/organ_iou`, `val/organ_iou@gradcam/nodule`, `val/<name>/auroc`.

        Example:
            >>> Score("organ_iou", "gradcam", "nodule", 0.5).key("val", first_method="hirescam")
            'val/organ_iou@gradcam/nodule'
        """
        parts = [split, name, self.heading(first_method), self.label]
        return "/".join(part for part in parts if part)

    def heading(self, first_method: str) -> str:
        """Measure and method, as in the key and above a column of a table.

        Example:
            >>> Score("organ_iou", "gradcam", None, 0.5).heading(first_method="hirescam")
            'organ_iou@gradcam'
        """
        return self.measure if self.method in (None, first_method) else f"{self.measure}@{self.method}"


class ScoreBook:
    """The torchmetrics of one split.

    Args:
        names: Label names.
        methods: Attention methods.
        with_organs: Is there anatomy to compare maps with?
        device: Where the states live.
        thresholds: Method -> (L,) OrganIoU thresholds frozen on validation; None sweeps and takes the best.
        with_sums: Are maps those of a single layer, so that their sums can be compared with logits?
    """

    def __init__(
        self,
        names: Sequence[str],
        methods: Sequence[str],
        with_organs: bool,
        device: torch.device,
        thresholds: Mapping[str, Tensor] | None = None,
        with_sums: bool = True,
    ) -> None:
        refuse_names(names)
        self.names = list(names)
        self.methods = list(methods)
        count = len(self.names)
        self.auroc = LabelAUROC(count, average="none").to(device)
        self.share = ScoredShare(count, average="none").to(device)
        self.maps: dict[str, dict[str, Any]] = {}
        for method in self.methods if with_organs else []:
            frozen = None if thresholds is None else thresholds.get(method)
            self.maps[method] = {
                "organ_iou": OrganIoU(count, average="none", thresholds=frozen).to(device),
                "energy_inside": EnergyInside(count, average="none").to(device),
                "pointing_game": PointingGame(count, average="none").to(device),
                "mask_iou": MaskIoU(count, average="none").to(device),
                "relevance_rank": RelevanceRank(count, average="none").to(device),
                "empty_map_rate": EmptyMapRate(count, average="none").to(device),
            }
        # What alarms look at and nobody logs, of the first method.
        self.places = SamePlace(count).to(device) if with_organs else None
        self.alone = {method: ClassSensitivity(count, average="none").to(device) for method in self.methods}
        self.sums = {method: SumToScore(count).to(device) for method in self.methods if with_sums}
        self._waiting, self._told = WaitingRows(), False

    def update_logits(self, logits: Tensor, label: Tensor) -> None:
        """Count what one batch was said to be: (B, L) each, NaN = unknown."""
        self.auroc.update(logits, label)

    def update(
        self,
        maps: Mapping[str, Tensor],
        allowed: Mapping[str, Tensor] | None,
        label: Tensor,
        has_organs: Tensor,
        logits: Tensor,
    ) -> None:
        """Count the maps of one batch, a small one together with those that come; `maps` and `allowed` by method."""
        words = {"label": label, "has_organs": has_organs, "logits": logits}
        regions = {} if allowed is None else {f"{_ALLOWED}{method}": each for method, each in allowed.items()}
        fresh = {f"{_MAPS}{method}": each for method, each in maps.items()} | regions | words
        if not self._waiting.take(fresh):
            self._count(fresh)

    def _count(self, rows: Mapping[str, Tensor]) -> None:
        """Count maps and regions by method, each pair on a grid of its own."""
        label, has_organs, logits = rows["label"], rows["has_organs"], rows["logits"]
        for method in [name.removeprefix(_MAPS) for name in rows if name.startswith(_MAPS)]:
            maps, allowed = rows[f"{_MAPS}{method}"], rows.get(f"{_ALLOWED}{method}")
            self.alone[method].update(maps, label)
            if method in self.sums:
                self.sums[method].update(maps, logits)
            if allowed is not None:
                # Chosen once for all: with many labels that is most of what a score costs.
                pairs = select_pairs(maps, allowed, label, has_organs, len(self.names))
                for metric in self.maps[method].values():
                    metric.update_pairs(pairs)
                if self.places is not None and method == self.methods[0]:
                    self.places.update_pairs(pairs)

    def settle(self) -> None:
        """Count the maps that wait: all at once, where memory ends in that one by one, without those that do not fit.

        Where anything else fails, none of them are counted, and they go on waiting.
        """
        if not len(self._waiting):
            return
        states, rows = self._states(), self._waiting.waiting()
        try:
            try:
                self._count(rows)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                self._set(states)
                self._one_by_one(rows)
        except Exception:
            self._set(states)
            raise
        self._waiting.cut()

    def _one_by_one(self, rows: Mapping[str, Tensor]) -> None:
        lost = 0
        for row in range(len(self._waiting)):
            states = self._states()
            try:
                self._count({name: each[row : row + 1] for name, each in rows.items()})
            except Exception as error:
                self._set(states)
                if not out_of_memory(error):
                    raise
                lost += 1
        if lost and not self._told:
            self._told = True
            warnings.warn(
                f"camtrain: memory ended in AttentionMonitor, training goes on: {lost} case(s) are left out of the "
                "scores of maps of this epoch, and from now on all for which it does not suffice",
                RuntimeWarning,
                stacklevel=2,
            )

    def reset(self) -> None:
        """Begin anew."""
        self._waiting.cut()
        for metric in [self.auroc, *self._of_maps()]:
            metric.reset()

    def kept(self) -> tuple[int, list[dict[str, Any]]]:
        """What maps have counted so far, to go back to. What waits is counted here, if at all: not in between."""
        if self._waiting.half_full:
            self.settle()
        return len(self._waiting), self._states()

    def restore(self, kept: tuple[int, Sequence[Mapping[str, Any]]]) -> None:
        """Go back to what `kept` gave."""
        self._waiting.cut(kept[0])
        self._set(kept[1])

    def _states(self) -> list[dict[str, Any]]:
        """Updates replace the tensors of a state, so this is no copy."""
        return [{name: getattr(m, name) for name in (*m._defaults, "_update_count")} for m in self._of_maps()]

    def _set(self, states: Sequence[Mapping[str, Any]]) -> None:
        for metric, state in zip(self._of_maps(), states, strict=True):
            for name, value in state.items():
                setattr(metric, name, value)
            metric._computed = None

    def _of_maps(self) -> list[Any]:
        of_maps = [metric for metrics in self.maps.values() for metric in metrics.values()]
        places = [] if self.places is None else [self.places]
        return [self.share, *of_maps, *self.alone.values(), *self.sums.values(), *places]

    def thresholds(self, methods: Sequence[str]) -> dict[str, Tensor]:
        """Method -> (L,) OrganIoU thresholds of this split (all processes must call it together)."""
        self.settle()
        return {m: metrics["organ_iou"].best_thresholds().cpu() for m, metrics in self.maps.items() if m in methods}

    def beside(self) -> dict[str, dict[str, float]]:
        """Figures per label that alarms need beside the scores (all processes must call it together)."""
        if self.places is None:
            return {}
        self.settle()
        chance = self.maps[self.methods[0]]["energy_inside"].chance("none").double().cpu().tolist()
        with synced(self.places):
            pooled, share = float(self.places.pooled()), self.places.averaged("none").double().cpu().tolist()
            maps = (self.places.counted - self.places.undefined).cpu().tolist()
        return {
            "energy_inside_chance": _defined(zip(self.names, chance, strict=True)),
            "same_place": _defined([(ALL, pooled), *zip(self.names, share, strict=True)]),
            "same_place_maps": _defined(zip(self.names, maps, strict=True)),
        }

    def compute(self, methods: Sequence[str]) -> list[Score]:
        """All defined scores of these methods, in a fixed order (all processes must call it together)."""
        if methods:
            self.settle()
        logits, label = self.auroc.rows()
        try:
            scores = self._of_logits(logits, label)
        except Exception as error:
            if not out_of_memory(error) or logits.device.type == "cpu":
                raise
            # All rows are sorted at once here: the one large thing at the end of an epoch, which the host can do too.
            scores = self._of_logits(logits.cpu(), label.cpu())
        for method in self.methods:
            if method in methods:
                scores += self._of_method(method)
        return [*scores, *self._of_share()]

    def _of_logits(self, logits: Tensor, label: Tensor) -> list[Score]:
        probability = logits.to(sum_dtype()).sigmoid()
        scores = list(self._spread("auroc", None, label_auroc(logits, label)))
        for name in ("auprc", "calibration_error"):
            scores += self._spread(name, None, label_rates(name, probability, label))
        return scores

    def _of_method(self, method: str) -> Iterator[Score]:
        metrics = self.maps.get(method, {})
        for measure, metric in metrics.items():
            yield from self._spread(measure, method, metric.averaged("none"))
        yield from self._spread("class_sensitivity", method, self.alone[method].averaged("none"))
        if method in self.sums:
            yield from self._spread("sum_to_score_l1", method, self.sums[method].l1_per_label())
            yield from self._spread("bias_share", method, self.sums[method].bias_share_per_label())
        if metrics:
            yield from self._single("organ_iou_micro", method, metrics["organ_iou"].averaged("micro"))
            yield from self._single("energy_inside_chance", method, metrics["energy_inside"].chance("macro"))

    def _of_share(self) -> Iterator[Score]:
        """Of the present labels, which part was scored; nothing where all were."""
        share = self.share.averaged("none")
        if bool((share < 1).any()):
            yield from self._spread("scored_share", None, share)

    def _spread(self, measure: str, method: str | None, values: Tensor) -> Iterator[Score]:
        numbers = values.double().cpu()
        yield from self._single(measure, method, numbers.nanmean())
        for name, number in zip(self.names, numbers.tolist(), strict=True):
            if number == number:
                yield Score(measure, method, name, number)

    def _single(self, measure: str, method: str | None, value: Tensor) -> Iterator[Score]:
        """Undefined is left out: a NaN under a monitored key stops training."""
        number = float(value)
        if number == number:
            yield Score(measure, method, None, number)


def refuse_names(names: Sequence[str]) -> None:
    """Label names that mean something else in `scores.csv`, where the mean over labels is the row `mean`.

    Raises:
        InputError: There is one.

    Example:
        >>> refuse_names(["nodule", "mean arterial pressure"])
    """
    taken = [name for name in names if name in ("", MEAN)]
    if taken:
        raise InputError(
            f"expected label names other than 'mean' and '', got {', '.join(map(repr, taken))}: in scores.csv and the "
            "report 'mean' is the mean over labels; rename the label in the data module, the module's labels or "
            "names=, and in the organ table"
        )


def _defined(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    return {name: value for name, value in values if value == value}


def warn_of_thresholds(split: str, methods: Sequence[str], known: Mapping[str, Tensor]) -> None:
    """Say of which methods a test must choose OrganIoU's thresholds on the very cases that it scores."""
    missing = [name for name in methods if name not in known]
    if missing:
        which = "" if len(missing) == len(methods) else f" of {', '.join(missing)}"
        ran = "no validation has run" if not which else "no validation has scored them"
        rank_zero_warn(f"camtrain: {ran}, so OrganIoU thresholds{which} are chosen on {split!r} itself")
