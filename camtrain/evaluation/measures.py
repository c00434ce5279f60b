"""What `evaluate` can measure: one table, read by the scorer, the tables and the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from camtrain._errors import InputError, nearest

Family = Literal["logits", "region", "map", "weights", "image", "reliance"]


@dataclass(frozen=True)
class Measure:
    """One thing to measure.

    Attributes:
        name: As in the column `measure`.
        family: What it needs: `logits` only, a map and a `region`, a `map` alone, channel `weights`, forwards of a
            masked `image`, or forwards with replaced regions (`reliance`).
        higher: Is more better? None where neither is.
        says: One sentence.
    """

    name: str
    family: Family
    higher: bool | None
    says: str

    @property
    def paid(self) -> bool:
        """Does it need forwards of its own?"""
        return self.family in ("weights", "image", "reliance")


MEASURES: dict[str, Measure] = {
    m.name: m
    for m in (
        Measure("auroc", "logits", True, "chance that a present case has a higher logit than an absent one"),
        Measure("auprc", "logits", True, "average precision: area under the precision-recall curve"),
        Measure("calibration_error", "logits", False, "mean gap of probability and share present, over 15 bins"),
        Measure("auroc_per_patient", "logits", True, "AUROC of one row per patient: mean probability, any finding"),
        Measure("auprc_per_patient", "logits", True, "average precision of one row per patient"),
        Measure("organ_iou", "region", True, "share of the attended cells inside the organs, at a threshold per label"),
        Measure("energy_inside", "region", True, "share of the positive evidence inside the organs"),
        Measure("energy_inside_chance", "region", None, "what an evenly spread map scores: the organs' share of cells"),
        Measure("pointing_game", "region", True, "the single strongest cell lies inside the organs"),
        Measure("mask_iou", "region", True, "overlap of cells above mean + 1 std and organs, intersection over union"),
        Measure("relevance_rank", "region", True, "of the k highest cells the share inside, k = cells of the organs"),
        Measure("empty_map_rate", "region", False, "maps without any positive cell"),
        Measure("sum_to_score_l1", "map", False, "|sum of the map - logit|"),
        Measure("bias_share", "map", None, "(logit - sum of the map) / (|logit| + |sum|): what no cell accounts for"),
        Measure("kendall_tau", "map", True, "rank agreement of map sums and logits over the labels of a case"),
        Measure("class_sensitivity", "map", False, "correlation with the maps of the case's other labels; 1 = blind"),
        Measure("channel_sparseness", "weights", None, "Gini index of the channel weights; 0 = all channels alike"),
        Measure("average_drop", "image", False, "relative loss of probability when only the map's region is shown"),
        Measure("average_increase", "image", True, "the probability rises when only the map's region is shown"),
        Measure("insertion_auc", "image", True, "area under probability while voxels are revealed, highest first"),
        Measure("deletion_auc", "image", False, "area under probability while voxels are removed, highest first"),
        Measure("outside_effect", "reliance", None, "change of probability when all outside the organs is replaced"),
        Measure("inside_effect", "reliance", None, "change of probability when the organs are replaced"),
        Measure("shortcut_reliance", "reliance", False, "outside effect / (outside + inside effect)"),
        Measure("auroc_outside_replaced", "reliance", True, "AUROC when all outside the organs is replaced"),
        Measure("shortcut_risk", "reliance", False, "mean of shortcut_reliance and 1 - auroc_outside_replaced"),
    )
}
# Words for whole families.
_GROUPS = {
    "free": tuple(n for n, m in MEASURES.items() if not m.paid),
    "paid": tuple(n for n, m in MEASURES.items() if m.paid),
    "all": tuple(MEASURES),
    "reliance": tuple(n for n, m in MEASURES.items() if m.family == "reliance"),
}


def read_measures(given: str | Sequence[str]) -> tuple[str, ...]:
    """The measures that a user asks for, in the order of the table.

    Args:
        given: Names, or `free` (no forwards of their own), `paid`, `reliance`, `all`; one or several.

    Raises:
        InputError: An unknown name.

    Example:
        >>> read_measures(["energy_inside", "auroc"])
        ('auroc', 'energy_inside')
    """
    words = [given] if isinstance(given, str) else list(given)
    wanted = {name for word in words for name in _expanded(word)}
    if not wanted:
        raise InputError("measures= expects at least one measure, got none: 'free' takes all without extra forwards")
    return tuple(name for name in MEASURES if name in wanted)


def _expanded(word: str) -> Iterator[str]:
    if word in _GROUPS:
        yield from _GROUPS[word]
    elif word in MEASURES:
        yield word
    else:
        known = (*_GROUPS, *MEASURES)
        raise InputError(f"measures= has no {word!r}{nearest(str(word), known)}; all: {', '.join(known)}")
