"""The regions of a table's rules in a batch, each made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from camtrain.anatomy.organ_table import OrganTable
from camtrain.anatomy.rules import Rule

Keep = Literal["label", "organs", "union"]
AT_ONCE = 2**28  # bytes of regions kept for a step; above that one is made again when it is asked for once more


@dataclass(frozen=True)
class Cases:
    """The cases of a batch as the swap needs them.

    Attributes:
        image: (B, C, *S).
        organs: (B, 1, *S) integer ids.
        label: (B, L) float, NaN = unknown.
        has_organs: (B,) bool.
    """

    image: Tensor
    organs: Tensor
    label: Tensor
    has_organs: Tensor

    def rows(self, index: Tensor) -> Cases:
        """Some of the cases, in this order."""
        return Cases(self.image[index], self.organs[index], self.label[index], self.has_organs[index])


class Rules:
    """The distinct rules of a table's labels, without `anywhere`.

    Args:
        table: Of the L labels, in the order of the outputs.

    Attributes:
        rules: The R rules.
        of_label: (L, R) bool.
        groups: For each rule the number of its group: rules that share an organ come from one case together.
    """

    def __init__(self, table: OrganTable) -> None:
        each = list(table.rules.values())
        self.rules: list[Rule] = list(dict.fromkeys(rule for rule in each if not rule.anywhere))
        self.of_label = torch.tensor([[rule == other for other in self.rules] for rule in each]).reshape(len(each), -1)
        self.groups = _groups(self.rules)
        self._tables = [table.select([table.labels[each.index(rule)]]) for rule in self.rules]
        self._organs = table.organs

    def regions(self, cases: Cases, spacing: Tensor | None = None) -> Regions:
        """Regions of all rules in the cases."""
        return Regions(self, cases, spacing)

    def allowed(self, rule: int, organs: Tensor, spacing: Tensor | None) -> Tensor:
        """(B, 1, *S) bool, the region of one rule in the organs (B, 1, *S) at full resolution."""
        return self._tables[rule].allowed(organs, size=None, spacing=spacing)

    def units(self, keep: Keep) -> Tensor:
        """(U, R) bool: rules whose regions come from one case together."""
        number = len(self.rules)
        if keep == "label":
            return torch.eye(number, dtype=torch.bool)
        if keep == "union":
            return torch.ones(min(1, number), number, dtype=torch.bool)
        groups = list(dict.fromkeys(self.groups))
        return torch.tensor([[of == group for of in self.groups] for group in groups]).reshape(-1, number)

    def ids(self, rule: int) -> list[int]:
        """Ids of the organs of a rule."""
        return [i for name in self.rules[rule].organs for i in self._organs[name]]


def _groups(rules: list[Rule]) -> list[int]:
    groups = list(range(len(rules)))
    for second, rule in enumerate(rules):
        for first in range(second):
            if set(rule.organs) & set(rules[first].organs):
                joined, left = groups[first], groups[second]
                groups = [joined if group == left else group for group in groups]
    return groups


class Regions:
    """Where each rule allows to look, in the cases of a step: (B, 1, *S) bool at full resolution.

    A table may have thirty rules with hulls and closings, of which a step lays a few: nothing is made before it is
    needed, and only of the cases that need it.

    Args:
        rules: Of the table.
        cases: N cases.
        spacing: (N, axes) mm, for rules with lengths.
    """

    def __init__(self, rules: Rules, cases: Cases, spacing: Tensor | None = None) -> None:
        self._rules, self._cases, self._spacing = rules, cases, spacing
        self._usual: Callable[[int], Tensor] | None = None
        self._made: dict[tuple[int, int], Tensor] = {}
        self._keeps = AT_ONCE // max(1, cases.organs[0].numel())

    def __len__(self) -> int:
        return len(self._cases.image)

    def complete_with(self, usual: Callable[[int], Tensor]) -> None:
        """Give cases without organs the region (1, *S) of a rule that this callable knows."""
        self._usual = usual
        has = self._cases.has_organs.tolist()
        self._made = {key: region for key, region in self._made.items() if has[key[1]]}

    def may(self) -> Tensor:
        """(N, R) bool on the CPU: does a case have an organ of the rule? Where not, its region is empty."""
        ids = [self._rules.ids(rule) for rule in range(len(self._rules.rules))]
        top = max((i for each in ids for i in each), default=0)
        has = torch.zeros(len(self), len(ids), dtype=torch.bool)
        for row, organs in enumerate(self._cases.organs):
            # Ids beyond the table's share one bin: some volumes number their organs in millions.
            counts = torch.bincount(organs.flatten().clamp(0, top + 1).long(), minlength=top + 2).cpu()
            has[row] = torch.tensor([bool(counts[each].any()) for each in ids])
        segmented = self._cases.has_organs.cpu()[:, None]
        return (has & segmented) | (~segmented if self._usual is not None else False)

    def of(self, rule: int, rows: Tensor) -> Tensor:
        """(n, 1, *S) bool, the region of a rule in some cases."""
        asked = rows.tolist()
        missing = [row for row in dict.fromkeys(asked) if (rule, row) not in self._made]
        made = {row: self._made[rule, row] for row in asked if row not in missing}
        made |= dict(zip(missing, self._make(rule, missing), strict=True)) if missing else {}
        if len(self._made) + len(missing) <= self._keeps:
            self._made |= {(rule, row): made[row] for row in missing}
        return torch.stack([made[row] for row in asked])

    def of_unit(self, members: Tensor, rows: Tensor) -> Tensor:
        """(n, 1, *S) bool, the region of rules that come from one case together; members is (R,) bool."""
        first, *others = members.nonzero().flatten().tolist()
        region = self.of(first, rows)
        for rule in others:
            region = region | self.of(rule, rows)
        return region

    def _make(self, rule: int, rows: list[int]) -> Tensor:
        index = torch.tensor(rows, device=self._cases.organs.device)
        spacing = None if self._spacing is None else self._spacing[index.to(self._spacing.device)]
        region = self._rules.allowed(rule, self._cases.organs[index], spacing)
        has = self._cases.has_organs[index].view(-1, *[1] * (region.ndim - 1))
        if self._usual is None:
            return region & has
        return torch.where(has, region, self._usual(rule).to(region.device))
