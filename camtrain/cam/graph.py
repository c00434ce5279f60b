"""Reading the autograd graph: what lies between scores and the tensors that they are asked about."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from camtrain.cam.affine_head import is_source


def nodes_between(scores: Sequence[Tensor], sources: Sequence[Tensor], with_sources: bool = False) -> dict[Any, None]:
    """Nodes on a way from scores down to any of the sources, from the scores on.

    A branch made of parameters only is no such way.

    Args:
        scores: Tensors with a graph.
        sources: Tensors that the graph leads to.
        with_sources: Count the sources' own nodes too.

    Example:
        >>> import torch
        >>> A = torch.rand(2, 3, requires_grad=True)
        >>> [operator_of(node) for node in nodes_between([(A.relu() * torch.ones(3)).sum()], [A])]
        ['Sum', 'Mul', 'Relu']
    """
    below: dict[Any, None] = {}
    above: dict[Any, list[Any]] = {}
    reached: list[Any] = []
    stack: list[Any] = [score.grad_fn for score in scores]
    while stack:
        node = stack.pop()
        if node is None or node in below:
            continue
        below[node] = None
        if any(is_source(node, source) for source in sources):
            reached.append(node)
        for operand, _ in node.next_functions:
            above.setdefault(operand, []).append(node)
            stack.append(operand)
    found: set[Any] = set(reached) if with_sources else set()
    while reached:
        for node in above.get(reached.pop(), ()):
            if node not in found:
                found.add(node)
                reached.append(node)
    return {node: None for node in below if node in found}


def operator_of(node: Any) -> str:
    """ReluBackward0 -> Relu; a custom autograd.Function keeps its own name."""
    return re.sub(r"Backward\w*$|Backwards$", "", type(node).__name__) or type(node).__name__
