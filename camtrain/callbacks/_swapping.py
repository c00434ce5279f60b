"""One batch of composites: what is kept of each case, what another case lends, and which truths are still known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from camtrain.anatomy.replacing import replace_outside
from camtrain.callbacks._regions import Cases, Keep, Regions, Rules

Targets = Literal["kept", "follow"]


@dataclass(frozen=True)
class Plan:
    """What each composite is made of. A unit is a set of rules whose regions come from one case together.

    Attributes:
        units: (U, R) bool, the rules of each unit.
        source: (B, U) row of the case that a unit is taken from, -1 = not taken.
        ground: (B,) row of the case that shows everywhere else; a case's own row where nothing is swapped, and where a
            case without organs takes a unit of another.
        order: (U,) units in the order in which they are laid on the ground.
        last: (B,) the unit that is laid last, and so is whole; -1 = nothing is swapped.
    """

    units: Tensor
    source: Tensor
    ground: Tensor
    order: Tensor
    last: Tensor

    @property
    def swapped(self) -> Tensor:
        """(B,) bool."""
        return self.last >= 0


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


def make_plan(
    rules: Rules,
    regions: Regions,
    label: Tensor,
    lenders: int,
    p: float,
    keep: Keep,
    rng: torch.Generator,
    complete: bool = False,
    lend: Cases | None = None,
) -> Plan:
    """Draw who is swapped, and which case each part of a composite comes from.

    A unit of a case can be kept where its region is neither empty nor the whole image, and a label that it belongs to
    is known. What comes from elsewhere comes from any other case, whatever its truths: a donor chosen by the opposite
    truth would teach the shortcut's opposite.

    Args:
        rules: Of the table.
        regions: Of the cases.
        label: (B, L), NaN = unknown.
        lenders: Cases in all: the B cases of the batch first, then others that only lend.
        p: Probability that a case is swapped.
        keep: `"label"`: the region of one random label stays. `"organs"`: likewise, with its group, and every other
            group of organs that labels need together comes from a case of its own. `"union"`: all regions stay.
        rng: Source of all draws, on the CPU.
        complete: Keep a unit only where all of its rules have a region.
        lend: All cases that can lend: then those without organs are drawn, too, and show one unit of a case that has
            some, whatever its truths. None: cases without organs stay as they are.

    Returns:
        The plan, on the CPU.
    """
    count = len(label)
    units = rules.units(keep)
    drawn = torch.rand(count, generator=rng, dtype=torch.float32) < p
    draws = torch.rand(count, max(1, len(rules.of_label)), generator=rng, dtype=torch.float32)
    order = torch.randperm(len(units), generator=rng)
    own = torch.arange(count)
    others = _others(own, lenders, 1 + len(units), rng)
    can = _can_be_kept(units, regions.may(), complete)
    mine = can[:count] & drawn[:, None] & (lenders > 1)
    last = _of_one_label(units, regions, mine, label.cpu(), rules.of_label, draws, complete)
    source = others[:, 1:] if keep == "organs" else torch.full_like(others[:, 1:], -1)
    kept = torch.arange(len(units)) == last[:, None]
    source = torch.where(kept, own[:, None], torch.where(last[:, None] >= 0, source, -1))
    plan = Plan(units, source, torch.where(last >= 0, others[:, 0], own), order, last)
    if lend is None or not len(units):
        return plan
    asks = drawn & ~lend.has_organs[:count].cpu()
    return _with_lent(plan, regions, can, lend.label.cpu(), rules.of_label, asks, complete, rng)


def _others(own: Tensor, lenders: int, number: int, rng: torch.Generator) -> Tensor:
    """(B, number) rows of other cases, different ones as far as there are so many."""
    if lenders < 2:
        return own[:, None].expand(-1, number)
    steps = torch.rand(len(own), lenders - 1, generator=rng, dtype=torch.float32).argsort(dim=1) + 1
    return (own[:, None] + steps[:, torch.arange(number) % (lenders - 1)]) % lenders


def _can_be_kept(units: Tensor, may: Tensor, complete: bool) -> Tensor:
    """(N, U) bool, as far as the organs that are there say it; `_empty_or_whole` looks at the regions themselves."""
    wanted = units.sum(dim=1) if complete else torch.ones(len(units))
    return may.float() @ units.float().T >= wanted


def _empty_or_whole(units: Tensor, regions: Regions, rows: Tensor, unit: Tensor, complete: bool) -> Tensor:
    """(n,) bool: a region that cannot be kept; `complete` asks for one of every rule of the unit. -1 is no unit."""
    bad = torch.zeros(len(rows), dtype=torch.bool)
    for number in sorted(set(unit[unit >= 0].tolist())):
        here = unit == number
        region = regions.of_unit(units[number], rows[here]).flatten(1)
        bad[here] = (~region.any(dim=1) | region.all(dim=1)).cpu()
        for rule in units[number].nonzero().flatten().tolist() if complete else ():
            bad[here] |= ~regions.of(rule, rows[here]).flatten(1).any(dim=1).cpu()
    return bad


def _of_one_label(
    units: Tensor, regions: Regions, can: Tensor, label: Tensor, of_label: Tensor, draws: Tensor, complete: bool
) -> Tensor:
    """(B,): the unit of one random label among those that are known and can be kept; -1 = there is none."""
    can, of_unit = can.clone(), of_label.float() @ units.float().T > 0
    while True:
        fits = (can.float() @ of_unit.float().T > 0) & ~label.isnan()
        chosen = torch.where(fits, draws, -1.0).argmax(dim=1)
        unit = of_unit.int().argmax(dim=1)[chosen] if len(units) else chosen
        last = torch.where(fits.any(dim=1), unit, -1)
        bad = _empty_or_whole(units, regions, torch.arange(len(last)), last, complete)
        if not bool(bad.any()):
            return last
        can[bad, last[bad]] = False


def _with_lent(
    plan: Plan,
    regions: Regions,
    can: Tensor,
    label: Tensor,
    of_label: Tensor,
    asks: Tensor,
    complete: bool,
    rng: torch.Generator,
) -> Plan:
    """The plan, where cases that ask show, on themselves, the unit of one random label of one random lender."""
    can, of_unit = can.clone(), of_label.float() @ plan.units.float().T > 0
    labels, rows = (torch.rand(len(asks), n, generator=rng, dtype=torch.float32) for n in reversed(label.shape))
    while bool((lends := (can.float() @ of_unit.float().T > 0) & ~label.isnan()).any()):
        chosen = torch.where(lends.any(dim=0), labels, -1.0).argmax(dim=1)
        row = torch.where(lends.T[chosen], rows, -1.0).argmax(dim=1)
        unit = of_unit.int().argmax(dim=1)[chosen]
        bad = _empty_or_whole(plan.units, regions, row, torch.where(asks, unit, -1), complete)
        if not bool(bad.any()):
            here = (torch.arange(len(plan.units)) == unit[:, None]) & asks[:, None]
            # The ground of a case of which nothing was kept is the case itself.
            source, last = torch.where(here, row[:, None], plan.source), torch.where(asks, unit, plan.last)
            return Plan(plan.units, source, plan.ground, plan.order, last)
        can[row[bad], unit[bad]] = False
    return plan


def compose(
    rules: Rules, regions: Regions, cases: Cases, plan: Plan, targets: Targets, seam: int, cover: bool = True
) -> Composite:
    """Images, organs and truths after the swap.

    A label takes the truth of the case that its region came from, if the composite shows it whole. With
    `targets="kept"` that is asked of what was laid on the ground; with `"follow"` also of the ground itself. All other
    labels are left out: regions that are mixed, hidden in part, missing, or without organs, and the rule `anywhere`.

    Args:
        rules: Of the table.
        regions: Of all cases that can lend.
        cases: All cases that can lend; the first B are the batch.
        plan: For the B cases of the batch.
        targets: See above.
        seam: Voxels over which one case fades into another (`camtrain.anatomy.replacing`).
        cover: Take, with a unit, also what lies where the ground has the unit's organs, so that no organ shows twice.

    Returns:
        The B composites; cases that are not swapped are as they were, to the last bit.
    """
    ground = cases.rows(plan.ground.to(cases.image.device))
    canvas = _Canvas(
        ground.image, _without(rules, ground.organs, plan), torch.full_like(ground.organs, -1, dtype=torch.int16)
    )
    for unit in plan.order.tolist():
        _lay(canvas, regions, cases, plan, unit, plan.last != unit, seam, cover)
    for unit in range(len(plan.units)):
        _lay(canvas, regions, cases, plan, unit, plan.last == unit, seam, cover)
    origin = _origin(regions, canvas.owner, plan, targets)
    return _with_truths(rules, cases, plan, canvas, origin)


@dataclass(frozen=True)
class _Canvas:
    """What has been laid so far, in place; `owner` (B, 1, *S) is the unit that shows, -1 = the ground."""

    image: Tensor
    organs: Tensor
    owner: Tensor


def _lay(
    canvas: _Canvas, regions: Regions, cases: Cases, plan: Plan, unit: int, where: Tensor, seam: int, cover: bool
) -> None:
    """Lay one unit more, in the composites where it has its turn."""
    rows = (where & (plan.source[:, unit] >= 0)).nonzero().flatten().to(canvas.image.device)
    if not len(rows):
        return
    source, ground = plan.source[rows.cpu(), unit], plan.ground[rows.cpu()]
    region = taken = regions.of_unit(plan.units[unit], source)
    if cover:
        # Only where the ground itself still shows: what was laid before is not covered by an organ that is gone.
        taken = region | (regions.of_unit(plan.units[unit], ground) & (canvas.owner[rows] < 0))
    source = source.to(rows.device)
    canvas.image[rows] = replace_outside(cases.image[source], canvas.image[rows], taken, seam)
    canvas.organs[rows] = torch.where(region, cases.organs[source], canvas.organs[rows])
    canvas.owner[rows] = canvas.owner[rows].masked_fill(taken, unit)


def _without(rules: Rules, organs: Tensor, plan: Plan) -> Tensor:
    """The ground's organs, less those of the units laid on it: what still shows of them belongs to no label."""
    taken = (plan.source >= 0).to(organs.device)
    for unit, members in enumerate(plan.units):
        ids = torch.tensor([i for rule in members.nonzero().flatten().tolist() for i in rules.ids(rule)])
        gone = torch.isin(organs, ids.to(organs.device)) & taken[:, unit].view(-1, *[1] * (organs.ndim - 1))
        organs = organs.masked_fill(gone, 0)
    return organs


