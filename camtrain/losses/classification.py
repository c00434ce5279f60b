"""Losses of the findings themselves, pair by pair: cross-entropy, focal, asymmetric; with class weights; NaN left out.

They go into `LitClassifier(loss=...)` as they are, and with `reduction="none"` into `OutsideSwap(loss=...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camtrain._errors import InputError

Reduction = Literal["mean", "none"]


class CrossEntropyLoss(nn.Module):
    """Binary cross-entropy of each pair, with class weights.

    Args:
        class_weights: (L,) factor of each label's present cases, such as `ManifestDataModule.class_weights`; None = 1.
        reduction: `"mean"` over the known pairs, a scalar; exactly 0, with a graph, when none is known. `"none"`:
            (B, L), 0 where a label is unknown.

    Raises:
        InputError: A weight that is not positive, or another reduction; in `forward`, shapes that do not fit.

    Example:
        >>> label = torch.tensor([[1.0, 0.0, float("nan")]])
        >>> CrossEntropyLoss(class_weights=[3.0, 1.0, 1.0], reduction="none")(torch.zeros(1, 3), label)
        tensor([[2.0794, 0.6931, 0.0000]])
    """

    class_weights: Tensor | None

    def __init__(self, class_weights: Sequence[float] | None = None, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.reduction = _checked(reduction)
        # Not in the state: a checkpoint of a model must open without its loss.
        self.register_buffer("class_weights", weights_of(class_weights), persistent=False)

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Loss of logits (B, L) and label (B, L) of 0, 1 and NaN = unknown, in float32 (float64 for float64)."""
        logits = _precise(logits, label)
        return reduce_pairs(-F.logsigmoid(logits), -F.logsigmoid(-logits), label, self.class_weights, self.reduction)


class FocalLoss(nn.Module):
    """Focal loss: pairs that are already right count less, by (1 - p_t)^gamma, p_t the probability of the truth.

    FL = -alpha_t (1 - p_t)^gamma log p_t

    Args:
        gamma: How much less; 0 is the cross-entropy.
        alpha: Weight of present pairs, 1 - alpha of absent ones (the paper's detector took 0.25); None = 1 for both.
        class_weights: As in `CrossEntropyLoss`, instead of or beside `alpha`.
        reduction: As in `CrossEntropyLoss`.

    Raises:
        InputError: As `CrossEntropyLoss`; a negative gamma, or alpha outside 0..1.

    Example:
        >>> loss = FocalLoss(gamma=2.0)
        >>> round(loss(torch.tensor([[0.0]]), torch.tensor([[1.0]])).item(), 4)  # 0.5 ** 2 * ln 2
        0.1733

    References:
        Lin, Goyal, Girshick, He, Dollar: Focal loss for dense object detection. ICCV 2017, equation 5.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float | None = None,
        class_weights: Sequence[float] | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.reduction = _checked(reduction)
        self.gamma, self.alpha = _power("gamma", gamma), alpha
        if alpha is not None and not 0 < alpha < 1:
            raise InputError(f"alpha= expects a number between 0 and 1, or None, got {alpha!r}")
        self.register_buffer("class_weights", weights_of(class_weights), persistent=False)

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Loss of logits (B, L) and label (B, L) of 0, 1 and NaN = unknown, in float32 (float64 for float64)."""
        logits = _precise(logits, label)
        present, absent = focal(logits, self.gamma), focal(-logits, self.gamma)
        if self.alpha is not None:
            present, absent = self.alpha * present, (1 - self.alpha) * absent
        return reduce_pairs(present, absent, label, self.class_weights, self.reduction)


class AsymmetricLoss(nn.Module):
    """Asymmetric loss (ASL): absent pairs are focused more than present ones, and those below a margin are dropped.

    L+ = -(1 - p)^gamma_pos log p;   L- = -p_m^gamma_neg log(1 - p_m),   p_m = max(p - margin, 0)

    Args:
        gamma_neg: Power for absent pairs.
        gamma_pos: Power for present pairs.
        margin: Probability below which an absent pair costs nothing.
        detach_focus: Let no gradient through the powers, as the authors' code does by default; the formula has it.
        class_weights: As in `CrossEntropyLoss`.
        reduction: As in `CrossEntropyLoss`.

    Raises:
        InputError: As `CrossEntropyLoss`; a negative power, or a margin outside 0..1.

    Example:
        >>> loss = AsymmetricLoss()
        >>> loss(torch.tensor([[-4.0]]), torch.tensor([[0.0]])).item()  # p = 0.018, below the margin
        0.0

    References:
        Ridnik, Ben-Baruch, Zamir, Noy, Friedman, Protter, Zelnik-Manor: Asymmetric loss for multi-label
        classification. ICCV 2021.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float = 1.0,
        margin: float = 0.05,
        detach_focus: bool = False,
        class_weights: Sequence[float] | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.reduction = _checked(reduction)
        self.gamma_neg, self.gamma_pos = _power("gamma_neg", gamma_neg), _power("gamma_pos", gamma_pos)
        if not 0 <= margin < 1:
            raise InputError(f"margin= expects a probability from 0 to below 1, got {margin!r}: 0.05 is usual")
        self.margin, self.detach_focus = margin, detach_focus
        self.register_buffer("class_weights", weights_of(class_weights), persistent=False)

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Loss of logits (B, L) and label (B, L) of 0, 1 and NaN = unknown, in float32 (float64 for float64)."""
        logits = _precise(logits, label)
        present = focal(logits, self.gamma_pos, self.detach_focus)
        absent = shifted_focal(logits, self.gamma_neg, self.margin, self.detach_focus)
        return reduce_pairs(present, absent, label, self.class_weights, self.reduction)


