"""HiResCAM of all labels, cell by cell: for few cells and many labels cheaper than one backward pass per label.

The map is M[b, l, s] = sum_k dlogit[b, l] / dA[b, k, s] * A[b, k, s]. Of one cell s it is J times the activations of
that cell alone, J the Jacobian of the logits: one product gives all labels. In reverse mode: g(u) = J^T u is linear in
u, so its derivative, applied to a v on the layer's grid, is J v. That takes operators that can be differentiated twice.

The loop over labels is the definition. Whatever could make another number of it than the cells is looked for, in the
graph and in numbers, and then there is no map from here:

- Samples that mix (BatchNorm in training mode, attention over the batch): a pass of the loop adds up one label of all
  samples. It keeps samples apart if and only if J^T (w u) = w J^T u, w a weight per sample that differs between them.
  Powers of two scale every operator to the last bit.
- A backward that is not linear, or lacks a part of its own derivative (a user's hook, a constant in a custom function):
  the maps, summed over labels with other weights u, must be what one ordinary backward pass from these weights gives.
- NaN and Inf: zero times either is NaN in cells that the loop leaves alone. No comparison holds with them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from camtrain.cam.graph import nodes_between, operator_of
from camtrain.cam.selection import Selection

_log = logging.getLogger(__name__)

# In backward passes to the layer: one cell, and what comes before the first. Behind products of matrices it was 0.6 and
# 12, behind ResNet, DenseNet, EfficientNet, InstanceNorm and LSTM 0.9 to 5.4: the second derivative of a convolution
# computes that of its kernel too, which nobody asked for.
_PRODUCTS, _OTHERS = (2, 12), (6, 6)
_OF_PRODUCTS = frozenset({
    "Addmm", "Mm", "Bmm", "T", "Relu", "Tanh", "Sigmoid", "Silu", "Gelu", "LeakyRelu", "Elu", "Softmax", "Mean", "Sum",
    "Mul", "Div", "Add", "Sub", "View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose", "Unsqueeze", "Squeeze",
    "Expand", "Clone", "Alias", "Select", "Slice", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D",
    "NativeLayerNorm", "NativeGroupNorm", "NativeDropout",
})  # fmt: skip
_MOST = 2**25  # numbers that the gradient's graph may keep: behind few cells there can still be a large decoder
_ROUNDING = 32  # sums that a device takes in any order, in units of the last place of a sample's largest number
_AGREEMENT = 1024  # the same for the maps against an ordinary pass: two ways through the network
_TWICE = frozenset({"SwishImplementationBackward"})  # MONAI's Swish: made of operators with a derivative


def cheaper_by_cells(source: Tensor, logits: Tensor, passes: int) -> bool:
    """Do the maps cost less cell by cell than so many backward passes to the layer?

    Never but on a CPU, where it was measured: GPUs round products of float32 to TF32 by default, and then two ways
    through a network agree less than `hires_cam_by_cells` asks for.

    Args:
        source: (B, K, *S'), what the layer returned.
        logits: (B, L), with a graph down to `source`.
        passes: Labels per sample.

    Example:
        >>> import torch
        >>> A = torch.rand(2, 3, 4, requires_grad=True)
        >>> logits = torch.nn.Linear(3, 80)(A.mean(dim=2).tanh())
        >>> cheaper_by_cells(A, logits, passes=80), cheaper_by_cells(A, logits, passes=10)
        (True, False)
    """
    cells = source.shape[2:].numel()
    if source.device.type != "cpu" or _cost(cells, _PRODUCTS) >= passes:
        return False
    nodes = list(nodes_between([logits], [source]))
    if all(operator_of(node) in _OF_PRODUCTS for node in nodes):
        return True
    return _cost(cells, _OTHERS) < passes and not any(map(_in_groups, nodes))


def _cost(cells: int, price: tuple[int, int]) -> int:
    return price[0] * cells + price[1]


def _in_groups(node: Any) -> bool:
    """A convolution in groups of several channels: the second derivative of ResNeXt's takes up to sixteen passes."""
    groups = getattr(node, "_saved_groups", 1)
    return 1 < int(groups) < int(node._input_metadata[0].shape[1])


def hires_cam_by_cells(
    source: Tensor, logits: Tensor, chosen: Selection, samples: slice | None = None
) -> Tensor | None:
    """HiResCAM maps without a pass per label, where they are those of one pass per label.

    Args:
        source: (B, K, *S'), what the layer returned.
        logits: (B, L), with a graph down to `source`, which stays usable.
        chosen: Columns of the wanted samples.
        samples: The wanted samples; None = all.

    Returns:
        (b, n, *S') in the order of `chosen.picks`, detached; None where the loop over labels must be asked.

    Example:
        >>> import torch
        >>> from camtrain.cam.selection import select
        >>> A = torch.rand(2, 3, 4, requires_grad=True)
        >>> logits = torch.nn.Linear(3, 7)(A.mean(dim=2).tanh())
        >>> hires_cam_by_cells(A, logits, select([0, 5], 2, 7, A.device)).shape
        torch.Size([2, 2, 4])
    """
    try:
        found = _unsuited(source, logits) or _maps(source, logits, chosen, samples or slice(None))
    except Exception as error:
        # No second derivative; no graph at all, of which the loop tells in its own words; no memory for a way that
        # needs more of it than the loop; a user's hook that takes no such pass, whatever it raises.
        found = str(error) or type(error).__name__
    if isinstance(found, Tensor):
        return found
    _log.debug("maps label by label, not cell by cell: %s", found)
    return None


def _unsuited(source: Tensor, logits: Tensor) -> str | None:
    """Why cells are no way, as far as it can be told before anything is computed."""
    if logits.ndim != 2 or not source.numel() or not logits.numel():
        return "no logits (B, L), or nothing in them"
    if source.dtype != logits.dtype or source.dtype not in (torch.float32, torch.float64):
        # The loop sums over channels in float32; here this sum would be rounded on its way through the network.
        return f"activations are {source.dtype} and logits {logits.dtype}"
    if not bool(source.detach().isfinite().all() & logits.detach().isfinite().all()):
        return "activations or logits are not finite"
    return _unsuited_graph(nodes_between([logits], [source]), source.dtype)


def _unsuited_graph(nodes: Iterable[Any], dtype: torch.dtype) -> str | None:
    kept = 0
    for node in nodes:
        name = type(node).__name__
        if isinstance(node, torch.autograd.function.BackwardCFunction) and name not in _TWICE:
            return f"{name} is no operator of torch"
        for metadata in node._input_metadata:
            if metadata.dtype != dtype and (metadata.dtype.is_floating_point or metadata.dtype.is_complex):
                return f"{name} computes in {metadata.dtype}"
            kept += math.prod(metadata.shape)
    return f"the graph has {kept} numbers" if kept > _MOST else None


def _maps(source: Tensor, logits: Tensor, chosen: Selection, samples: slice) -> Tensor | str:
    """The maps, or why they would not be those of the loop."""
    flat = source.detach().as_subclass(Tensor).flatten(2)
    first, second = _directions(logits)
    first.requires_grad_()
    (gradient,) = torch.autograd.grad(logits, source, first, create_graph=True)
    if _mixing(source, logits, first.detach(), gradient.detach()):
        return "samples mix, or the backward pass does not scale"
    columns = flat.new_empty(*logits.shape, flat.shape[2])
    cell = torch.zeros_like(flat)
    for s in range(flat.shape[2]):
        cell[:, :, s] = flat[:, :, s]
        (columns[:, :, s],) = torch.autograd.grad(gradient, first, cell.view(source.shape), retain_graph=True)
        cell[:, :, s] = 0
    # Labels of any scale count alike: in the sum of all, one that is a millionth of the others would not be seen.
    largest = columns.abs().amax(dim=2)
    floor = torch.finfo(largest.dtype).eps * largest.amax(dim=1, keepdim=True)
    second = torch.where(floor > 0, second / (largest + floor), second)
    (other,) = torch.autograd.grad(logits, source, second, retain_graph=True)
    terms = other.as_subclass(Tensor).flatten(2) * flat
    size = terms.abs().sum(dim=1).amax(dim=1)
    if not _small(torch.einsum("bls,bl->bs", columns, second) - terms.sum(dim=1), size, _AGREEMENT):
        return "the maps do not add up to an ordinary backward pass"
    picks = chosen.picks[:, :, None].expand(-1, -1, flat.shape[2])
    return columns[samples].gather(1, picks).view(*chosen.picks.shape, *source.shape[2:])


def _directions(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Two sets of weights of the logits, (B, L) each, that nothing in a network is aligned with."""
    drawn = torch.randn(2, *logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
    first, second = drawn.to(logits.device)
    return first, second


def _mixing(source: Tensor, logits: Tensor, start: Tensor, gradient: Tensor) -> bool:
    """Does the gradient of a sample depend on where other samples start, or not scale with where its own does?"""
    # As far as exponents reach, and from one round to the next in another order: no shift of the batch is overlooked.
    place = torch.arange(len(start), device=start.device)
    weights = 2.0 ** ((place + 7 * (place // 32)) % 32).to(start)
    (scaled,) = torch.autograd.grad(logits, source, start * weights[:, None], retain_graph=True)
    wanted = gradient.flatten(1) * weights[:, None]
    return not _small(scaled.flatten(1) - wanted, wanted.abs().amax(dim=1), _ROUNDING)


def _small(difference: Tensor, size: Tensor, units: int) -> bool:
    """Is (B, n) zero but for rounding, on the scale (B,)? False where anything is NaN."""
    return bool((difference.abs().amax(dim=1) <= units * torch.finfo(size.dtype).eps * size).all())
