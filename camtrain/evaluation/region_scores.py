"""The scores of maps against regions, by name, for one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from camtrain.metrics import (
    empty_map_rate,
    energy_inside,
    mask_iou,
    organ_iou,
    organ_iou_curve,
    pointing_game,
    relevance_rank,
)

_TWINS = {
    "energy_inside": energy_inside,
    "mask_iou": mask_iou,
    "relevance_rank": relevance_rank,
    "empty_map_rate": empty_map_rate,
}


def region_scores(
    maps: Tensor,
    allowed: Tensor,
    pairs: Tensor,
    measures: Sequence[str],
    thresholds: Tensor | None = None,
    authors_edge_case: bool = False,
    tolerance_mm: float | None = None,
    spacing: Tensor | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Scores of the wanted pairs.

    Args:
        maps: (B, L, *S') signed.
        allowed: (B, L, *S') bool.
        pairs: (B, L) bool: what is wanted, whatever the truth says.
        measures: Names of the family `region`.
        thresholds: (L,) OrganIoU thresholds; None gives its curve over all 53.
        authors_edge_case: As for `OrganIoU`.
        tolerance_mm: Radius of the pointing game; None asks for the very cell.
        spacing: (B, rank) mm per cell of the maps, where known.

    Yields:
        Measure and scores (B, L), or (B, L, 53), NaN where undefined or not counted.
    """
    label = pairs.float()
    for name in measures:
        if name == "organ_iou" and thresholds is None:
            yield name, organ_iou_curve(maps, allowed, label, None, authors_edge_case)
        elif name == "organ_iou":
            yield name, organ_iou(maps, allowed, label, None, thresholds, authors_edge_case)
        elif name == "pointing_game":
            # Unknown geometry is NaN spacing: undefined where a radius in mm is asked for.
            unknown = maps.new_full((maps.ndim - 2,), float("nan"))
            step = unknown if spacing is None else spacing
            yield name, pointing_game(maps, allowed, label, None, 0.0, tolerance_mm, step)
        elif name == "energy_inside_chance":
            share = allowed.flatten(2).float().mean(dim=2).double()
            yield name, share.masked_fill(~pairs, float("nan"))
        else:
            yield name, _TWINS[name](maps, allowed, label)