def _origin(regions: Regions, owner: Tensor, plan: Plan, targets: Targets) -> Tensor:
    """(B, R): row of the case whose whole region of a rule shows; -1 = of none."""
    device = owner.device
    origin = torch.full((len(owner), plan.units.shape[1]), -1, device=device)
    for rule, members in enumerate(plan.units.T):
        for unit in members.nonzero().flatten().tolist():
            laid = plan.source[:, unit] >= 0
            row = torch.where(laid, plan.source[:, unit], plan.ground if targets == "follow" else -1)
            shown = (row >= 0).nonzero().flatten()
            if not len(shown):
                continue
            theirs = regions.of(rule, row[shown]).flatten(1)
            here, by = shown.to(device), torch.where(laid[shown], unit, -1).to(device)
            hidden = theirs & (owner[here].flatten(1) != by[:, None])
            whole = theirs.any(dim=1) & ~hidden.any(dim=1)
            origin[here, rule] = torch.where(whole, row[shown].to(device), origin[here, rule])
    return origin


def _with_truths(rules: Rules, cases: Cases, plan: Plan, canvas: _Canvas, origin: Tensor) -> Composite:
    device, count = canvas.image.device, len(origin)
    swapped = plan.swapped.to(device)
    each = swapped.view(-1, *[1] * (canvas.image.ndim - 1))
    of_label = rules.of_label.to(device)
    # A label has one rule, or none: the row of its case, or -1.
    row = torch.where(of_label.any(dim=1), origin[:, of_label.int().argmax(dim=1)], -1)
    truth = cases.label.gather(0, row.clamp(min=0))
    own, shown = cases.label[:count], row >= 0
    label = torch.where(swapped[:, None] & shown, truth, own)
    image = torch.where(each, canvas.image, cases.image[:count])
    organs = torch.where(each, canvas.organs, cases.organs[:count])
    return Composite(Cases(image, organs, label, _shows_organs(cases, plan, count)), swapped[:, None] & ~shown, swapped)


def _shows_organs(cases: Cases, plan: Plan, count: int) -> Tensor:
    """(B,) bool: of a composite, was the case segmented whose unit was laid last?"""
    device = cases.image.device
    row = plan.source.gather(1, plan.last.clamp(min=0)[:, None])[:, 0] if len(plan.units) else plan.last
    return cases.has_organs[torch.where(plan.last >= 0, row, torch.arange(count)).to(device)]
