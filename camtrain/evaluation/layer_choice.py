"""`rank_layers`: from an evaluation of several layers, which one to read maps at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from camtrain._errors import InputError, nearest
from camtrain.evaluation.evaluation import Evaluation
from camtrain.evaluation.measures import MEASURES

BLIND = 0.9
"""Correlation between the maps of a case's labels from which on a layer counts as blind to the label."""
_SENSITIVITY = "class_sensitivity"
_DEFAULT = ("average_drop", "mask_iou", _SENSITIVITY)


@dataclass(frozen=True)
class LayerScore:
    """One layer of `rank_layers`.

    Attributes:
        layer: Dotted name.
        seen: Share of the image that a central cell depends on; None where it was not given.
        scores: Measure -> macro mean; None where undefined.
        rank: Mean of the layer's ranks over the measures, 1 = best; None for a layer that is left out.
        blind: Left out, since its maps are one map for all labels.
        taken: The layer to take.
    """

    layer: str
    seen: float | None
    scores: Mapping[str, float | None]
    rank: float | None
    blind: bool
    taken: bool


def rank_layers(
    evaluation: Evaluation,
    method: str = "",
    measures: Sequence[str] = _DEFAULT,
    seen: Mapping[str, float | None] | None = None,
    split: str | None = None,
) -> list[LayerScore]:
    """Rank the layers of an evaluation by several measures, and take one.

    A convention, not a theorem: ranks are averaged over the measures, ties share a rank, and of equal mean ranks the
    layer whose cells have seen less of the image wins, since its maps say more about where the evidence lies. A
    layer with class sensitivity of 0.9 and more shows one map for all labels, and is not taken however well that map
    scores. An undefined score ranks last.

    Args:
        evaluation: What `ct.evaluate` gave for at least one layer and these measures.
        method: Which method; empty where the evaluation has one only.
        measures: Measures that have a better end, of `camtrain.evaluation.MEASURES`.
        seen: Layer -> seen share, as `ct.layers` tells: `{row.name: row.seen for row in ct.layers(model, image)}`.
        split: Which split; None where there is one only. Choose on validation cases, report on test cases.

    Returns:
        One per layer, in the order of the evaluation. None is taken when all are blind.

    Raises:
        InputError: An unknown measure, one without a better end, or what was not evaluated.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import camtrain as ct
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Flatten(),
        ...                       nn.Linear(48, 2))
        >>> batch = {"image": torch.rand(8, 1, 16), "label": torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 4)}
        >>> found = ct.evaluate(model, [batch], None, ["gradcam"], ["1", "3"], measures=["class_sensitivity"],
        ...                     repeats=200, progress=False)
        >>> [(row.layer, row.blind, row.taken) for row in rank_layers(found, measures=["class_sensitivity"])]
        [('1', False, True), ('3', True, False)]
    """
    for name in measures:
        if name not in MEASURES or MEASURES[name].higher is None:
            known = [each for each, measure in MEASURES.items() if measure.higher is not None]
            raise InputError(f"measures= expects measures with a better end, got {name!r}{nearest(str(name), known)}")
    layers = list(dict.fromkeys(row.layer for row in evaluation.rows if row.layer and method in ("", row.method)))
    if not layers or not measures:
        raise InputError(f"the evaluation has no layer of {method or 'any method'}, or measures= is empty")
    scores = {
        layer: {m: evaluation.row(m, split=split, method=method, layer=layer).mean for m in measures}
        for layer in layers
    }
    blind = {layer for layer in layers if (scores[layer].get(_SENSITIVITY) or 0.0) >= BLIND}
    ranked = [layer for layer in layers if layer not in blind]
    ranks = {layer: sum(of) / len(of) for layer, of in _ranks(ranked, scores, measures)}
    shares = seen or {}
    best = min(ranked, key=lambda layer: (ranks[layer], _share(shares.get(layer))), default=None)
    return [
        LayerScore(layer, shares.get(layer), scores[layer], ranks.get(layer), layer in blind, layer == best)
        for layer in layers
    ]


def _ranks(
    layers: Sequence[str], scores: Mapping[str, Mapping[str, float | None]], measures: Sequence[str]
) -> Iterator[tuple[str, list[float]]]:
    """Layer and its rank in each measure; equal values share the mean of their ranks."""
    goods = {measure: [_good(scores[layer][measure], measure) for layer in layers] for measure in measures}
    for at, layer in enumerate(layers):
        yield (
            layer,
            [1 + sum(g > of[at] for g in of) + 0.5 * (of.count(of[at]) - 1) for of in goods.values()],
        )


def _good(value: float | None, measure: str) -> float:
    """Higher is better; undefined is worst."""
    if value is None:
        return float("-inf")
    return value if MEASURES[measure].higher else -value


def _share(seen: float | None) -> float:
    return 1.0 if seen is None else seen
