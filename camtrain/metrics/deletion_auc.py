"""DeletionAUC: how fast does a probability fall when the voxels that the map ranks highest are replaced first?"""

from __future__ import annotations

from torch import Tensor

from camtrain.metrics._curve import CurveMetric, areas, checked_curves


class DeletionAUC(CurveMetric):
    """Area under the probability against the share of voxels replaced, the highest of the map first; lower is better.

    The curve runs from the probability of the image (share 0) to that of the baseline (share 1), and its area is
    taken by the trapezoid rule (Petsiuk et al., RISE, 2018). A map that finds what the network uses makes it fall at
    once. Probabilities are left raw: the area depends on how sure the network is and on the baseline, so compare maps
    of one network and one baseline. Images with voxels replaced are unlike those that the network was trained on.

    As input to `update`: curve (B, L, T) probabilities, NaN everywhere where not computed; share (B, L, T) or (T,),
    from 0 to 1; label (B, L), NaN = unknown: pairs with a present label and a computed curve count. A curve with NaN in
    some of its points has no area (a constant map ranks no voxels): it is counted by `undefined_rate()`.

    Args:
        num_labels: L.
        average: `"none"`, `"macro"` (over labels) or `"micro"` (over pairs).
        num_points: Shares at which `curve()` tells the mean curve, evenly from 0 to 1.
        kwargs: Passed to `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = DeletionAUC(num_labels=1, num_points=3)
        >>> share = torch.tensor([0.0, 0.5, 1.0])
        >>> metric.update(torch.tensor([[[0.9, 0.3, 0.1]]]), share, label=torch.ones(1, 1))
        >>> metric.compute()
        tensor(0.4000, dtype=torch.float64)
        >>> metric.curve()
        tensor([[0.9000, 0.3000, 0.1000]], dtype=torch.float64)
    """

    higher_is_better = False
    deletion_area: Tensor
    deletion_area_curve: Tensor

    def _area_name(self) -> str:
        return "deletion_area"


def deletion_auc(curve: Tensor, share: Tensor, label: Tensor) -> Tensor:
    """Area under each curve; functional twin of `DeletionAUC`.

    Args:
        curve: (B, L, T) probabilities, NaN everywhere where not computed.
        share: (B, L, T) or (T,), share of voxels replaced, from 0 to 1.
        label: (B, L), NaN = unknown.

    Returns:
        (B, L), NaN where the pair does not count or its curve has NaN points.

    Raises:
        InputError: Shapes, types or values break the contract.

    Example:
        >>> import torch
        >>> deletion_auc(torch.tensor([[[0.9, 0.3, 0.1]]]), torch.tensor([0.0, 0.5, 1.0]), torch.ones(1, 1))
        tensor([[0.4000]], dtype=torch.float64)
    """
    counted, curve, share = checked_curves(curve, share, label)
    return areas(curve, share).masked_fill(~counted, float("nan"))
