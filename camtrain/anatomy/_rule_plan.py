"""Which rules and organs a table has to look for in a segmentation, found out once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from camtrain.anatomy.rules import Rule


@dataclass(frozen=True)
class RulePlan:
    """The rules of labels, each distinct one once.

    Attributes:
        rules: R of them.
        columns: For each label the place of its rule; R = no organ is left to it.
        names: N organs that rules which are plain lists unite.
        member: (R, N) bool: which rule unites which of them.
    """

    rules: list[Rule]
    columns: Sequence[int]
    names: list[str]
    member: Tensor

    @classmethod
    def of(cls, wanted: Sequence[Rule | None]) -> RulePlan:
        """The plan of one rule per label, None = no organ is left."""
        places = {rule: place for place, rule in enumerate(dict.fromkeys(r for r in wanted if r is not None))}
        rules, columns = list(places), [len(places) if rule is None else places[rule] for rule in wanted]
        names = list(dict.fromkeys(n for rule in rules if not rule.shaped for n in rule.organs))
        unites = [[not rule.shaped and n in rule.organs for n in names] for rule in rules]
        member = torch.tensor(unites, device="cpu")
        same = columns == list(range(len(rules)))
        return cls(rules, range(len(rules)) if same else columns, names, member)
