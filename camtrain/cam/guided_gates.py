"""Find, in the autograd graph, where guided backprop has to gate the gradient.

The graph knows what ran: `nn.ReLU`, `F.relu`, in-place and re-used ones all leave a ReLU node per call, and nodes of a
checkpointed part (`use_reentrant=False`) are there too. So nothing of the model is hooked or changed, and no call is
missed; only the graph of this one forward gets hooks, and loses them afterwards.

Guided backprop (Springenberg et al. 2015, arXiv:1412.6806, section 3.4) is defined on ReLU: R = [x > 0] [g > 0] g. The
backward of ReLU gives [x > 0]; the gate adds [g > 0]. For smooth relatives of ReLU there is only an approximation,
act'(x) [x > 0] [g > 0] g. Sigmoid and tanh are no relatives: they squash or gate, and keep their own gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.cam.capture import reading_graph
from camtrain.cam.graph import nodes_between

_REENTRANT = "CheckpointFunctionBackward"
# Node -> (how users call it, where it keeps its input, or its result, which has the same sign).
_SMOOTH = {
    "SiluBackward0": ("SiLU", "_saved_self"),
    "GeluBackward0": ("GELU", "_saved_self"),
    "MishBackward0": ("Mish", "_saved_self"),
    "HardswishBackward0": ("Hardswish", "_saved_self"),
    "SoftplusBackward0": ("Softplus", "_saved_self"),
    "EluBackward0": ("ELU or SELU", "_saved_self"),
    "EluBackward1": ("ELU or SELU", "_saved_result"),
    "CeluBackward0": ("CELU", "_saved_self"),
    "CeluBackward1": ("CELU", "_saved_result"),
    "LeakyReluBackward0": ("LeakyReLU", "_saved_self"),
    "LeakyReluBackward1": ("LeakyReLU", "_saved_result"),
    "PreluKernelBackward0": ("PReLU", "_saved_self"),
    "RreluWithNoiseBackward0": ("RReLU", "_saved_self"),
}
_CURVED = {
    "SigmoidBackward0", "HardsigmoidBackward0", "HardtanhBackward0", "TanhBackward0", "ErfBackward0",
    "SoftplusBackward0",
}  # fmt: skip
_STRAIGHT = {"MulBackward0", "DivBackward0", "AddBackward0", "CloneBackward0", "AliasBackward0", "ToCopyBackward0"}
_LONGEST_CHAIN = 12


@dataclass(frozen=True)
class Gate:
    """One place where the gradient is gated.

    Attributes:
        node: The activation's node of the graph.
        name: What the activation is called.
        read: Gives the activation's input, whose sign gates as well; None for a ReLU, whose own backward does that.
        exact: Is guided backprop defined on it?
    """

    node: Any
    name: str
    read: Callable[[], Tensor] | None
    exact: bool


def find_gates(scores: Tensor, image: Tensor) -> list[Gate]:
    """Every activation that guided backprop has to do with, between an image and scores.

    Warns of custom autograd functions, which no graph can be read through.

    Args:
        scores: Any shape, with a graph down to `image`.
        image: The leaf that the graph begins at.

    Raises:
        InputError: The scores do not depend on the image, or a part is hidden by reentrant checkpointing.

    Example:
        >>> image = torch.rand(1, 3, requires_grad=True)
        >>> [gate.name for gate in find_gates(torch.nn.functional.silu(image.relu()), image)]
        ['SiLU', 'ReLU']
    """
    between = _between(scores, image)
    names = {type(node).__name__ for node in between}
    if _REENTRANT in names:
        raise InputError(
            "a part of the model is checkpointed with use_reentrant=True, which hides its ReLUs from the graph: use "
            "use_reentrant=False"
        )
    custom = {type(n).__name__.removesuffix("Backward") for n in between if _is_custom(n)}
    if custom:
        warnings.warn(
            f"guided backprop cannot look into the custom autograd function {', '.join(sorted(custom))}: its own "
            "backward is used as it is",
            stacklevel=5,
        )
    gated, parts = _self_gated(between)
    found = []
    for node in between:
        gate = gated.get(node) or (None if node in parts else _gate(node))
        if gate is not None:
            found.append(gate)
    return found


@contextmanager
def guiding(gates: Iterable[Gate]) -> Iterator[None]:
    """Gradients that flow meanwhile through the graph are gated."""
    with ExitStack() as stack:
        for gate in gates:
            stack.callback(gate.node.register_prehook(_hook(gate)).remove)
        yield


def _hook(gate: Gate) -> Callable[[tuple[Tensor | None, ...]], tuple[Tensor | None, ...]]:
    # The hook must not hold the node: a circle through the graph would never be freed. And what a checkpoint saves can
    # be read only once during a backward pass, so the sign is read before.
    positive: Tensor | None = None
    if gate.read is not None:
        with reading_graph(), torch.no_grad():
            positive = gate.read() > 0

    def clamp(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if gradient is None:
            return gradients
        kept = gradient.clamp(min=0)
        return (kept if positive is None else kept * positive,)

    return clamp


def _between(scores: Tensor, image: Tensor) -> dict[Any, None]:
    found = nodes_between([scores], [image], with_sources=True)
    if not found:
        raise InputError(
            "no gradient reaches the image: the model detaches it, rounds it, or runs a part under torch.no_grad; "
            "guided backprop needs a graph from the scores to the image"
        )
    return found


def _is_custom(node: Any) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction) and not _memory_efficient(node)


def _memory_efficient(node: Any) -> bool:
    """MONAI's SwishImplementation, which keeps its input."""
    return type(node).__name__ == "SwishImplementationBackward"


