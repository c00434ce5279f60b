"""Which cases, findings and choices a reader study asks about: plain functions, nothing of models or pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from camtrain._errors import InputError
from camtrain.evaluation.resampling import Floats


@dataclass(frozen=True, eq=False)
class Candidate:
    """A case that may be shown.

    Attributes:
        id: Its name.
        unit: Its patient, or the case.
        truth: (L,) 0, 1, NaN = unknown.
        probabilities: (models, L).
    """

    id: str
    unit: str
    truth: Floats
    probabilities: Floats


@dataclass(frozen=True)
class Asked:
    """A case and one of its findings.

    Attributes:
        case: Which candidate.
        column: Which label.
    """

    case: Candidate
    column: int


def choose_pairs(
    candidates: Sequence[Candidate], columns: Sequence[int], cases: int, rng: np.random.Generator, per_case: int = 2
) -> list[Asked]:
    """Cases and findings to tell apart: cases with at least two present findings first, rare findings first.

    Args:
        candidates: All cases, ids different.
        columns: Labels that may be asked about.
        cases: How many cases at most.
        rng: Order among equals.
        per_case: Findings asked about in a case at most.

    Returns:
        Pairs, in the order of the choice.

    Example:
        >>> truths = {"a": [1.0, 0.0, 0.0], "b": [1.0, 1.0, 0.0]}
        >>> cases = [Candidate(n, n, np.array(truth), np.zeros((1, 3))) for n, truth in truths.items()]
        >>> [pair.case.id for pair in choose_pairs(cases, [0, 1, 2], 1, np.random.default_rng(0))]
        ['b', 'b']
    """
    order = [candidates[i] for i in rng.permutation(len(candidates))]
    present = {case.id: [c for c in columns if case.truth[c] == 1] for case in order}
    usable = [case for case in order if present[case.id] and len(_known(case, columns)) >= 2]
    usable.sort(key=lambda case: -min(2, len(present[case.id])))  # stable: the random order stays among equals
    asked: list[Asked] = []
    count = dict.fromkeys(columns, 0)
    for case in usable[:cases]:
        shuffled = [int(c) for c in rng.permutation(present[case.id])]
        for column in sorted(shuffled, key=count.__getitem__)[:per_case]:
            count[column] += 1
            asked.append(Asked(case, column))
    return asked


def choose_agreed(
    candidates: Sequence[Candidate], columns: Sequence[int], cases: int, rng: np.random.Generator, cut: float = 0.5
) -> list[Asked]:
    """Cases and findings that every model rightly finds, one per case, rare findings first.

    As in the Grad-CAM paper's trust study: where predictions are the same and right, only the map can tell.

    Args:
        candidates: All cases, ids different.
        columns: Labels that may be asked about.
        cases: How many cases at most.
        rng: Order among equals.
        cut: Found means probability >= cut.

    Example:
        >>> case = Candidate("a", "a", np.array([1.0, 1.0]), np.array([[0.9, 0.2], [0.8, 0.9]]))
        >>> [pair.column for pair in choose_agreed([case], [0, 1], 5, np.random.default_rng(0))]
        [0]
    """
    asked: list[Asked] = []
    count = dict.fromkeys(columns, 0)
    for i in rng.permutation(len(candidates)):
        case = candidates[i]
        found = [c for c in columns if case.truth[c] == 1 and bool((case.probabilities[:, c] >= cut).all())]
        if found and len(asked) < cases:
            column = min((int(c) for c in rng.permutation(found)), key=count.__getitem__)
            count[column] += 1
            asked.append(Asked(case, column))
    return asked


def choose_answers(pair: Asked, columns: Sequence[int], choices: int, rng: np.random.Generator) -> list[int]:
    """Columns to choose among: the finding, the other present ones, then absent ones, in random order.

    Args:
        pair: What is asked.
        columns: Labels that may be offered.
        choices: How many, at least 2; fewer where fewer are known.
        rng: Which absent ones, and the order.

    Raises:
        InputError: Fewer than 2 choices.

    Example:
        >>> case = Candidate("a", "a", np.array([1.0, 1.0, 0.0, np.nan]), np.zeros((1, 4)))
        >>> sorted(choose_answers(Asked(case, 1), [0, 1, 2, 3], 4, np.random.default_rng(0)))
        [0, 1, 2]
    """
    if choices < 2:
        raise InputError(f"--choices expects at least 2, got {choices}")
    others = [int(c) for c in rng.permutation(_known(pair.case, columns)) if c != pair.column]
    others.sort(key=lambda c: -pair.case.truth[c])
    offered = [pair.column, *others[: choices - 1]]
    return [offered[i] for i in rng.permutation(len(offered))]


def _known(case: Candidate, columns: Sequence[int]) -> list[int]:
    """An unknown finding is no choice: nobody could say whether it is wrong."""
    return [c for c in columns if not np.isnan(case.truth[c])]
