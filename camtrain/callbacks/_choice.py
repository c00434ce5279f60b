"""Which cases and labels a panel shows: chosen in the first pass over a split, the same ever after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

KINDS = ("positive", "hard", "negative")


class Choice:
    """Chooses pairs of case and label while a split goes by, case by case.

    * positive: in the order of the split, a case joins when it shows a label that has not its share of the cases yet;
      where that leaves fewer cases than wanted, the first others with a present label fill up. Each shows as many of
      its present labels as it may, those first that few cases have shown. Where labels are more than cases, one that
      shows new labels takes the place of one whose labels others show too;
    * hard: the pairs with the largest |truth - probability|, one per case, of equals the first by name: the order of
      the split does not matter. One of these may be a pair of a positive case: then that one is called hard;
    * negative: the case with the fewest present labels (none, where there is such a case), with the absent label that
      the network thinks most likely.

    A quarter of the cases are hard ones, and from four cases on one is the negative. Where these are positive cases
    too, more positive ones fill up. Until the pass is over all of this is as far as it was seen: a case is never added
    later that had to be left out when it came by.

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
        self.cases, self.hard_cases = cases, cases // 4
        self.negatives = int(cases >= 4)
        self.positives = cases - self.hard_cases - self.negatives
        self.labels_per_case, self.always = labels_per_case, frozenset(always)
        self._fixed: dict[str, dict[int, str]] | None = None
        self._seen: set[str] = set()
        self._met: Counter[int] = Counter()  # how often a label was present
        self._positive: dict[str, list[int]] = {}
        self._spare: dict[str, list[int]] = {}
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
        return self._with(self._filling()) if self._fixed is None else self._fixed

    @property
    def candidates(self) -> dict[str, dict[int, str]]:
        """The same with every case that may yet be needed to fill up: what a pass must keep of those it has seen."""
        return self._with(self._spare) if self._fixed is None else self._fixed

    def _with(self, spare: Mapping[str, Sequence[int]]) -> dict[str, dict[int, str]]:
        pairs = {case: dict(kinds) for case, kinds in self._always.items()}
        for case, indexes in {**self._positive, **spare}.items():
            pairs.setdefault(case, {}).update(dict.fromkeys(indexes, "positive"))
        for case, (_, index) in sorted(self._hard.items(), key=lambda item: (item[1][0], item[0])):
            pairs.setdefault(case, {})[index] = "hard"
        if self._negative is not None:
            _, case, index = self._negative
            pairs.setdefault(case, {}).setdefault(index, "negative")
        return pairs

    def _filling(self) -> dict[str, list[int]]:
        """The spare cases, the first ones first, until there are as many cases as wanted."""
        chosen = {*self._positive, *self._hard, *([] if self._negative is None else [self._negative[1]])}
        filling: dict[str, list[int]] = {}
        for case, indexes in self._spare.items():
            chosen.add(case)
            if len(chosen) > self.cases:
                break
            filling[case] = indexes
        return filling

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
        if not present or not self.positives:
            return
        self._met.update(present)
        shown = Counter(index for chosen in self._positive.values() for index in chosen)
        if min(shown[index] for index in present) >= share:
            shown.update(index for chosen in self._spare.values() for index in chosen)
            self._spare[case] = self._fairest(present, shown)
        elif len(self._positive) < self.positives:
            self._positive[case] = self._fairest(present, shown)
        else:
            self._swap(case, self._fairest(present, shown), shown)
        for late in list(self._spare)[max(0, self.cases - len(self._positive)) :]:
            del self._spare[late]

    def _fairest(self, present: Sequence[int], shown: Mapping[int, int]) -> list[int]:
        """As many labels as a case may show: those that few have shown first, of equals the rarest."""
        return sorted(present, key=lambda i: (shown[i], self._met[i], i))[: self.labels_per_case]

    def _swap(self, case: str, indexes: list[int], shown: Mapping[int, int]) -> None:
        """Into the place of a case without which fewer labels would be missed than this one adds; else a spare one."""
        gain = sum(not shown[index] for index in indexes)
        losses = {
            name: sum(shown[index] == 1 for index in chosen if index not in indexes)
            for name, chosen in self._positive.items()
        }
        out = min(losses, key=lambda name: losses[name])
        if losses[out] < gain:
            self._spare[out] = self._positive[out]
            self._positive = {case if n == out else n: indexes if n == out else c for n, c in self._positive.items()}
        else:
            self._spare[case] = indexes

    def _see_hard(self, case: str, truth: Sequence[float], probability: Sequence[float]) -> None:
        errors = [
            (-abs(t - p), index)
            for index, (t, p) in enumerate(zip(truth, probability, strict=True))
            if t == t and p == p
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
