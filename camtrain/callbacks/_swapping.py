"""One batch of composites: what is kept of each case, what another case lends, and which truths are still known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from camtrain.anatomy.organ_table import OrganTable, Spacing
from camtrain.anatomy.replacing import replace_outside
from camtrain.anatomy.rules import Rule

Keep = Literal["label", "organs", "union"]
Targets = Literal["kept", "follow"]
AT_ONCE = 2**28  # bytes of regions held at a time; above that each is made again when it is asked for

Regions = Callable[[int], Tensor]
"""Number of a rule -> (B, 1, *S) bool, its region in every case at full resolution."""


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


@dataclass(frozen=True)
class Plan:
    """Who lends to whom, and what is kept.

    Attributes:
        donor: (B,) row of the case that lends; a case's own row where nothing is swapped.
        kept: (B, R) bool, the rules whose regions stay; no rule where nothing is swapped.
    """

    donor: Tensor
    kept: Tensor

    @property
    def swapped(self) -> Tensor:
        """(B,) bool."""
        return self.kept.any(dim=1)


@dataclass(frozen=True)
class Composite:
    """A batch after the swap.

    Attributes:
        cases: Images, organs and truths.
        left_out: (B, L) bool, truths that are not known of a composite.
        swapped: (B,) bool, which cases are composites.
    """

    cases: Cases
    left_out: Tensor
    swapped: Tensor


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

    def regions(self, cases: Cases, spacing: Spacing | None) -> Regions:
        """Regions of all rules in the cases, kept in memory as long as they are small."""

        def make(rule: int) -> Tensor:
            region = self._tables[rule].allowed(cases.organs, size=None, spacing=spacing)
            return region & cases.has_organs.view(-1, *[1] * (region.ndim - 1))

        if len(self.rules) * cases.organs.numel() > AT_ONCE:
            return make
        made = [make(rule) for rule in range(len(self.rules))]
        return made.__getitem__

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


def make_plan(
    rules: Rules, regions: Regions, label: Tensor, lenders: int, p: float, keep: Keep, rng: torch.Generator
) -> Plan:
    """Draw who is swapped, who lends, and what is kept.

    A rule can be kept where its region is neither empty nor the whole image, and a label that it belongs to is known.
    The donor is any other case, whatever its truths: a donor chosen by the opposite truth would teach the shortcut's
    opposite.

    Args:
        rules: Of the table.
        regions: Of the cases.
        label: (B, L), NaN = unknown.
        lenders: Cases in all: the B cases of the batch first, then others that only lend.
        p: Probability that a case is swapped.
        keep: `"label"` one random label's region, `"organs"` a random half of the groups of organs that labels need
            together, `"union"` all regions.
        rng: Source of all draws, on the CPU.

    Returns:
        The plan, on the CPU.
    """
    count, number = len(label), len(rules.rules)
    drawn = torch.rand(count, generator=rng) < p
    shift = torch.randint(1, max(2, lenders), (count,), generator=rng)
    own = torch.arange(count)
    can = _can_be_kept(rules, regions, label) & drawn[:, None] & (lenders > 1)
    draws = torch.rand(count, max(1, len(rules.of_label)), generator=rng)
    if keep == "label":
        kept = _of_one_label(rules, can, label.cpu(), draws)
    elif keep == "organs":
        heads = draws[:, :1] if number == 0 else torch.stack([draws[:, g] for g in rules.groups], dim=1)
        kept = can & (heads < 0.5) if number else can
    else:
        kept = can
    return Plan(torch.where(kept.any(dim=1), (own + shift) % max(1, lenders), own), kept)


def _can_be_kept(rules: Rules, regions: Regions, label: Tensor) -> Tensor:
    can = torch.zeros(len(label), len(rules.rules), dtype=torch.bool)
    for rule in range(len(rules.rules)):
        region = regions(rule)[: len(label)].flatten(1)
        can[:, rule] = (region.any(dim=1) & ~region.all(dim=1)).cpu()
    known = ~label.isnan().cpu()
    return can & (known.float() @ rules.of_label.float() > 0)


def _of_one_label(rules: Rules, can: Tensor, label: Tensor, draws: Tensor) -> Tensor:
    """(B, R): the rule of one random label among those that are known and can be kept."""
    fits = (can.float() @ rules.of_label.float().T > 0) & ~label.isnan()
    chosen = torch.where(fits, draws, -1.0).argmax(dim=1)
    return rules.of_label[chosen] & fits.any(dim=1, keepdim=True)


def compose(
    rules: Rules,
    regions: Regions,
    cases: Cases,
    plan: Plan,
    targets: Targets,
    seam: int,
    cover: bool,
) -> Composite:
    """Images, organs and truths after the swap.

    A label takes the truth of the case that its region came from whole. With `targets="kept"` only labels whose region
    was kept are known; with `"follow"` also those whose whole region the donor shows. All others are left out: regions
    that are mixed, missing, or without organs, and labels of the rule `anywhere`.

    Args:
        rules: Of the table.
        regions: Of all cases that can lend.
        cases: All cases that can lend; the first B are the batch.
        plan: For the B cases of the batch.
        targets: See above.
        seam: Voxels over which the donor fades in (`camtrain.anatomy.replacing`).
        cover: Keep also what lies where the donor has the kept organs, so that nothing of those shows.

    Returns:
        The B composites; cases that are not swapped are as they were, to the last bit.
    """
    device, count = cases.image.device, len(plan.donor)
    donor, kept = plan.donor.to(device), plan.kept.to(device)
    own = cases.rows(torch.arange(count, device=device))
    lent = cases.rows(donor)
    stay = _where_kept(regions, kept, donor, cover)
    swapped = kept.any(dim=1).view(-1, *[1] * (own.image.ndim - 1))
    image = torch.where(swapped, replace_outside(own.image, lent.image, stay, seam), own.image)
    organs = torch.where(stay | ~swapped, own.organs, _without_kept(rules, lent.organs, kept))
    follows = _shown_whole(regions, stay, donor, kept) if targets == "follow" else torch.zeros_like(kept)
    of_label = rules.of_label.to(device).float()
    ours, theirs = kept.float() @ of_label.T > 0, follows.float() @ of_label.T > 0
    changed = swapped.flatten(1)
    label = torch.where(changed & theirs & ~ours, lent.label, own.label)
    return Composite(Cases(image, organs, label, own.has_organs), changed & ~ours & ~theirs, changed[:, 0])


def _where_kept(regions: Regions, kept: Tensor, donor: Tensor, cover: bool) -> Tensor:
    """(B, 1, *S) bool: voxels that stay."""
    stay = None
    for rule in range(kept.shape[1]):
        region = regions(rule)
        mine = region[: len(donor)] | region[donor] if cover else region[: len(donor)]
        part = mine & kept[:, rule].view(-1, *[1] * (mine.ndim - 1))
        stay = part if stay is None else stay | part
    if stay is None:
        raise AssertionError("a plan without rules swaps nothing")
    return stay


def _without_kept(rules: Rules, organs: Tensor, kept: Tensor) -> Tensor:
    """The donor's organs, less those of the kept rules: what shows of them belongs to no label of the composite."""
    for rule in range(kept.shape[1]):
        ids = torch.tensor(rules.ids(rule), device=organs.device)
        gone = torch.isin(organs, ids) & kept[:, rule].view(-1, *[1] * (organs.ndim - 1))
        organs = organs.masked_fill(gone, 0)
    return organs


def _shown_whole(regions: Regions, stay: Tensor, donor: Tensor, kept: Tensor) -> Tensor:
    """(B, R) bool: rules whose region the donor has and shows to the last voxel."""
    shown = torch.zeros_like(kept)
    for rule in range(kept.shape[1]):
        theirs = regions(rule)[donor]
        shown[:, rule] = theirs.flatten(1).any(dim=1) & ~(theirs & stay).flatten(1).any(dim=1) & ~kept[:, rule]
    return shown
