"""The one table of attention methods: formula, cost, guarantee, blind spot, reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from camtrain._errors import InputError, nearest

# What holds for every method of this table, and what no map of cells can say.
CELLS_NOT_EVIDENCE = (
    "A map locates cells, not evidence: a cell may have seen the whole scan (ct.layers prints its seen share). "
    "To govern what the network uses, change what lies outside the organs (OutsideSwap)."
)


@dataclass(frozen=True)
class Method:
    """One row of the method table.

    Attributes:
        name: What `method=` takes.
        formula: `module:function` of the pure formula (activations, gradients) -> map.
        differentiable: Can a loss be trained through it?
        forwards: Forward passes beyond the one that gives the logits.
        backwards: Partial backward passes, logits to layer; n = labels selected per sample.
        grid: Resolution of the map.
        guarantee: What is exact, and when.
        blind_spot: What it cannot see.
        reference: Where it was defined.
    """

    name: str
    formula: str
    differentiable: bool
    forwards: str
    backwards: str
    grid: str
    guarantee: str
    blind_spot: str
    reference: str

    def function(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The pure formula."""
        from camtrain.cam import functional

        found: Callable[[Tensor, Tensor], Tensor] = getattr(functional, self.formula)
        return found


_N = "n (0 if the head is affine)"
_TABLE = (
    Method(
        "hirescam", "hires_cam", True, "0", _N, "layer",
        "sum(map) + bias = logit behind one FC layer (flatten, pool, per slice)",
        "cells are coarse and overlap; no proof before the last convolution",
        "Draelos and Carin 2020, arXiv:2011.08891",
    ),
    Method(
        "gradcam", "grad_cam", True, "0", _N, "layer",
        "equals CAM / positions behind pool + FC",
        "averages the gradient, so behind flatten or per-slice heads it marks cells that the model does not use",
        "Selvaraju et al. 2017, arXiv:1610.02391",
    ),
    Method(
        "cam", "cam", True, "0", "0", "layer",
        "mean(map) + bias = logit; pool + FC heads only, refused elsewhere",
        "no other head",
        "Zhou et al. 2016, arXiv:1512.04150",
    ),
    Method(
        "gradcam++", "grad_cam_pp", True, "0", _N, "layer",
        "none",
        "drops negative gradients, so it cannot show evidence against a label",
        "Chattopadhay et al. 2018, arXiv:1710.11063",
    ),
    Method(
        "layercam", "layer_cam", True, "0", _N, "layer",
        "none; finer maps in early layers",
        "drops negative gradients, so it cannot show evidence against a label",
        "Jiang et al. 2021, IEEE TIP 30",
    ),
    Method(
        "xgradcam", "xgrad_cam", True, "0", _N, "layer",
        "the formula of respondcam",
        "as respondcam",
        "Fu et al. 2020, arXiv:2008.02312",
    ),
    Method(
        "respondcam", "respond_cam", True, "0", _N, "layer",
        "sum(map) = sum(hirescam); = logit for bias-free piecewise-linear heads",
        "needs a layer with non-negative output; says nothing when Instance- or GroupNorm follows the layer (sum 0)",
        "Zhao et al. 2018, arXiv:1806.00102",
    ),
)  # fmt: skip
_BY_NAME = {method.name: method for method in _TABLE}


class MethodTable(tuple[Method, ...]):
    """What `ct.methods()` returns: rows that print as a table and can be looped over."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    __repr__ = __str__


def _lines(rows: tuple[Method, ...]) -> Iterator[str]:
    width = max(len(row.name) for row in rows)
    for row in rows:
        trained = "differentiable" if row.differentiable else "not differentiable"
        yield f"{row.name:<{width}}  {trained}; forwards {row.forwards}, backwards {row.backwards}; grid: {row.grid}"
        for word in ("guarantee", "blind_spot", "reference"):
            yield f"{'':<{width}}  {word.replace('_', ' ')}: {getattr(row, word)}"
    yield ""
    yield CELLS_NOT_EVIDENCE


def methods() -> MethodTable:
    """All attention methods, with what each costs, guarantees and cannot see.

    Returns:
        A tuple of `Method` rows that prints as a table.

    Example:
        >>> [row.name for row in methods() if "logit" in row.guarantee]
        ['hirescam', 'cam', 'respondcam']
    """
    return MethodTable(_TABLE)


def find_method(name: str) -> Method:
    """The row of one method.

    Raises:
        InputError: Unknown name; the message names the nearest.
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        raise InputError(f"unknown method {name!r}{nearest(name, _BY_NAME)}") from None
