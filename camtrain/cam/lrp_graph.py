"""LRP for what no module shows: gates and activations that are written as functions, found in the autograd graph.

`lrp_hooks` gives every module its rule. What is left between the layers and the scores is read off the graph
afterwards: a factor of a product that came out of a sigmoid is a gate and held constant; an elementwise activation
passes relevance as it is; anything else that LRP has no rule for is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from camtrain._errors import InputError
from camtrain.cam.affine_head import is_source
from camtrain.cam.capture import reading_graph
from camtrain.cam.graph import nodes_between, operator_of
from camtrain.cam.lrp import Rules
from camtrain.cam.lrp_rules import full, safe
from camtrain.cam.validity import irregular

# Operators that only lay a gate out beside what it gates.
_LAYOUT_OPERATORS = """
Alias Clone Expand Permute Repeat ReshapeAlias Select Slice Squeeze ToCopy Transpose UnsafeView Unsqueeze View
UpsampleBilinear2D UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleTrilinear3D
"""
_LAYOUT = frozenset(_LAYOUT_OPERATORS.split())
_GATES = ("Sigmoid", "Hardsigmoid")
# Operator -> (input, output) of an elementwise activation, from what its node has saved.
_ACTIVATIONS: dict[str, Callable[[Any], tuple[Tensor, Tensor]]] = {
    "Sigmoid": lambda n: (torch.logit(n._saved_result), n._saved_result),
    "Tanh": lambda n: (torch.atanh(n._saved_result), n._saved_result),
    "Silu": lambda n: (n._saved_self, F.silu(n._saved_self)),
    "Celu": lambda n: (n._saved_self, F.celu(n._saved_self, float(n._saved_alpha))),
    "Elu": lambda n: (n._saved_self, _elu(n)),
    "Gelu": lambda n: (n._saved_self, F.gelu(n._saved_self, approximate=n._saved_approximate)),
    "Mish": lambda n: (n._saved_self, F.mish(n._saved_self)),
    "Hardswish": lambda n: (n._saved_self, F.hardswish(n._saved_self)),
    "Softplus": lambda n: (n._saved_self, F.softplus(n._saved_self, float(n._saved_beta), float(n._saved_threshold))),
}
_BETWEEN_TOKENS = "Bmm of two of its features"


@contextmanager
def graph_rules(scores: Sequence[Tensor], sources: Sequence[Tensor], rules: Rules) -> Iterator[list[str]]:
    """While this is open, backward passes from scores to sources treat written-out gates and activations by rule.

    Args:
        scores: Where relevance starts.
        sources: Where it is wanted.
        rules: `activation` and `product` say whether there is anything to do.

    Yields:
        Names of operators without a rule: their gradient is used, and relevance need not be conserved there.

    Raises:
        InputError: Attention, for which there is no rule.
    """
    if rules.product == "gradient":
        yield []
        return
    nodes = nodes_between(scores, sources)
    gates, gated = _gates(nodes, sources)
    unruled: dict[str, None] = {}
    with ExitStack() as stack:
        for gate in gates:
            stack.callback(gate.register_prehook(_nothing).remove)
        for node, name in irregular(nodes, sources):
            word = operator_of(node)
            if word.startswith("ScaledDotProduct") or name == _BETWEEN_TOKENS:
                raise InputError(
                    f"LRP has no rule for attention ({name}): use a method of the gradient family such as 'hirescam'"
                )
            if node in gates or node in gated or (name.endswith("Norm") and rules.norm == "gradient"):
                continue
            if word in _ACTIVATIONS and rules.activation == "identity":
                stack.callback(node.register_hook(_passing(node, word)).remove)
            else:
                unruled[name] = None
        if rules.norm == "identity":
            unruled |= {operator_of(n): None for n in nodes if operator_of(n).endswith("BatchNorm")}
        yield list(unruled)


def _gates(nodes: dict[Any, None], sources: Sequence[Tensor]) -> tuple[set[Any], set[Any]]:
    """Sigmoids that scale another feature, and the products in which they do."""
    gates, gated = set(), set()
    for node in nodes:
        if operator_of(node) != "Mul":
            continue
        factors = [op for op, _ in node.next_functions if op in nodes or _is_any(op, sources)]
        found = [gate for gate in map(_gate_of, factors) if gate in nodes]
        if len(factors) == 2 and found:
            gates.add(found[-1])
            gated.add(node)
    return gates, gated


def _elu(node: Any) -> Tensor:
    """ELU, SELU and CELU are one operator."""
    x: Tensor = node._saved_self
    curved = node._saved_alpha * torch.expm1(x * node._saved_input_scale)
    scaled: Tensor = torch.where(x > 0, x, curved) * node._saved_scale
    return scaled


def _is_any(node: Any, sources: Sequence[Tensor]) -> bool:
    return node is not None and any(is_source(node, source) for source in sources)


def _gate_of(node: Any) -> Any:
    """The sigmoid that a factor came out of, or None."""
    while node is not None and operator_of(node) in _LAYOUT:
        node = node.next_functions[0][0]
    return node if node is not None and operator_of(node) in _GATES else None


def _nothing(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else torch.zeros_like(g) for g in gradients)


def _passing(node: Any, word: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """Identity rule: what arrives over y leaves over x, times y / x."""
    # The hook must not hold the node: a circle through the graph would never be freed.
    with reading_graph(), torch.no_grad():
        before, after = (full(t) for t in _ACTIVATIONS[word](node))
        factor = safe(after) / safe(before)

    def hook(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        (arrived,) = outputs
        if arrived is None:
            return inputs
        return ((arrived * factor).to(arrived.dtype),)

    return hook
