"""The organ mask loss: one number for how much evidence of a batch lies where it cannot be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from camtrain._errors import InputError, nearest
from camtrain._grid import to_grid
from camtrain.losses.forms import Cells, Form, find_form
from camtrain.losses.reduction import mean_of_ratios, over_processes, ratio_of_sums
from camtrain.losses.taking_part import Labels, Truths, gather

Scale = float | Literal["mean", "sum"]
Reduction = Literal["global", "per_label"]


@dataclass(frozen=True)
class MaskLossParts:
    """The mask loss of a batch and the figures to log beside it; the figures are those of all processes.

    Nothing here makes the host wait for the device, except reading `outside_evidence`.

    Attributes:
        loss: Unweighted loss, a scalar with a graph. Under DDP its mean over the processes is the value and the
            gradient of the whole batch.
        evidence: (2,) detached: positive evidence of present labels outside their allowed region, and in all.
            Sums, so that batches can be added up.
        unknown_labels: Scalar, number of unknown (sample, label) pairs.
        cases_without_organs: Scalar, number of samples without organs; all their labels are left out.
        labels_without_region: Scalar, number of present labels, in samples with organs, with nothing allowed.
    """

    loss: Tensor
    evidence: Tensor
    unknown_labels: Tensor
    cases_without_organs: Tensor
    labels_without_region: Tensor

    @property
    def outside_evidence(self) -> Tensor | None:
        """Share of the positive evidence of present labels that lies outside, or None where there is none to share.

        Labels whose region is the whole map (`anywhere`) have no outside and are not counted. Under DDP it is None on
        every process or on none. Reading it waits for the device.
        """
        outside, total = self.evidence.unbind()
        return outside / total if bool(total > 0) else None


class OrganMaskLoss(nn.Module):
    """Penalty on evidence that lies outside the organs where a label may be read.

    With the scaled map m, forbidden cells F and every sum over the samples and labels that take part:

    - `softplus`: mean over F of log(1 + exp(m)); F = outside the allowed cells for a present label, every cell for an
      absent one. With `labels="all"`, `reduction="global"` the loss of Draelos and Carin (2111.12215).
    - `l2`: mean over F of m^2; F = outside the allowed cells, label present or absent.
    - `l2_normalised`: mean over labels of sum_F m^2 / sum m^2, the denominator held constant; F as for `l2`.
    - `energy`: mean over present pairs of 1 - sum_allowed relu(m) / sum relu(m) (Rao et al., ICCV 2023).

    Left out: unknown labels; samples without organs, with all their labels; present labels without an allowed cell in
    this sample, for `l2` and `l2_normalised` absent ones too; pairs without a forbidden cell (a present `anywhere`
    label). If nothing is left the loss is exactly 0, with a graph.

    Under DDP the denominators are summed over the processes in one collective per call, and the loss is multiplied by
    their number, so that averaged gradients equal those of one process on the whole batch: call it on every process
    at every step. Gradient accumulation remains a mean of the means of its batches.

    Args:
        form: Formula, a key of `camtrain.losses.FORMS`.
        labels: Which truths take part: `"all"` known ones or `"present"` ones only.
        weight: Factor of the loss in `forward`.
        scale: `"mean"` multiplies the map by its number of cells, so that its *mean* adds up to the logit and one
            weight means the same pressure for every head; `"sum"` leaves the map; a number multiplies by it (the
            authors' AxialNet loss: 135). Scale-free forms ignore it.
        reduction: `"global"`: one ratio of sums over all labels; `"per_label"`: a ratio per label, then the mean over
            the labels that have something. `l2_normalised` is per label by definition.
        label_weights: (L,) numbers >= 0 that multiply numerator and denominator of each label.

    Raises:
        InputError: An argument is unknown, negative or not finite.

    Example:
        >>> maps = torch.zeros(2, 3, 4, 4, 4, requires_grad=True)
        >>> allowed = torch.zeros(2, 3, 4, 4, 4, dtype=torch.bool)
        >>> allowed[..., :2] = True
        >>> label = torch.tensor([[1.0, 0.0, float("nan")], [0.0, 0.0, 1.0]])
        >>> round(OrganMaskLoss(weight=1.0)(maps, allowed, label).item(), 4)
        0.6931
    """

    label_weights: Tensor | None

    def __init__(
        self,
        form: str = "softplus",
        labels: Labels = "all",
        weight: float = 1 / 3,
        scale: Scale = "mean",
        reduction: Reduction = "global",
        label_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self._form = find_form(form)
        _one_of("labels", labels, get_args(Labels))
        _one_of("reduction", reduction, get_args(Reduction))
        if isinstance(scale, str):
            _one_of("scale", scale, ("mean", "sum"))
        elif not (math.isfinite(scale) and scale > 0):
            raise InputError(f"expected scale as 'mean', 'sum' or a positive number, got {scale}")
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"expected weight as a finite number >= 0, got {weight}")
        self.form, self.labels, self.weight = form, labels, weight
        self.scale, self.reduction = scale, reduction
        # Not in the state_dict: the constructor's argument is the truth, and a user's checkpoint stays as it was.
        self.register_buffer("label_weights", _weights(label_weights), persistent=False)

    def forward(self, maps: Tensor, allowed: Tensor, label: Tensor, has_organs: Tensor | None = None) -> Tensor:
        """Weight x loss.

        Args:
            maps: (B, L, *S') float, signed. A pair whose map is NaN in every cell counts as not computed.
            allowed: (B, L, *S) bool, True = the label may be read here; any resolution.
            label: (B, L): 1 present, 0 absent, anything else (NaN) unknown.
            has_organs: (B,) bool, was this sample segmented? None: a sample with nothing allowed for any label was not.

        Returns:
            Scalar with a graph; float64 for float64 maps, else float32.

        Raises:
            InputError: Shapes or dtypes do not fit together.
        """
        return self.weight * self.parts(maps, allowed, label, has_organs).loss

    def parts(
        self,
        maps: Tensor,
        allowed: Tensor,
        label: Tensor,
        has_organs: Tensor | None = None,
        selected: Tensor | None = None,
    ) -> MaskLossParts:
        """The unweighted loss and the figures to log.

        Args:
            maps: (B, L, *S') float, signed.
            allowed: (B, L, *S) bool; any resolution.
            label: (B, L): 1 present, 0 absent, anything else (NaN) unknown.
            has_organs: (B,) bool, or None as in `forward`.
            selected: (B, L) bool, the pairs whose map was computed. None: those that are not NaN in every cell.

        Returns:
            The parts.

        Raises:
            InputError: Shapes or dtypes do not fit together.
        """
        _check(maps, allowed, label, has_organs, selected, self.label_weights)
        # Sums over 1e5 cells overflow in half precision, so the loss never runs in it.
        with torch.autocast(maps.device.type, enabled=False):
            maps = maps if maps.dtype == torch.float64 else maps.float()
            if allowed.shape[2:] != maps.shape[2:]:
                allowed = to_grid(allowed.bool(), maps.shape[2:])
            return self._parts(maps.flatten(2), allowed.flatten(2).bool(), label, has_organs, selected)

    def _parts(
        self, maps: Tensor, allowed: Tensor, label: Tensor, has_organs: Tensor | None, selected: Tensor | None
    ) -> MaskLossParts:
        if selected is None:
            selected = ~maps.isnan().all(-1)
        factor = _factor(self.scale, maps.shape[-1], self._form)
        truths = Truths.read(allowed, label, has_organs, selected)
        cells = gather(maps, allowed, truths, self._form, self.labels, factor)
        numerator, denominator = self._form.ratio(cells)
        figures = torch.cat([_evidence(cells, truths.present), truths.counts().to(maps.dtype)])
        denominator, figures, processes = over_processes(denominator.detach(), figures)
        by_label = self._form.per_label or self.reduction == "per_label"
        reduce = mean_of_ratios if by_label else ratio_of_sums
        loss = reduce(numerator, denominator, self._weights_like(maps)) * processes
        evidence, counts = figures[:2], figures[2:].long()
        return MaskLossParts(loss, evidence, *counts.unbind())

    def _weights_like(self, maps: Tensor) -> Tensor | None:
        if self.label_weights is not None and self.label_weights.device != maps.device:
            # Kept, so that a loss nobody moved to the device pays for the copy once.
            self.label_weights = self.label_weights.to(maps.device)
        return None if self.label_weights is None else self.label_weights.to(maps.dtype)

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return (
            f"form={self.form!r}, labels={self.labels!r}, weight={self.weight:g}, "
            f"scale={self.scale!r}, reduction={self.reduction!r}"
        )


def organ_mask_loss(
    maps: Tensor,
    allowed: Tensor,
    label: Tensor,
    has_organs: Tensor | None = None,
    *,
    form: str = "softplus",
    labels: Labels = "all",
    weight: float = 1 / 3,
    scale: Scale = "mean",
    reduction: Reduction = "global",
    label_weights: Sequence[float] | None = None,
) -> Tensor:
    """Functional twin of `OrganMaskLoss`: the same arguments, the same defaults, the same number.

    Args:
        maps: (B, L, *S') float, signed.
        allowed: (B, L, *S) bool; any resolution.
        label: (B, L): 1 present, 0 absent, anything else (NaN) unknown.
        has_organs: (B,) bool, or None: a sample with nothing allowed for any label was not segmented.
        form: Formula, a key of `camtrain.losses.FORMS`.
        labels: `"all"` known truths or `"present"` ones only.
        weight: Factor of the loss.
        scale: `"mean"`, `"sum"` or a number.
        reduction: `"global"` or `"per_label"`.
        label_weights: (L,) numbers >= 0.

    Returns:
        Weight x loss, a scalar with a graph.

    Raises:
        InputError: An argument is unknown, or shapes do not fit together.

    Example:
        >>> maps = torch.tensor([[[3.0, 1.0]]])
        >>> inside = torch.tensor([[[True, False]]])
        >>> organ_mask_loss(maps, inside, torch.tensor([[1.0]]), form="energy", weight=1.0)
        tensor(0.2500)
    """
    module = OrganMaskLoss(form, labels, weight, scale, reduction, label_weights)
    loss: Tensor = module(maps, allowed, label, has_organs)
    return loss


def _factor(scale: Scale, cells: int, form: Form) -> float:
    if form.scale_free or scale == "sum":
        return 1.0
    return float(cells) if isinstance(scale, str) else float(scale)


def _evidence(cells: Cells, present: Tensor) -> Tensor:
    """(2,) detached: positive evidence of present labels outside, and in all."""
    of_present = present.to(cells.maps.dtype)
    outside = cells.outside.detach().relu().sum(-1) * of_present
    total = cells.maps.detach().relu().sum(-1) * of_present
    return torch.stack([outside.sum(), total.sum()])


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"expected {name} as one of {', '.join(known)}, got {value!r}{nearest(str(value), known)}")


def _weights(values: Sequence[float] | None) -> Tensor | None:
    if values is None:
        return None
    weights = torch.as_tensor(values, dtype=torch.float32).detach()
    if weights.ndim != 1 or bool((~weights.isfinite() | (weights < 0)).any()):
        raise InputError(f"expected label_weights as one finite number >= 0 per label, got {values}")
    return weights


def _check(
    maps: Tensor,
    allowed: Tensor,
    label: Tensor,
    has_organs: Tensor | None,
    selected: Tensor | None,
    weights: Tensor | None,
) -> None:
    """Shapes and dtypes only: looking at values would make the host wait for the device."""
    if maps.ndim < 3 or not maps.is_floating_point():
        raise InputError(f"expected maps of shape (B, L, *S) in floating point, got {tuple(maps.shape)} {maps.dtype}")
    given, pairs = tuple(maps.shape), tuple(maps.shape[:2])
    if allowed.ndim != maps.ndim or tuple(allowed.shape[:2]) != pairs:
        raise InputError(
            f"expected allowed with the samples, labels and rank of the maps {given}, got {tuple(allowed.shape)}: "
            "make it with the table whose labels are the network's outputs"
        )
    if allowed.is_floating_point():
        raise InputError(f"expected allowed as bool (True = the label may be read here), got {allowed.dtype}")
    expected = {"label": (label, pairs), "selected": (selected, pairs), "has_organs": (has_organs, pairs[:1])}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise InputError(f"expected {name} of shape {shape} for maps {given}, got {tuple(tensor.shape)}")
    if weights is not None and len(weights) != pairs[1]:
        raise InputError(f"expected {pairs[1]} label_weights for maps {given}, got {len(weights)}: one per label")
