"""Prove from the autograd graph that logits are affine in the activations, and read off the weights.

Most classifiers end in pool + FC, flatten + FC, or one FC per slice and a mean. There d logit / d activations is a
constant made of parameters only, so no backward pass is needed: maps of all labels are one contraction. Whether a head
is of this kind is not guessed from module names: every node on the way from the logits back to the activations must
be one of the operators below, which are affine and treat each sample by itself. Anything else, a ReLU, a second branch,
ends the proof, and the engine uses autograd. A dropout that is active multiplies by numbers that were drawn: given them
the head is affine too, but differently for every sample.

Weights of reduced precision are read off exactly and then multiplied in float32.

The walk carries T (n L, *shape): how each label depends on the tensor at this point; n = 1 for any one sample, n = B
once a factor has come that differs between samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_NODES = 64
_MOST = 2**26  # numbers of slopes that differ between samples; beyond, one label at a time needs less memory


def affine_head(logits: Tensor, activations: Tensor) -> Tensor | None:
    """Weights W with logits[b, l] = sum(W[l] * activations[b]) + bias[l], if the graph proves that there are any.

    Args:
        logits: (B, L), with a graph down to `activations`.
        activations: (B, K, *S), the very tensor that the graph leads to.

    Returns:
        (L, K, *S'), differentiable with respect to the parameters, where each spatial size is that of the activations
        or 1 (the same weight at every position); None when the head is not provably affine.

    Raises:
        RuntimeError: A backward pass has freed the graph, or a parameter was changed in place since the forward.

    Example:
        >>> A = torch.rand(2, 3, 4, 5, requires_grad=True)
        >>> affine_head(torch.nn.Linear(3, 7)(A.mean(dim=(2, 3))), A).shape
        torch.Size([7, 3, 1, 1])
        >>> affine_head(torch.nn.Linear(3, 7)(A.relu().mean(dim=(2, 3))), A) is None
        True
    """
    found = slopes(logits, activations)
    return None if found is None or len(found) != 1 else found[0]


def slopes(logits: Tensor, activations: Tensor) -> Tensor | None:
    """Gradients d logits / d activations, where the graph shows that it is made of parameters and drawn numbers only.

    Args:
        logits: (B, L), with a graph down to `activations`.
        activations: (B, K, *S), the very tensor that the graph leads to.

    Returns:
        (n, L, K, *S'), as `affine_head` gives it; n = 1 where it is the same for all samples, B where an active dropout
        lies on the way. None where the graph does not show it, or where there are too many of them.

    Raises:
        RuntimeError: As for `affine_head`.

    Example:
        >>> A = torch.rand(2, 3, 4, requires_grad=True)
        >>> slopes(torch.nn.Linear(3, 7)(F.dropout(A.mean(dim=2), 0.2, training=True)), A).shape
        torch.Size([2, 7, 3, 1])
    """
    if logits.ndim != 2 or logits.grad_fn is None:
        return None
    node: Any = logits.grad_fn
    number = logits.output_nr
    weights: Tensor | None = None  # None stands for the identity on (L,)
    for _ in range(_MAX_NODES):
        if is_source(node, activations) and number == activations.output_nr:
            weights = _checked(weights, activations)
            return None if weights is None else weights.reshape(-1, logits.shape[1], *weights.shape[1:])
        name = type(node).__name__
        if not _only_through_data(node, activations) or not _fits(node, weights, logits, activations):
            return None
        if name in _FACTORS:
            weights = _scaled(node, weights, _FACTORS[name](node), logits.shape[1])
        elif name in _PULLS:
            weights = _PULLS[name](node, weights)
        elif name not in _UNCHANGED:
            return None
        if weights is None and name not in _UNCHANGED:
            return None
        node, number = node.next_functions[_data(node)]
    return None


def _only_through_data(node: Any, activations: Tensor) -> bool:
    """Do the activations come in as the operand that the rule is for, and by no other (a parameter times them)?"""
    operands = [fn for fn, _ in node.next_functions]
    touched = [i for i, fn in enumerate(operands) if fn is not None and not _is_parameter(fn, activations)]
    return touched == [_data(node)]


def _data(node: Any) -> int:
    """Which operand carries the data."""
    name = type(node).__name__
    if name == "MulBackward0":
        return int(node.next_functions[0][0] is None)
    return 1 if name == "AddmmBackward0" else 0


def is_source(node: Any, activations: Tensor) -> bool:
    """Is this the node of the graph that the activations come out of?"""
    if activations.grad_fn is not None:
        return node is activations.grad_fn
    return getattr(node, "variable", None) is activations


def _is_parameter(node: Any, activations: Tensor) -> bool:
    """Does this branch end in leaf parameters without ever touching the activations?"""
    stack, seen = [node], 0
    while stack:
        current = stack.pop()
        seen += 1
        if seen > _MAX_NODES or is_source(current, activations):
            return False
        stack.extend(fn for fn, _ in current.next_functions if fn is not None)
    return True


def _fits(node: Any, weights: Tensor | None, logits: Tensor, activations: Tensor) -> bool:
    """The node's output must be (B, *shape of T): no operator may have mixed samples or broadcast."""
    shape = tuple(node._input_metadata[0].shape)
    if shape[0] != activations.shape[0]:
        return False
    if weights is None:
        return shape == tuple(logits.shape)
    own = tuple(weights.shape[1:])
    return len(own) == len(shape) - 1 and all(a in (b, 1) for a, b in zip(own, shape[1:], strict=True))


def _checked(weights: Tensor | None, activations: Tensor) -> Tensor | None:
    if weights is None or weights.ndim != activations.ndim:
        return None
    own, full = weights.shape[1:], activations.shape[1:]
    if own[0] != full[0] or any(a not in (b, 1) for a, b in zip(own, full, strict=True)):
        return None
    return weights


def _full(weights: Tensor, shape: Sequence[int]) -> Tensor:
    """Write out the axes along which the weight is constant."""
    return weights.expand(weights.shape[0], *shape)


def _addmm(node: Any, weights: Tensor | None) -> Tensor | None:
    matrix = node._saved_mat2  # (in, L)
    if matrix is None or getattr(node, "_saved_alpha", 1) != 1:
        return None
    transposed: Tensor = _precise(matrix).t()
    return transposed if weights is None else weights @ transposed.to(weights)


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _identity(size: int, node: Any) -> Tensor:
    metadata = node._input_metadata[0]
    dtype = torch.float64 if metadata.dtype == torch.float64 else torch.float32
    return torch.eye(size, dtype=dtype, device=metadata.device)


def _view(node: Any, weights: Tensor | None) -> Tensor | None:
    before = tuple(node._saved_self_sym_sizes)
    after = tuple(node._input_metadata[0].shape)
    if before[0] != after[0]:
        return None
    weights = _identity(after[1], node) if weights is None else weights
    if all(a == b for a, b in zip(weights.shape[1:], after[1:], strict=True)):
        return weights.reshape(weights.shape[0], *before[1:])
    return _full(weights, after[1:]).reshape(weights.shape[0], *before[1:])


def _mean(node: Any, weights: Tensor | None) -> Tensor | None:
    before = tuple(node._saved_self_sym_sizes)
    dims = sorted(_positive(d, len(before)) for d in node._saved_dim) or list(range(len(before)))
    if 0 in dims:
        return None
    if weights is None:
        # The mean gave the logits themselves: T is the identity on what is left.
        kept = [size for axis, size in enumerate(before) if axis not in dims]
        if len(kept) != 2:
            return None
        weights = _identity(kept[1], node)
    count = 1
    for dim in dims:
        count *= before[dim]
        if not node._saved_keepdim:
            weights = weights.unsqueeze(dim)
    return weights / count


def _positive(dim: int, rank: int) -> int:
    # The graph stores negative axes as huge unsigned numbers.
    dim = dim - (1 << 64) if dim > rank else dim
    return dim % rank


def _adaptive_pool(node: Any, weights: Tensor | None) -> Tensor | None:
    positions: int = node._saved_self.shape[2:].numel()
    after = node._input_metadata[0].shape
    if weights is None or any(size != 1 for size in after[2:]):
        return None
    return weights / positions


def _convolution(node: Any, weights: Tensor | None) -> Tensor | None:
    """Transposed convolution of T. One FC per slice is such a convolution, with a kernel of the slice's full size."""
    if weights is None or node._saved_transposed:
        return None
    before, after = node._saved_input.shape, node._input_metadata[0].shape
    kernel = node._saved_weight.to(weights)
    rank = len(before) - 2
    transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    # Cells at the border that no kernel position reached are restored by the output padding.
    reach = [
        (a - 1) * s - 2 * p + d * (k - 1) + 1
        for a, s, p, d, k in zip(
            after[2:], node._saved_stride, node._saved_padding, node._saved_dilation, kernel.shape[2:], strict=True
        )
    ]
    return transposed(
        _full(weights, after[1:]),
        kernel,
        stride=node._saved_stride,
        padding=node._saved_padding,
        output_padding=[b - r for b, r in zip(before[2:], reach, strict=True)],
        groups=node._saved_groups,
        dilation=node._saved_dilation,
    )


def _squeeze(node: Any, weights: Tensor | None) -> Tensor | None:
    dim = _positive(node._saved_dim, len(node._saved_self_sym_sizes))
    return None if weights is None or dim == 0 else weights.unsqueeze(dim)


def _unsqueeze(node: Any, weights: Tensor | None) -> Tensor | None:
    dim = _positive(node._saved_dim, len(node._input_metadata[0].shape))
    return None if weights is None or dim == 0 else weights.squeeze(dim)


def _constant(node: Any) -> Tensor | None:
    # A factor without a gradient: what F.dropout is on a CPU, or a fixed scale.
    data = _data(node)
    if node.next_functions[1 - data][0] is not None:
        return None
    factor: Tensor | None = node._saved_self if data else node._saved_other
    return factor


def _kept(node: Any) -> Tensor:
    # What F.dropout is on a GPU. Where all is dropped, every factor is 0.
    share = 1 - node._saved_p
    factor: Tensor = node._saved_result1.double() / (share or 1.0)
    return factor


def _scaled(node: Any, weights: Tensor | None, factor: Tensor | None, labels: int) -> Tensor | None:
    """T times a factor that broadcasts to the node's output (B, *shape)."""
    shape = tuple(node._input_metadata[0].shape)
    if factor is None or factor.is_complex() or factor.ndim > len(shape):
        return None
    weights = _identity(shape[1], node) if weights is None else weights
    factor = _precise(factor.detach()).to(weights).reshape((1,) * (len(shape) - factor.ndim) + tuple(factor.shape))
    if len(factor) == 1:
        return weights * factor[0]
    full = [max(a, b) for a, b in zip(weights.shape[1:], factor.shape[1:], strict=True)]
    if len(factor) * labels * math.prod(full) > _MOST:
        return None
    return (weights.reshape(-1, labels, *weights.shape[1:]) * factor[:, None]).flatten(0, 1)


# Operator in the graph -> how T passes it.
_PULLS: dict[str, Callable[[Any, Tensor | None], Tensor | None]] = {
    "AddmmBackward0": _addmm,
    "MmBackward0": _addmm,
    "ViewBackward0": _view,
    "UnsafeViewBackward0": _view,
    "ReshapeAliasBackward0": _view,
    "MeanBackward1": _mean,
    "AdaptiveAvgPool2DBackward0": _adaptive_pool,
    "AdaptiveAvgPool3DBackward0": _adaptive_pool,
    "ConvolutionBackward0": _convolution,
    "SqueezeBackward1": _squeeze,
    "UnsqueezeBackward0": _unsqueeze,
}
# Operator -> the factor by which it multiplies its data.
_FACTORS: dict[str, Callable[[Any], Tensor | None]] = {
    "MulBackward0": _constant,
    "NativeDropoutBackward0": _kept,
}
_UNCHANGED = {"CloneBackward0", "AliasBackward0", "ToCopyBackward0"}
