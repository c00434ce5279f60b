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
        family: How it is computed: `gradient` (activations and gradients of a forward that has run), or by forwards of
            its own: `relevance` (LRP), `perturbation`, `guided`.
        formula: Function of `camtrain.cam.functional`, (activations, gradients) -> map; of the other families the
            function that computes it.
        differentiable: Can a loss be trained through it?
        forwards: Forward passes beyond the one that gives the logits; 1 = that one cannot be the user's own.
        backwards: Partial backward passes, logits to layer; n = labels selected per sample.
        grid: Resolution of the map.
        guarantee: What is exact, and when.
        blind_spot: What it cannot see.
        reference: Where it was defined.
    """

    name: str
    family: str
    formula: str
    differentiable: bool
    forwards: str
    backwards: str
    grid: str
    guarantee: str
    blind_spot: str
    reference: str

    def function(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The pure formula of a method of the gradient family."""
        from camtrain.cam import functional

        found: Callable[[Tensor, Tensor], Tensor] = getattr(functional, self.formula)
        return found


_N = "n (0 if the head is affine)"
_TABLE = (
    Method(
        "hirescam", "gradient", "hires_cam", True, "0", _N, "layer",
        "sum(map) + bias = logit behind one FC layer (flatten, pool, per slice)",
        "cells are coarse and overlap; no proof before the last convolution",
        "Draelos and Carin 2020, arXiv:2011.08891",
    ),
    Method(
        "gradcam", "gradient", "grad_cam", True, "0", _N, "layer",
        "equals CAM / positions behind pool + FC",
        "averages the gradient, so behind flatten or per-slice heads it marks cells that the model does not use",
        "Selvaraju et al. 2017, arXiv:1610.02391",
    ),
    Method(
        "cam", "gradient", "cam", True, "0", "0", "layer",
        "mean(map) + bias = logit; pool + FC heads only, refused elsewhere",
        "no other head",
        "Zhou et al. 2016, arXiv:1512.04150",
    ),
    Method(
        "gradcam++", "gradient", "grad_cam_pp", True, "0", _N, "layer",
        "none",
        "drops negative gradients, so it cannot show evidence against a label",
        "Chattopadhay et al. 2018, arXiv:1710.11063",
    ),
    Method(
        "layercam", "gradient", "layer_cam", True, "0", _N, "layer",
        "none; finer maps in early layers",
        "drops negative gradients, so it cannot show evidence against a label",
        "Jiang et al. 2021, IEEE TIP 30",
    ),
    Method(
        "xgradcam", "gradient", "xgrad_cam", True, "0", _N, "layer",
        "the formula of respondcam",
        "as respondcam",
        "Fu et al. 2020, arXiv:2008.02312",
    ),
    Method(
        "respondcam", "gradient", "respond_cam", True, "0", _N, "layer",
        "sum(map) = sum(hirescam); = logit for bias-free piecewise-linear heads",
        "needs a layer with non-negative output; says nothing when Instance- or GroupNorm follows the layer (sum 0)",
        "Zhao et al. 2018, arXiv:1806.00102",
    ),
    Method(
        "counterfactual", "gradient", "counterfactual", True, "0", _N, "layer",
        "minus gradcam: positive where removing what the cells show would raise the score",
        "as gradcam",
        "Selvaraju et al. 2017, arXiv:1610.02391, section 3.3",
    ),
    Method(
        "scorecam", "perturbation", "score_cam", False, "K (or channels=)", "0", "layer",
        "no gradient enters; channel weights are positive and sum to 1",
        "cannot show evidence against a label; a masked scan is no scan, so the logits it asks for are those of "
        "unnatural images; a constant channel counts for nothing",
        "Wang et al. 2020, arXiv:1910.01279",
    ),
    Method(
        "relevancecam", "relevance", "relevance_maps", False, "1", "n, each over all wanted layers", "layer",
        "channel weights add up to the relevance that started (contrast='none': the logit), at any depth",
        "contrast='none' maps of different labels are nearly the same; with contrast, labels that are present together "
        "are set against each other unless contrast= names the absent ones",
        "Lee et al. 2021, CVPR, Relevance-CAM",
    ),
    Method(
        "lrp", "relevance", "relevance_maps", False, "1", "n, each over all wanted layers", "layer",
        "sum(map) = logit under rules='zplus', at any layer and the input; rules='lrp0' is activation x gradient",
        "z+ maps of different labels are nearly the same (use contrast=); no rule for attention layers",
        "Bach et al. 2015, PLoS ONE 10(7)",
    ),
    Method(
        "guided_backprop", "guided", "guided_maps", False, "1", "n", "image",
        "ReLU networks only; others are refused unless approximate=True",
        "almost the same after the weights are randomised and for every label: texture for display, never a score",
        "Springenberg et al. 2015, arXiv:1412.6806",
    ),
    Method(
        "guided_gradcam", "guided", "guided_maps", False, "1", "2 n", "image",
        "zero wherever the enlarged positive Grad-CAM is",
        "inherits from guided backprop that it hardly depends on the weights: texture for display, never a score",
        "Selvaraju et al. 2017, arXiv:1610.02391, section 3.2",
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
        >>> [row.name for row in methods() if not row.differentiable]
        ['scorecam', 'relevancecam', 'lrp', 'guided_backprop', 'guided_gradcam']
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
