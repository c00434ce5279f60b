"""OcclusionCorrelation: does a map rank places as hiding them does?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.metrics._pair_metric import Average, LabelMetric, counted_pairs, sum_dtype
from camtrain.metrics._ranks import rank_correlation


class OcclusionCorrelation(LabelMetric):
    """Mean Spearman correlation between a map and the occlusion map of the same label.

    The faithfulness score of Grad-CAM (Selvaraju et al., 2017, section on faithfulness): occlusion asks the network
    itself, patch by patch, and needs no layer; a map that ranks the patches alike is faithful to what the network does
    locally. 1 is the same order, 0 none. It judges by the patch: evidence that is spread over more than a patch, or
    that is there twice, does not fall when one patch is hidden, and no map can be right about it.

    As input to `update`: maps (B, L, *P) on the grid of the patches (`camtrain.evaluation.occlusion.pool_to_patches`),
    NaN in every cell where not computed; occlusion (B, L, *P), falls of the logits (`occlusion_map`); label (B, L),
    NaN = unknown, optional: with it, only present labels count. A constant or broken map or occlusion map has no
    correlation: counted by `undefined_rate()`.

    Args:
        num_labels: L.
        average: `"none"`, `"macro"` (over labels) or `"micro"` (over pairs).
        kwargs: Passed to `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = OcclusionCorrelation(num_labels=1)
        >>> metric.update(torch.tensor([[[0.0, 1.0, 5.0]]]), torch.tensor([[[-0.5, 2.0, 3.0]]]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    higher_is_better = True
    occlusion_correlation: Tensor

    def __init__(self, num_labels: int, average: Average = "macro", **kwargs: Any) -> None:
        super().__init__(num_labels, average, **kwargs)
        self._add_sum("occlusion_correlation")

    def update(self, maps: Tensor, occlusion: Tensor, label: Tensor | None = None) -> None:
        """Add one batch; see the class for shapes.

        Raises:
            InputError: Shapes, types or label values break the contract.
        """
        score, counted = _scores(maps, occlusion, label, self.num_labels)
        column, score = counted.nonzero(as_tuple=True)[1], score[counted]
        self._count(score.isnan(), column)
        self._sum_up("occlusion_correlation", score.nan_to_num(0.0), column)

    def _totals(self) -> tuple[Tensor, Tensor]:
        return self.occlusion_correlation, self.counted - self.undefined


def occlusion_correlation(maps: Tensor, occlusion: Tensor, label: Tensor | None = None) -> Tensor:
    """Spearman correlation of each map with its occlusion map; functional twin of `OcclusionCorrelation`.

    Args:
        maps: (B, L, *P) signed maps on the grid of the patches, NaN in every cell where not computed.
        occlusion: (B, L, *P) falls of the logits.
        label: (B, L), NaN = unknown, optional: score present labels only.

    Returns:
        (B, L) in [-1, 1], NaN where the pair does not count, or one of the two is constant or broken.

    Raises:
        InputError: Shapes, types or label values break the contract.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[0.0, 1.0, 5.0], [2.0, 2.0, 2.0]]])
        >>> occlusion_correlation(maps, torch.tensor([[[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]]))
        tensor([[-1., nan]], dtype=torch.float64)
    """
    score, counted = _scores(maps, occlusion, label)
    return score.masked_fill(~counted, torch.nan)


def _scores(
    maps: Tensor, occlusion: Tensor, label: Tensor | None, num_labels: int | None = None
) -> tuple[Tensor, Tensor]:
    """(B, L) correlations, NaN where undefined, and (B, L) bool: which pairs count."""
    for values in (maps, occlusion):
        if values.ndim < 3 or not values.is_floating_point() or values.shape != maps.shape or 0 in maps.shape[2:]:
            raise InputError(
                f"expected maps and occlusion of one shape (B, L, *P) in floating point, got {tuple(maps.shape)} in "
                f"{maps.dtype} and {tuple(occlusion.shape)} in {occlusion.dtype}: bring the maps to the patches with "
                "pool_to_patches()"
            )
    flat = maps.detach().as_subclass(Tensor).flatten(2)
    counted = counted_pairs(~flat.isnan().all(dim=2), label, num_labels)
    other = occlusion.detach().as_subclass(Tensor).flatten(2).to(flat.device)
    score = torch.full(counted.shape, torch.nan, dtype=sum_dtype(), device=flat.device)
    score[counted] = rank_correlation(flat[counted], other[counted])
    return score, counted
