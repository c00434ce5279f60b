"""The table of mask-loss formulas, and the cells that a formula reads.

A form is one function from `Cells` to a numerator and a denominator per label; who takes part, what is forbidden,
the scale, the reduction, label weights and DDP are settled before and after it, in `organ_mask.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from camtrain._errors import InputError, nearest

SAMPLES_AND_CELLS = (0, 2)


@dataclass(frozen=True)
class Cells:
    """The cells of a batch as a form sees them; N = number of cells of one map.

    Attributes:
        maps: (B, L, N) float, scaled, with graph; zero for pairs that take no part.
        forbidden: (B, L, N) bool, cells of the pairs that take part where no evidence may lie.
        pairs: (B, L) bool, the (sample, label) pairs that take part: each has at least one forbidden cell.
    """

    maps: Tensor
    forbidden: Tensor
    pairs: Tensor

    @cached_property
    def outside(self) -> Tensor:
        """(B, L, N): the maps in forbidden cells, zero elsewhere, so that no other cell reaches value or gradient."""
        return torch.where(self.forbidden, self.maps, 0.0)

    @cached_property
    def count(self) -> Tensor:
        """(L,): number of forbidden cells per label, in the dtype of the maps."""
        return self.forbidden.sum(SAMPLES_AND_CELLS).to(self.maps.dtype)


def nothing(total: Tensor) -> Tensor:
    """Where a sum of non-negative terms has nothing to divide by; NaN is something, so that it is not hidden.

    Args:
        total: Any shape, float.

    Returns:
        Bool, same shape.

    Example:
        >>> nothing(torch.tensor([0.0, 1.0, float("nan")]))
        tensor([ True, False, False])
    """
    return total <= torch.finfo(total.dtype).tiny


Ratio = Callable[[Cells], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Form:
    """One formula of the mask loss.

    Attributes:
        ratio: Cells -> (numerator, denominator), each (L,). The numerator carries the graph and is a plain sum over
            samples; the denominator is taken as a constant. Both add up over batches, which is what DDP needs.
        absent: What a known absent label forbids: `"everything"`, the cells `"outside"` its organs, or `"nothing"`.
        scale_free: The value does not change when the maps are multiplied by a positive number; `scale` is ignored.
        per_label: The definition itself averages over labels, whatever `reduction` says.
        summary: The formula in words, for tables and messages.
        reference: Where the formula comes from.

    Example:
        A form is added in a few lines:

        >>> def hinge_outside(cells):
        ...     return cells.outside.relu().sum((0, 2)), cells.count
        >>> FORMS["hinge"] = Form(hinge_outside, absent="everything", summary="mean of relu(map) over forbidden cells")
        >>> maps, allowed = torch.ones(1, 1, 4), torch.tensor([[[True, False, False, False]]])
        >>> from camtrain.losses import organ_mask_loss
        >>> organ_mask_loss(maps, allowed, torch.tensor([[1.0]]), form="hinge", weight=1.0, scale="sum").item()
        1.0
        >>> del FORMS["hinge"]
    """

    ratio: Ratio
    absent: Literal["everything", "outside", "nothing"]
    scale_free: bool = False
    per_label: bool = False
    summary: str = ""
    reference: str = ""


def softplus_outside(cells: Cells) -> tuple[Tensor, Tensor]:
    """Sum of log(1 + exp(map)) over the forbidden cells, and their number.

    The binary cross entropy of the map against 0, as in the mask loss of Draelos and Carin (2111.12215). It is
    one-sided but never at rest: a zero map costs ln 2 per cell, and evidence against the label is still rewarded.

    Args:
        cells: The cells of the batch.

    Returns:
        Numerator and denominator, each (L,).

    Example:
        >>> zero = torch.zeros(1, 1, 2)
        >>> total, count = softplus_outside(Cells(zero, zero == 0, torch.ones(1, 1, dtype=torch.bool)))
        >>> round((total / count).item(), 4)
        0.6931
    """
    cost = torch.where(cells.forbidden, F.softplus(cells.outside), 0.0)
    return cost.sum(SAMPLES_AND_CELLS), cells.count


def l2_outside(cells: Cells) -> tuple[Tensor, Tensor]:
    """Sum of map^2 over the forbidden cells, and their number: evidence for and against counts alike.

    RRR's penalty (Ross et al. 2017) on the map of a layer instead of the input gradient, as a mean.

    Args:
        cells: The cells of the batch.

    Returns:
        Numerator and denominator, each (L,).

    Example:
        >>> two = torch.full((1, 1, 2), 2.0)
        >>> l2_outside(Cells(two, two > 0, torch.ones(1, 1, dtype=torch.bool)))
        (tensor([8.]), tensor([2.]))
    """
    return cells.outside.square().sum(SAMPLES_AND_CELLS), cells.count


def l2_share_outside(cells: Cells) -> tuple[Tensor, Tensor]:
    """Sum of map^2 over the forbidden cells, and, as a constant, over all cells of the pairs that take part.

    The denominator is a constant because its gradient would reward larger maps inside the organs as much as smaller
    ones outside, which in trials left the shortcut in place (docs/losses.md).

    Args:
        cells: The cells of the batch.

    Returns:
        Numerator and denominator, each (L,).

    Example:
        >>> maps = torch.tensor([[[3.0, 1.0]]])
        >>> l2_share_outside(Cells(maps, maps < 2, torch.ones(1, 1, dtype=torch.bool)))
        (tensor([1.]), tensor([10.]))
    """
    return cells.outside.square().sum(SAMPLES_AND_CELLS), cells.maps.detach().square().sum(SAMPLES_AND_CELLS)


def energy_outside(cells: Cells) -> tuple[Tensor, Tensor]:
    """Sum over pairs of the share of positive evidence that is forbidden, and the number of pairs that have any.

    1 - inside / total per (sample, label), the energy loss of Rao et al., ICCV 2023. Written as outside / total,
    which is the same and keeps small shares exact.

    Args:
        cells: The cells of the batch.

    Returns:
        Numerator and denominator, each (L,).

    Example:
        >>> maps = torch.tensor([[[3.0, 1.0, -9.0]]])
        >>> energy_outside(Cells(maps, maps < 2, torch.ones(1, 1, dtype=torch.bool)))
        (tensor([0.2500]), tensor([1.]))
    """
    total = cells.maps.relu().sum(-1)
    none = nothing(total)
    share = cells.outside.relu().sum(-1) / torch.where(none, 1.0, total)
    return torch.where(none, 0.0, share).sum(0), (~none).sum(0).to(total.dtype)


FORMS: dict[str, Form] = {
    "softplus": Form(
        softplus_outside,
        absent="everything",
        summary="mean of log(1 + exp(map)) over the forbidden cells; an absent label forbids every cell",
        reference="Draelos and Carin, AxialNet and HiResCAM, Artificial Intelligence in Medicine 2022, 2111.12215",
    ),
    "l2": Form(
        l2_outside,
        absent="outside",
        summary="mean of map^2 over the cells outside the label's organs, present or absent",
        reference="after Ross et al., Right for the Right Reasons, IJCAI 2017",
    ),
    "l2_normalised": Form(
        l2_share_outside,
        absent="outside",
        scale_free=True,
        per_label=True,
        summary="per label: sum of map^2 outside the organs over the sum everywhere, held constant",
        reference="camtrain, docs/losses.md",
    ),
    "energy": Form(
        energy_outside,
        absent="nothing",
        scale_free=True,
        summary="mean over present pairs of the share of positive evidence outside the organs",
        reference="Rao et al., Studying How to Efficiently and Effectively Guide Models with Explanations, ICCV 2023",
    ),
}


def find_form(name: str) -> Form:
    """The form of that name.

    Args:
        name: A key of `FORMS`.

    Returns:
        The form.

    Raises:
        InputError: There is no such form.

    Example:
        >>> find_form("energy").scale_free
        True
    """
    if name not in FORMS:
        raise InputError(f"there is no mask loss form {name!r}{nearest(str(name), FORMS)}")
    return FORMS[name]