def _gate(node: Any) -> Gate | None:
    name = type(node).__name__
    if name == "ReluBackward0":
        return Gate(node, "ReLU", None, exact=True)
    if name in _SMOOTH:
        word, saved = _SMOOTH[name]
        return Gate(node, word, lambda: _tensor(getattr(node, saved)), exact=False)
    if _memory_efficient(node):
        return Gate(node, "Swish", lambda: _tensor(node.saved_tensors[0]), exact=False)
    if _rectifies(node, name):
        # At x == 0 clamp passes the gradient and ReLU does not.
        return Gate(node, "ReLU", lambda: _tensor(node._saved_self), exact=True)
    return None


def _tensor(value: Any) -> Tensor:
    found: Tensor = value
    return found


def _rectifies(node: Any, name: str) -> bool:
    """ReLU by another name: `clamp(min=0)`, `threshold(0, 0)`, ReLU6. Clamping at both ends is windowing, no ReLU."""
    if name == "HardtanhBackward0":
        return bool(node._saved_min_val == 0)
    if name in ("ThresholdBackward0", "ThresholdBackward1"):
        return bool(node._saved_threshold == 0)
    if name == "ClampMinBackward0":
        return bool(node._saved_min == 0)
    return name == "ClampBackward1" and node._saved_min == 0 and node._saved_max is None


def _self_gated(between: dict[Any, None]) -> tuple[dict[Any, Gate], set[Any]]:
    """Activations that are written out as u * f(u), element by element: Swish, Mish, Hardswish, GELU.

    Returns:
        The product's node -> gate, and the nodes that f is made of.
    """
    gates: dict[Any, Gate] = {}
    parts: set[Any] = set()
    for node in between:
        if type(node).__name__ != "MulBackward0" or len(_data(node, between)) != 2:
            continue
        chains = [_chain(operand, between) for operand in node.next_functions]
        (left, left_curved, left_nodes), (right, right_curved, right_nodes) = chains
        if left != right or left_curved == right_curved:
            continue
        saved = "_saved_other" if left_curved else "_saved_self"
        gates[node] = Gate(node, "Swish (u * f(u))", _reader(node, saved), exact=False)
        parts.update(left_nodes if left_curved else right_nodes)
    return gates, parts


def _reader(node: Any, saved: str) -> Callable[[], Tensor]:
    return lambda: _tensor(getattr(node, saved))


def _data(node: Any, between: dict[Any, None]) -> list[tuple[Any, int]]:
    return [operand for operand in node.next_functions if operand[0] in between]


def _chain(operand: tuple[Any, int], between: dict[Any, None]) -> tuple[tuple[Any, int], bool, list[Any]]:
    """Down through operators that treat every element by itself: where they start from, curved or not, the nodes."""
    curved, nodes = False, []
    for _ in range(_LONGEST_CHAIN):
        node = operand[0]
        name = type(node).__name__
        data = _data(node, between)
        if len(data) != 1 or name not in _CURVED | _STRAIGHT:
            break
        curved = curved or name in _CURVED
        nodes.append(node)
        operand = data[0]
    return operand, curved, nodes