def focal(right: Tensor, gamma: float, detach_focus: bool = False) -> Tensor:
    """-(1 - p)^gamma log p of each pair, p the probability of the truth.

    Args:
        right: The logit of the truth, any shape.
        gamma: Power.
        detach_focus: Let no gradient through the power.

    Example:
        >>> focal(torch.tensor([0.0]), gamma=1.0)
        tensor([0.3466])
    """
    # The power of a logarithm: no 0 to the power of less than 1, whose derivative is infinite.
    factor = (gamma * F.logsigmoid(-right)).exp()
    return -F.logsigmoid(right) * (factor.detach() if detach_focus else factor)


def shifted_focal(logits: Tensor, gamma: float, margin: float, detach_focus: bool = False) -> Tensor:
    """-p_m^gamma log(1 - p_m) of each pair, p_m = max(p - margin, 0).

    Args:
        logits: Any shape.
        gamma: Power.
        margin: Taken off the probability.
        detach_focus: Let no gradient through the power.

    Example:
        >>> shifted_focal(torch.tensor([0.0]), gamma=1.0, margin=0.0)
        tensor([0.3466])
    """
    if margin == 0:
        return focal(-logits, gamma, detach_focus)
    shifted = (logits.sigmoid() - margin).clamp(min=0)
    # Below the margin all is 0; a tiny base keeps the derivative of the power finite there.
    factor = shifted.clamp(min=1e-12).pow(gamma)
    return -torch.log1p(-shifted) * (factor.detach() if detach_focus else factor)


def reduce_pairs(
    present: Tensor, absent: Tensor, label: Tensor, class_weights: Tensor | None, reduction: Reduction
) -> Tensor:
    """The loss that holds for each pair, weighted, without unknown ones.

    Args:
        present: (B, L) loss where the label is 1.
        absent: (B, L) loss where it is 0.
        label: (B, L) of 0, 1 and NaN.
        class_weights: (L,) factors of present pairs, or None.
        reduction: `"mean"` over the known pairs, or `"none"`.

    Raises:
        InputError: Another number of weights than of labels.
    """
    if class_weights is not None:
        if len(class_weights) != label.shape[1]:
            raise InputError(
                f"class_weights= has {len(class_weights)} numbers for {label.shape[1]} labels: give as many"
            )
        present = present * class_weights.to(present)
    known = ~label.isnan()
    each = torch.where(label == 1, present, absent)
    # Soft truths, between 0 and 1, are a mixture.
    soft = known & (label != 0) & (label != 1)
    each = torch.where(soft, label.nan_to_num(0.0) * present + (1 - label.nan_to_num(0.0)) * absent, each)
    each = torch.where(known, each, 0.0)
    return each if reduction == "none" else each.sum() / known.sum().clamp(min=1)


def weights_of(class_weights: Sequence[float] | None) -> Tensor | None:
    """Class weights as a tensor.

    Raises:
        InputError: One is not positive.
    """
    if class_weights is None:
        return None
    weights = torch.as_tensor(class_weights, dtype=torch.float32)
    if weights.ndim != 1 or not bool(((weights > 0) & weights.isfinite()).all()):
        raise InputError(f"class_weights= expects one positive number per label, got {class_weights!r}")
    return weights


def _precise(logits: Tensor, label: Tensor) -> Tensor:
    if logits.shape != label.shape or logits.ndim != 2:
        raise InputError(f"expected logits and label (B, L), got {tuple(logits.shape)} and {tuple(label.shape)}")
    return logits if logits.dtype == torch.float64 else logits.float()


def _checked(reduction: Reduction) -> Reduction:
    if reduction not in ("mean", "none"):
        raise InputError(f"reduction= expects 'mean' or 'none', got {reduction!r}")
    return reduction


def _power(name: str, value: float) -> float:
    if not 0 <= value < float("inf"):
        raise InputError(f"{name}= expects a power of at least 0, got {value!r}: 2 is usual")
    return float(value)
