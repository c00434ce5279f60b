"""Which cases and labels a panel shows: chosen in the first pass over a split, the same ever after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

KINDS = ("positive", "hard", "negative")


class Choice:
    """Chooses pairs of case and label while a split goes by, case by case.

    * positive: greedily in the order of the split, a case joins when it shows a label that has not its share yet;
    * hard: of all other pairs those with the largest |truth - probability|, one per case, of equals the first by name:
      the order of the split does not matter;
    * negative: the case with the fewest present labels (none, where there is such a case), with the absent label that
      the network thinks most likely.

    A quarter of the cases are hard ones, and from four cases on one is the negative. Until the pass is over the hard
    ones and the negative are those so far.

    Args:
        cases: Cases at most, besides those in `always`.
        labels_per_case: Labels of a positive case at most.
        always: Cases that are shown whatever the others are.

    Example:
        >>> choice = Choice(cases=4, labels_per_case=1)
        >>> choice.see("a", [1.0, 0.0], [0.9, 0.2])
        >>> choice.see("b", [0.0, 0.0], [0.1, 0.7])
        >>> choice.see("c", [0.0, 1.0], [0.1, 0.6])
        >>> choice.pairs
        {'a': {0: 'positive'}, 'c': {1: 'positive'}, 'b': {1: 'hard'}}
    """

    def __init__(self, cases: int, labels_per_case: int, always: Collection[str] = ()) -> None:
        self.hard_cases = cases // 4
        self.negatives = int(cases >= 4)
        self.positives = cases - self.hard_cases - self.negatives
        self.labels_per_case, self.always = labels_per_case, frozenset(always)
        self._fixed: dict[str, dict[int, str]] | None = None
        self._seen: set[str] = set()
        self._positive: dict[str, list[int]] = {}
        self._always: dict[str, dict[int, str]] = {}
        self._hard: dict[str, tuple[float, int]] = {}
        self._negative: tuple[int, str, int] | None = None

    @property
    def fixed(self) -> bool:
        """Is the choice made?"""
        return self._fixed is not None

    @property
    def pairs(self) -> dict[str, dict[int, str]]:
        """Case -> label index -> kind: positives, then hard ones, the hardest first, then the negative."""
        if self._fixed is not None:
            return self._fixed
        pairs = {case: dict(kinds) for case, kinds in self._always.items()}
        for case, indexes in self._positive.items():
            pairs.setdefault(case, {}).update(dict.fromkeys(indexes, "positive"))
        for case, (_, index) in sorted(self._hard.items(), key=lambda item: (item[1][0], item[0])):
            pairs.setdefault(case, {}).setdefault(index, "hard")
        if self._negative is not None:
            _, case, index = self._negative
            pairs.setdefault(case, {}).setdefault(index, "negative")
        return pairs

    def see(self, case: str, truth: Sequence[float], probability: Sequence[float], segmented: bool = True) -> None:
        """One case of the first pass; patches of one scan share its name, and the first one stands for it.

        Args:
            case: Its name.
            truth: 0, 1 or NaN = unknown, per label.
            probability: Of each label.
            segmented: Is there anything to compare its maps with? Others are not chosen.
        """
        if self.fixed or case in self._seen:
            return
        self._seen.add(case)
        present = [index for index, value in enumerate(truth) if value == 1]
        absent = sorted((i for i, value in enumerate(truth) if value == 0), key=lambda i: (-_known(probability[i]), i))
        if case in self.always:
            kinds = dict.fromkeys(present[: self.labels_per_case], "positive")
            self._always[case] = kinds or dict.fromkeys(absent[:1], "negative")
        elif segmented:
            self._see_positive(case, present, max(1, self.positives // max(1, len(truth))))
            self._see_hard(case, truth, probability)
            self._see_negative(case, len(present), absent)

    def _see_positive(self, case: str, present: Sequence[int], share: int) -> None:
        shown = Counter(index for chosen in self._positive.values() for index in chosen)
        fresh = sorted((i for i in present if shown[i] < share), key=lambda i: shown[i])
        if fresh and len(self._positive) < self.positives:
            self._positive[case] = fresh[: self.labels_per_case]

    def _see_hard(self, case: str, truth: Sequence[float], probability: Sequence[float]) -> None:
        taken = self._positive.get(case, ())
        errors = [
            (-abs(t - p), index)
            for index, (t, p) in enumerate(zip(truth, probability, strict=True))
            if index not in taken and t == t and p == p
        ]
        if errors and self.hard_cases:
            self._hard[case] = min(errors)
            if len(self._hard) > self.hard_cases:
                del self._hard[max(self._hard, key=lambda name: (self._hard[name][0], name))]

    def _see_negative(self, case: str, present: int, absent: Sequence[int]) -> None:
        if self.negatives and absent and (self._negative is None or present < self._negative[0]):
            self._negative = (present, case, absent[0])

    def fix(self) -> None:
        """The first pass is over: nothing changes any more, unless nothing was seen."""
        if not self.fixed and (pairs := self.pairs):
            self._fixed = pairs

    def state(self) -> list[Any]:
        """What a checkpoint keeps: plain lists."""
        return [[case, list(kinds), list(kinds.values())] for case, kinds in (self._fixed or {}).items()]

    def load(self, state: Iterable[Sequence[Any]]) -> None:
        """Take the choice of an earlier run."""
        pairs = {}
        for case, indexes, *kinds in state:
            names = kinds[0] if kinds else ["positive"] * len(indexes)
            pairs[str(case)] = {int(index): str(kind) for index, kind in zip(indexes, names, strict=True)}
        self._fixed = pairs or None


def _known(probability: float) -> float:
    return probability if probability == probability else -1.0
