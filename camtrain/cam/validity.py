"""When do cells add up to a logit? What runs between a layer and the logits, read off the autograd graph.

A logit that is piecewise linear in the activations and in the biases is the sum of gradient x value over both (Euler).
Operators that are not, and norms that remove the scale of what they get, end that; here they are found by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from camtrain.cam.affine_head import is_source
from camtrain.cam.functional import SIGNED_SUM_FLOOR
from camtrain.cam.graph import nodes_between, operator_of

# Operators whose output scales with their input; of two factors only one may depend on the layer.
_LINEAR = """
Abs AccumulateGrad AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D Add Alias Amax Amin AsStrided
AvgPool2D AvgPool3D Broadcast Cat Clone ConstantPadNd Contiguous Copy CopySlices Diagonal Expand Flip Gather Hardtanh
Index IndexSelect LeakyRelu MaskedFill Max MaxPool2DWithIndices MaxPool3DWithIndices Maximum Mean Median Min Minimum Neg
Permute PixelShuffle PixelUnshuffle PreluKernel ReflectionPad1D ReflectionPad2D ReflectionPad3D Relu Repeat
ReplicationPad1D ReplicationPad2D ReplicationPad3D ReshapeAlias Roll Rsub Select Slice Sort Split SplitWithSizes Squeeze
Stack Sub Sum T Threshold ToCopy Topk Transpose Unbind Unfold UnsafeSplit UnsafeView Unsqueeze View Where
UpsampleBicubic2D UpsampleBilinear2D UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D
UpsampleTrilinear3D
"""
_LINEAR_NAMES = frozenset(_LINEAR.split())
_PRODUCTS = frozenset(
    ("Mul", "Mm", "Bmm", "Mv", "Dot", "Addmm", "Addbmm", "Baddbmm", "Addmv", "Addcmul", "Convolution", "Linear")
)
_NORMS = {"NativeLayerNorm": "LayerNorm", "NativeGroupNorm": "GroupNorm", "FusedRmsNorm": "RMSNorm"}
_ON_ITS_OWN_INPUT = "InstanceNorm or BatchNorm on its input's own statistics"


@dataclass(frozen=True)
class Between:
    """What runs between a layer and the logits.

    Attributes:
        norms: Norms whose output does not change with the scale of their input.
        others: Operators that are not piecewise linear, under autograd's names.
    """

    norms: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def reasons(self, layer: str) -> list[str]:
        """Why cells need not add up to the logit, one sentence per kind; empty when they do."""
        found = []
        if self.norms:
            found.append(
                f"{', '.join(self.norms)} runs between layer {layer!r} and the logits and removes the scale of what it "
                "gets, so that the cells' sum is 0 whatever the logit is; choose a layer behind the last such norm"
            )
        if self.others:
            found.append(
                f"{', '.join(self.others)} between layer {layer!r} and the logits is not piecewise linear, so that "
                "gradient x activation need not add up to the logit; choose a layer behind it"
            )
        return found


def between(scores: Tensor, source: Tensor) -> Between:
    """Read off the graph what runs between a layer's output and the scores.

    Args:
        scores: Any shape, with a graph down to `source`.
        source: What the layer returned.

    Example:
        >>> import torch
        >>> A = torch.rand(2, 4, 6, requires_grad=True)
        >>> between(torch.nn.functional.silu(torch.nn.GroupNorm(2, 4)(A)).mean(dim=2), A)
        Between(norms=('GroupNorm',), others=('Silu',))
    """
    norms: set[str] = set()
    others: set[str] = set()
    for node, name in irregular(nodes_between([scores], [source]), [source]):
        own = operator_of(node) in _NORMS or operator_of(node).endswith("BatchNorm")
        (norms if own else others).add(name)
    return Between(tuple(sorted(norms)), tuple(sorted(others)))


def irregular(nodes: dict[Any, None], sources: Sequence[Tensor]) -> Iterator[tuple[Any, str]]:
    """Nodes that are not piecewise linear in the sources, with what to call them.

    Args:
        nodes: From `nodes_between`.
        sources: The tensors that they lead to.
    """
    for node in nodes:
        name = operator_of(node)
        if name in _NORMS:
            yield node, _NORMS[name]
        elif name.endswith("BatchNorm"):
            if node._saved_training:
                yield node, _ON_ITS_OWN_INPUT
        elif not (name in _LINEAR_NAMES or _rectifies(node, name) or _is_scaling(node, name, nodes, sources)):
            yield node, f"{name} of two of its features" if name in _PRODUCTS else name


def _rectifies(node: Any, name: str) -> bool:
    """`clamp` at zero is a ReLU; at other bounds it adds a constant."""
    if not name.startswith("Clamp"):
        return False
    return all(getattr(node, bound, None) in (0, None) for bound in ("_saved_min", "_saved_max"))


def _is_scaling(node: Any, name: str, nodes: dict[Any, None], sources: Sequence[Tensor]) -> bool:
    """A product, or a quotient, of which only one factor, or only the numerator, depends on the layer."""
    touched = [
        op is not None and (op in nodes or any(is_source(op, source) for source in sources))
        for op, _ in node.next_functions
    ]
    if name == "Div":
        return not any(touched[1:])
    factors = touched[-2:] if name.startswith(("Add", "Badd")) else touched
    return name in _PRODUCTS and sum(factors) <= 1


def signed_share(activations: Tensor) -> Tensor:
    """Share of the absolute sum of the activations that is negative.

    Args:
        activations: (B, K, *S').

    Returns:
        (B,), 0 where all are 0.

    Example:
        >>> import torch
        >>> signed_share(torch.tensor([[[3.0, -1.0]], [[0.0, 0.0]]]))
        tensor([0.2500, 0.0000])
    """
    flat = activations.flatten(1)
    total = flat.abs().sum(dim=1)
    return flat.clamp(max=0).abs().sum(dim=1) / total.where(total > 0, 1)


def respond_clipped_share(activations: Tensor) -> Tensor:
    """Share of the live channels that Respond-CAM divides by its safe denominator and not by their sum.

    Args:
        activations: (B, K, *S').

    Returns:
        (B,), 0 where no channel is live.
    """
    flat = activations.flatten(2)
    absolute = flat.abs().sum(dim=2)
    live = absolute > 0
    clipped = live & (flat.sum(dim=2).abs() < SIGNED_SUM_FLOOR * absolute)
    return clipped.sum(dim=1) / live.sum(dim=1).clamp(min=1)


def respond_warnings(activations: Tensor, norms_after: Sequence[str], layer: str) -> list[str]:
    """Why a Respond-CAM of this layer should be read with care.

    Args:
        activations: (B, K, *S').
        norms_after: Norms between the layer and the logits, `between(logits, source).norms`.
        layer: Name of the layer.

    Returns:
        Sentences; empty when the sum of the map is the sum over cells of gradient x activation, with weights that are
        means of the gradient.

    Example:
        >>> import torch
        >>> respond_warnings(torch.rand(1, 3, 4, 4), [], "layer4")
        []
    """
    found = Between(tuple(norms_after)).reasons(layer)
    negative, clipped = (float(f(activations.float()).max()) for f in (signed_share, respond_clipped_share))
    if negative > 0:
        held = f", and {clipped:.1%} of its channels only kept finite by the safe denominator" if clipped else ""
        found.append(
            f"layer {layer!r} gives negative values ({negative:.1%} of its absolute sum){held}: Respond-CAM divides by "
            "the sum of each channel and is meant for the output of a ReLU or a pool; choose the activation behind it"
        )
    return found
