"""OrganIoU: how much of the attended area lies in the allowed organs, at a threshold chosen per label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from camtrain._errors import InputError, nearest
from camtrain.metrics._pair_metric import Average, PairMetric, check_num_labels, sum_dtype, synced
from camtrain.metrics._pairs import Pairs, select_pairs

# The 53 values that the authors of HiResCAM try.
THRESHOLDS = (0.004, 0.008, 0.012, 0.016, *(round(0.02 * step, 2) for step in range(1, 50)))
# For labels that were never seen while thresholds were chosen.
DEFAULT_THRESHOLD = 0.5
Thresholds = float | Sequence[float] | Tensor | Mapping[str, float]
# Cells handled at once: the keys of the histogram take eight bytes each.
_CELLS = 1 << 22


class OrganIoU(PairMetric):
    r"""Share of the attended cells that lie in the allowed region (Draelos & Carin, HiResCAM, 2020).

    A map is clipped at zero, shifted to a minimum of 0 and divided by its maximum; attended is what then lies
    strictly above a threshold t. With a attended cells inside and b outside,

    .. math:: \text{OrganIoU} = a / (a + b).

    This is a precision, whatever its name says: organ cells without attention cost nothing. A map that has nothing
    attended at any threshold (no positive cell, or a constant one) is undefined and counted by `undefined_rate()`.

    Thresholds belong to labels. With `thresholds=None` each label takes, out of the authors' 53 values, the one with
    the highest mean over its own pairs (the first of equals): do this on validation data. For test data freeze them:
    `OrganIoU(..., thresholds=validated.best_thresholds())`, or by name, which also refuses thresholds of other labels:
    `OrganIoU(..., thresholds=validated.named_thresholds(labels), labels=labels)`.

    As input to `update`: maps (B, L, *S') signed, NaN where not computed; allowed (B, L, *S'') bool; label (B, L),
    NaN = unknown; has_organs (B,) bool, optional.

    Args:
        num_labels: L.
        average: `"none"`, `"macro"` (over labels) or `"micro"` (over pairs, the paper's overall mean).
        thresholds: None, one number in [0, 1), one per label, or label name -> number with `labels`.
        authors_edge_case: Score as the published code does: 0 instead of 1 where everything attended lies inside,
            and 0 instead of undefined for empty maps.
        labels: Names in the order of the outputs; needed for thresholds by name.
        kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        InputError: Thresholds out of range, or made for other labels.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[9.0, 6.0, 3.0, -2.0]]])
        >>> allowed = torch.tensor([[[True, False, False, True]]])
        >>> metric = OrganIoU(num_labels=1, thresholds=0.5)
        >>> metric.update(maps, allowed, label=torch.ones(1, 1))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
        >>> swept = OrganIoU(num_labels=1)
        >>> swept.update(maps, allowed, label=torch.ones(1, 1))
        >>> swept.compute(), swept.best_thresholds()
        (tensor(1., dtype=torch.float64), tensor([0.6800], dtype=torch.float64))
    """

    higher_is_better = True
    organ_iou: Tensor
    frozen: Tensor | None

    def __init__(
        self,
        num_labels: int,
        average: Average = "macro",
        thresholds: Thresholds | None = None,
        authors_edge_case: bool = False,
        labels: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        names = None if labels is None else _checked_names(labels, check_num_labels(num_labels))
        frozen = None if thresholds is None else _per_label(thresholds, check_num_labels(num_labels), names)
        settings = [float(authors_edge_case), *([] if frozen is None else frozen.tolist())]
        super().__init__(num_labels, average, settings=settings, **kwargs)
        self.authors_edge_case, self.labels = authors_edge_case, names
        self.register_buffer("frozen", frozen, persistent=False)
        self._add_sum("organ_iou", len(THRESHOLDS) if frozen is None else 1)

    def _add(self, pairs: Pairs) -> None:
        self._record("organ_iou", _scores(pairs, self.frozen, self.authors_edge_case), pairs)

    def best_thresholds(self) -> Tensor:
        """Threshold of each label (L,): the frozen one, or the best so far (all processes must call it together).

        A label without any scored pair gets `DEFAULT_THRESHOLD`, 0.5.
        """
        if self.frozen is not None:
            return self.frozen.clone()
        with synced(self):
            best = _best(self.organ_iou, self.counted - self.undefined)
        return torch.tensor(THRESHOLDS, dtype=sum_dtype(), device=best.device)[best]

    def named_thresholds(self, labels: Sequence[str] | None = None) -> dict[str, float]:
        """`best_thresholds()` by label name, to freeze for test data (all processes must call it together).

        Args:
            labels: Names in the order of the outputs. None: those given at construction.

        Returns:
            Label name -> threshold.

        Raises:
            InputError: No names, another number of them, or the same name twice.
        """
        if labels is None and self.labels is None:
            raise InputError(
                "thresholds by name need the names of the labels: pass labels= in the order of the outputs"
            )
        names = self.labels if labels is None else _checked_names(labels, self.num_labels)
        return dict(zip(names or (), self.best_thresholds().tolist(), strict=True))

    def _totals(self) -> tuple[Tensor, Tensor]:
        count = self.counted - self.undefined
        if self.frozen is not None:
            return self.organ_iou[:, 0], count
        return self.organ_iou.gather(1, _best(self.organ_iou, count)[:, None])[:, 0], count


def organ_iou(
    maps: Tensor,
    allowed: Tensor,
    label: Tensor,
    has_organs: Tensor | None = None,
    thresholds: Thresholds | None = None,
    authors_edge_case: bool = False,
    labels: Sequence[str] | None = None,
) -> Tensor:
    """Share of the attended cells that lie in the allowed region, per pair; functional twin of `OrganIoU`.

    Args:
        maps: (B, L, *S') signed maps, NaN where not computed.
        allowed: (B, L, *S'') bool.
        label: (B, L), NaN = unknown.
        has_organs: (B,) bool, optional.
        thresholds: One number in [0, 1), one per label, label name -> number with `labels`, or None = the best for
            each label on these very pairs.
        authors_edge_case: As for `OrganIoU`.
        labels: Names in the order of the outputs; needed for thresholds by name.

    Returns:
        (B, L), NaN where the pair does not count or nothing is attended.

    Raises:
        InputError: Wrong thresholds, or shapes, types or label values that break the contract.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[9.0, 6.0, 3.0, -2.0]]])
        >>> organ_iou(maps, torch.tensor([[[True, False, False, True]]]), torch.ones(1, 1), thresholds=0.5)
        tensor([[0.5000]], dtype=torch.float64)
    """
    pairs = select_pairs(maps, allowed, label, has_organs)
    number = label.shape[1]
    names = None if labels is None else _checked_names(labels, number)
    if thresholds is not None:
        frozen = _per_label(thresholds, number, names).to(maps.device)
        return pairs.spread(_scores(pairs, frozen, authors_edge_case)[:, 0])
    score = pairs.mark(_scores(pairs, None, authors_edge_case))
    total = score.new_zeros(number, len(THRESHOLDS)).index_add(0, pairs.label, score.nan_to_num(0.0))
    count = score.new_zeros(number).index_add(0, pairs.label, (~score[:, 0].isnan()).to(score.dtype))
    best = _best(total, count)
    return pairs.spread(score.gather(1, best[pairs.label, None])[:, 0])


def organ_iou_curve(
    maps: Tensor,
    allowed: Tensor,
    label: Tensor,
    has_organs: Tensor | None = None,
    authors_edge_case: bool = False,
) -> Tensor:
    """`organ_iou` at each of the 53 thresholds, per pair: what a choice of thresholds is made from.

    Args:
        maps: (B, L, *S') signed maps, NaN where not computed.
        allowed: (B, L, *S'') bool.
        label: (B, L), NaN = unknown.
        has_organs: (B,) bool, optional.
        authors_edge_case: As for `OrganIoU`.

    Returns:
        (B, L, 53), NaN where the pair does not count or nothing is attended.

    Raises:
        InputError: Shapes, types or label values break the contract.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[9.0, 6.0, 3.0, -2.0]]])
        >>> curve = organ_iou_curve(maps, torch.tensor([[[True, False, False, True]]]), torch.ones(1, 1))
        >>> curve[0, 0, THRESHOLDS.index(0.5)].item(), curve[0, 0, -1].item()
        (0.5, 1.0)
    """
    pairs = select_pairs(maps, allowed, label, has_organs)
    score = pairs.mark(_scores(pairs, None, authors_edge_case))
    return torch.stack([pairs.spread(column) for column in score.unbind(dim=1)], dim=2)


def clip_and_norm(maps: Tensor) -> Tensor:
    """Clip at zero, shift to a minimum of 0, divide by the maximum; what is zero everywhere stays zero.

    Args:
        maps: (P, N) float.

    Returns:
        (P, N) in [0, 1].

    Example:
        >>> import torch
        >>> clip_and_norm(torch.tensor([[-1.0, 0.0, 2.0, 4.0], [3.0, 3.0, 3.0, 3.0]]))
        tensor([[0.0000, 0.0000, 0.5000, 1.0000],
                [0.0000, 0.0000, 0.0000, 0.0000]])
    """
    positive = maps.relu()
    positive = positive - positive.amin(dim=1, keepdim=True)
    top = positive.amax(dim=1, keepdim=True)
    return positive / top.masked_fill(top == 0, 1.0)


def _scores(pairs: Pairs, frozen: Tensor | None, authors_edge_case: bool) -> Tensor:
    """(P, 53), or (P, 1) at the frozen thresholds (L,)."""
    heights = clip_and_norm(pairs.maps)
    if frozen is None:
        inside, outside = _areas(heights, pairs.allowed)
    else:
        attended = heights > frozen.to(heights.dtype)[pairs.label, None]
        inside = (attended & pairs.allowed).sum(dim=1, keepdim=True)
        outside = (attended & ~pairs.allowed).sum(dim=1, keepdim=True)
    # The maximum is exactly 1, above every threshold: a map attends to nothing at one of them or at all.
    share = inside.to(sum_dtype()) / (inside + outside)
    return share.masked_fill((inside == 0) | (outside == 0), 0.0) if authors_edge_case else share


def _areas(heights: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Cells strictly above each of the 53 thresholds, inside and outside the allowed region, (P, 53) each.

    One histogram per pair instead of 53 comparisons. Bin j holds the cells above exactly j thresholds.
    """
    edges = torch.tensor(THRESHOLDS, dtype=heights.dtype, device=heights.device)
    bins = len(THRESHOLDS) + 1
    step = max(1, _CELLS // heights.shape[1])
    counts = []
    for start in range(0, len(heights), step):
        part = slice(start, start + step)
        key = torch.bucketize(heights[part], edges).add_(allowed[part], alpha=bins)
        key += 2 * bins * torch.arange(len(key), device=key.device)[:, None]
        counts.append(torch.bincount(key.flatten(), minlength=2 * bins * len(key)).reshape(-1, 2, bins))
    if not counts:
        nothing = torch.zeros(0, len(THRESHOLDS), dtype=torch.long, device=heights.device)
        return nothing, nothing
    above = torch.cat(counts).flip(2).cumsum(dim=2).flip(2)[:, :, 1:]
    return above[:, 1], above[:, 0]


def _best(total: Tensor, count: Tensor) -> Tensor:
    """Column of the highest mean per label (L,), the first of equals."""
    mean = total / count.clamp(min=1)[:, None]
    # Sums in another order (two processes) differ in the last bits; equals must stay equal.
    slack = 1e-12 if total.dtype == torch.float64 else 1e-6
    first = (mean >= mean.amax(dim=1, keepdim=True) - slack).long().argmax(dim=1)
    return torch.where(count > 0, first, THRESHOLDS.index(DEFAULT_THRESHOLD))


def _per_label(thresholds: Thresholds, number: int, names: tuple[str, ...] | None = None) -> Tensor:
    """(L,) checked."""
    if isinstance(thresholds, Mapping):
        thresholds = _in_order(thresholds, names)
    values = torch.as_tensor(thresholds, dtype=sum_dtype()).detach()
    if values.ndim == 0:
        values = values.expand(number)
    if tuple(values.shape) != (number,):
        raise InputError(
            f"expected one threshold, or one for each of the {number} labels, got shape {tuple(values.shape)}: "
            "freeze the best_thresholds() of a metric with the same labels"
        )
    if not bool(((values >= 0) & (values < 1)).all()):
        raise InputError(f"expected thresholds in [0, 1), got {values.tolist()}: they are shares of a map's maximum")
    return values.clone()


def _in_order(thresholds: Mapping[str, float], names: tuple[str, ...] | None) -> list[float]:
    """One threshold per name."""
    if names is None:
        raise InputError("thresholds by name need labels=, the names of the labels in the order of the outputs")
    missing = [name for name in names if name not in thresholds]
    foreign = [name for name in thresholds if name not in names]
    if missing or foreign:
        kinds = {"no threshold for": missing, "unknown": foreign}
        found = "; ".join(f"{kind} {', '.join(map(repr, some))}" for kind, some in kinds.items() if some)
        hint = nearest(str(foreign[0]), names) if foreign else ""
        raise InputError(
            f"thresholds frozen for other labels, {found}{hint}: "
            "freeze the named_thresholds() of a metric with the same labels"
        )
    return [thresholds[name] for name in names]


def _checked_names(labels: Sequence[str], number: int) -> tuple[str, ...]:
    if isinstance(labels, str) or len(labels) != number or len(set(labels)) < number:
        raise InputError(
            f"expected labels= as {number} different names in the order of the outputs, got {labels!r}: "
            "pass the names that the network was trained with"
        )
    return tuple(labels)
