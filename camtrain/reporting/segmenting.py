"""Weak segmentation: a map becomes a binary mask at a level that is taken from the map itself."""

from __future__ import annotations

import math
import re

import numpy as np
import numpy.typing as npt

from camtrain._errors import InputError

Bools = npt.NDArray[np.bool_]
_NUMBER = re.compile(r"mean(?:\+(?:(\d+(?:\.\d*)?|\.\d+)\*?)?std)?")
RULES = "mean, mean+std, mean+2std, mean+0.5*std or otsu"


def segmentation_level(values: npt.NDArray[np.floating], rule: str = "mean+std") -> float:
    """The level above which a map counts as the finding.

    `mean+K*std` is the rule of Relevance-CAM (Lee et al., CVPR 2021, with K = 1; numpy's std, ddof 0), `otsu` the cut
    between two sorted values that leaves the least variance on both sides of it (Otsu 1979, over all values instead of
    a histogram). Both follow the map when it is scaled by a positive factor or shifted, so that any normalisation
    before them changes nothing. A ReLU before them does, since it is no such change.

    Args:
        values: A map in any shape, signed, enlarged to the grid on which it is segmented.
        rule: `mean`, `mean+std`, `mean+2std`, `mean+0.5*std`, ..., or `otsu`.

    Returns:
        The level; the map's maximum where the map is constant, so that nothing lies above it. NaN for a map that is
        not finite.

    Raises:
        InputError: An unknown rule, or an empty map.

    Example:
        >>> segmentation_level(np.array([0.0, 0.0, 0.0, 4.0]), "mean+std")
        2.732050807568877
        >>> segmentation_level(np.array([0.0, 1.0, 5.0, 6.0]), "otsu")
        1.0
    """
    factor = _factor(rule)
    flat = np.asarray(values, dtype=np.float64).ravel()
    if not flat.size:
        raise InputError("expected a map with at least one cell, got an empty one")
    low, high = float(flat.min()), float(flat.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        return math.nan
    if low == high:
        # Rounding of the mean must not let a constant map rise above itself.
        return high
    if factor is None:
        return _otsu(flat)
    return float(flat.mean() + factor * flat.std())


def segment(values: npt.NDArray[np.floating], rule: str = "mean+std") -> Bools:
    """Where a map lies strictly above its own level.

    Args:
        values: A map (*S), signed, enlarged to the image (`ct.explain(..., size="image")`).
        rule: As for `segmentation_level`.

    Returns:
        (*S) bool; nothing of a constant map, or of one that is not finite.

    Raises:
        InputError: An unknown rule, or an empty map.

    Example:
        >>> segment(np.array([[0.0, 1.0, 0.0], [0.0, 6.0, 5.0]])).astype(int).tolist()
        [[0, 0, 0], [0, 1, 1]]
    """
    above: Bools = np.asarray(values, dtype=np.float64) > segmentation_level(values, rule)
    return above


def dice(found: Bools, truth: Bools) -> float:
    """Dice's overlap of two masks, 2 |A and B| / (|A| + |B|).

    Args:
        found: (*S) bool.
        truth: (*S) bool.

    Returns:
        0 to 1; NaN where both are empty.

    Raises:
        InputError: The masks differ in shape.

    Example:
        >>> round(dice(np.array([True, True, False]), np.array([False, True, False])), 3)
        0.667
    """
    if found.shape != truth.shape:
        raise InputError(f"expected two masks of one shape, got {found.shape} and {truth.shape}: resample one of them")
    total = np.count_nonzero(found) + np.count_nonzero(truth)
    return float(2 * np.count_nonzero(found & truth) / total) if total else math.nan


def _factor(rule: str) -> float | None:
    """Standard deviations above the mean; None for Otsu's rule."""
    if rule == "otsu":
        return None
    match = _NUMBER.fullmatch(rule.replace(" ", "")) if isinstance(rule, str) else None
    if match is None:
        raise InputError(f"expected the rule of a segmentation, {RULES}, got {rule!r}")
    return float(match[1] or 1) if "std" in match[0] else 0.0


def _otsu(flat: npt.NDArray[np.float64]) -> float:
    """The largest value below the cut."""
    # Scaled to 0..1, so that squares neither overflow nor vanish.
    ordered = np.sort(flat)
    unit = (ordered - ordered[0]) / (ordered[-1] - ordered[0])
    below = np.arange(1, len(unit))
    sums = np.cumsum(unit)
    means = sums[:-1] / below, (sums[-1] - sums[:-1]) / below[::-1]
    between = below * below[::-1] * (means[1] - means[0]) ** 2
    # A cut lies between different values only.
    between[ordered[1:] == ordered[:-1]] = -1.0
    return float(ordered[int(between.argmax())])
