"""Which (case, label) pairs an evaluation looks at: the present ones, the missed ones, the false alarms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor

from camtrain._errors import InputError, nearest

CaseFilter = Literal["all", "positives", "correct", "fn", "fp"]

_PAIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "all": lambda truth, predicted: ~truth.isnan(),
    "positives": lambda truth, predicted: truth == 1,
    "correct": lambda truth, predicted: (truth == 1) & predicted,
    "fn": lambda truth, predicted: (truth == 1) & ~predicted,
    "fp": lambda truth, predicted: (truth == 0) & predicted,
}


def check_filter(cases: str) -> CaseFilter:
    """`cases` if it is a known word.

    Raises:
        InputError: It is not.
    """
    known = get_args(CaseFilter)
    for word in known:
        if word == cases:
            found: CaseFilter = word
            return found
    raise InputError(f"cases= expects one of {len(known)} words, got {cases!r}{nearest(str(cases), known)}")


def chosen_pairs(truth: Tensor, probability: Tensor, cases: CaseFilter = "positives", cut: float = 0.5) -> Tensor:
    """The pairs to look at; unknown labels are never among them.

    Args:
        truth: (B, L) 0, 1, NaN = unknown.
        probability: (B, L).
        cases: `positives` the label is present | `correct` present and predicted | `fn` present and missed | `fp`
            absent and predicted | `all` every known label.
        cut: Predicted means probability >= cut.

    Returns:
        (B, L) bool.

    Example:
        >>> import torch
        >>> truth, probability = torch.tensor([[1.0, 1.0, 0.0, torch.nan]]), torch.tensor([[0.9, 0.1, 0.8, 0.9]])
        >>> [chosen_pairs(truth, probability, word)[0].tolist() for word in ("correct", "fn", "fp")]
        [[True, False, False, False], [False, True, False, False], [False, False, True, False]]
    """
    return _PAIRS[check_filter(cases)](truth, probability >= cut)
