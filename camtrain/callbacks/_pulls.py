"""How far a label's logit follows what is put in place of a part of the image: two forwards of each fixed case."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from camtrain._errors import InputError
from camtrain.anatomy import OrganTable, spacing_of
from camtrain.anatomy.baselines import make_baseline
from camtrain.anatomy.donors import Donor
from camtrain.anatomy.replacing import grow, replace_inside, replace_outside
from camtrain.anatomy.rules import Rule
from camtrain.anatomy.sides import CASE
from camtrain.callbacks._fixed_cases import FixedCase, FixedCases
from camtrain.metrics._pair_metric import sum_dtype, synced

FLOOR = 0.1
"""A label whose logit moves less than this on both sides, in units of its gap, has no share."""
_DEPENDS = 1.0  # the gap in standard deviations; below, the network knows too little of a label to be asked about it


@dataclass(frozen=True, eq=False)
class Asked:
    """One question: a case, what comes in, and the labels that its two answers count for.

    Attributes:
        case: The case.
        columns: Labels of one rule.
        donor: Whose image comes in, one of the opposite truth in all these labels; None: a baseline of its own.
    """

    case: FixedCase
    columns: list[int]
    donor: Donor | None


def questions(cases: FixedCases, table: OrganTable, replacement: str, turn: int = 0) -> list[Asked]:
    """One question per case, so that every label and truth has its share of the cases.

    A case is asked about the label that has been asked about least for its truth; other labels of the same rule count
    too, where the donor is of the opposite truth in them. In the next turn it is asked about a label of another rule,
    until all have had theirs.

    Args:
        cases: The cases.
        table: Rules of all labels.
        replacement: `case`, or the word of a baseline.
        turn: How many checks have asked before.
    """
    rules = list(table.rules.values())
    had: dict[str, set[Rule]] = {}
    asked: list[Asked] = []
    # After as many turns as there are rules all begins anew.
    for _ in range(turn % max(1, len({rule for rule in rules if not rule.anywhere})) + 1):
        asked = _round(cases, rules, replacement, had)
    return asked


def _round(cases: FixedCases, rules: list[Rule], replacement: str, had: dict[str, set[Rule]]) -> list[Asked]:
    counts = torch.zeros(2, len(rules), dtype=torch.float64)
    asked = []
    for case in cases:
        shown = torch.stack([case.label == 0, case.label == 1]).double()
        gain = (((counts + 1).sqrt() - counts.sqrt()) * shown).sum(dim=0).tolist()
        leads = [column for column, rule in enumerate(rules) if not rule.anywhere and gain[column]]
        fresh = [column for column in leads if rules[column] not in had.get(case.id, ())]
        for lead in sorted(fresh or leads, key=lambda column: (-gain[column], column)):
            if (found := _question(case, lead, rules, cases, replacement)) is not None:
                counts[:, found.columns] += shown[:, found.columns]
                had.setdefault(case.id, set()).add(rules[lead])
                asked.append(found)
                break
    return asked


def _question(case: FixedCase, lead: int, rules: list[Rule], cases: FixedCases, replacement: str) -> Asked | None:
    """None where nobody of the opposite truth can lend an image."""
    columns = [c for c, rule in enumerate(rules) if rule == rules[lead] and not bool(case.label[c].isnan())]
    if replacement != CASE:
        return Asked(case, columns, None)
    donor = cases.donor(case.id, lead, float(case.label[lead]), tuple(case.image.shape))
    if donor is None:
        return None
    columns = [c for c in columns if float(donor.label[c]) == 1 - float(case.label[c])]
    return Asked(case, columns, donor) if lead in columns else None


def changed_images(
    asked: Asked, table: OrganTable, replacement: str, margin: float, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """The image with all that is far from the label's organs replaced, and with the organs and their margin replaced.

    Args:
        asked: The question.
        table: Rules of all labels.
        replacement: `case`, or the word of a baseline.
        margin: Share of each axis that still belongs to the organs, at least a voxel; 0: none.
        device: Where the images are made.

    Returns:
        (1, C, *S) each, in float32 at least; None where the region is empty or the whole image.

    Raises:
        InputError: What the table or the baseline refuses.
    """
    case, column = asked.case, asked.columns[0]
    one = table.select([table.labels[column]])
    spacing = spacing_of(case.affine[None]) if one.needs_spacing and case.affine is not None else None
    told = None if case.allowed_organs is None else case.allowed_organs[None, column : column + 1].to(device)
    region = one.allowed(case.organs[None].to(device), size=None, spacing=spacing, allowed_organs=told).to(device)
    if margin > 0:
        region = grow(region, [max(1, round(size * margin)) for size in region.shape[2:]])
    if not bool(region.any()) or bool(region.all()):
        return None
    # Half precision has no exact blends, and no blur on a CPU.
    image = _wide(case.image.to(device))[None]
    other = make_baseline(image, replacement) if asked.donor is None else asked.donor.image.to(image)[None]
    return replace_outside(image, other, region), replace_inside(image, other, region)


def _wide(image: Tensor) -> Tensor:
    return image if image.dtype == torch.float64 else image.float()


def chunks(
    asked: Sequence[Asked], table: OrganTable, replacement: str, margin: float, device: torch.device, size: int
) -> Iterator[list[tuple[Asked, Tensor, Tensor]]]:
    """The changed images, a few questions at a time, of one shape each time."""
    held: list[tuple[Asked, Tensor, Tensor]] = []
    for one in sorted(asked, key=lambda each: tuple(each.case.image.shape)):
        made = changed_images(one, table, replacement, margin, device)
        if made is None:
            continue
        if held and (len(held) == size or held[0][1].shape != made[0].shape):
            yield held
            held = []
        held.append((one, *made))
    if held:
        yield held


class Pulls(Metric):
    """Sums of one check, over all processes.

    The unit is the gap of a label: how far the mean logits of its positives and its negatives lie apart, in the whole
    pass. With another case's image of the opposite truth a pull is signed: 1 means that the logit goes all the way to
    the truth of what came in, 0 that it does not care. With a baseline it is the size of the move.

    Args:
        num_labels: L.
    """

    full_state_update = False
    moved: Tensor
    asked: Tensor
    total: Tensor
    square: Tensor
    known: Tensor

    def __init__(self, num_labels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Last axis: absent, present. First axis of `moved`: outside, inside.
        self.add_state("moved", torch.zeros(2, num_labels, 2, dtype=sum_dtype()), dist_reduce_fx="sum")
        for name in ("asked", "total", "square", "known"):
            self.add_state(name, torch.zeros(num_labels, 2, dtype=sum_dtype()), dist_reduce_fx="sum")

    def update(self, logits: Tensor, label: Tensor) -> None:
        """A batch of the pass, as it is.

        Args:
            logits: (B, L).
            label: (B, L), NaN = unknown.
        """
        truth = torch.stack([label == 0, label == 1], dim=-1).to(sum_dtype())
        finite = torch.where(logits.isfinite(), logits, 0.0).to(sum_dtype())[..., None]
        truth = truth * logits.isfinite()[..., None]
        self.known = self.known + truth.sum(dim=0)
        self.total = self.total + (truth * finite).sum(dim=0)
        self.square = self.square + (truth * finite.square()).sum(dim=0)

    def answer(self, asked: Asked, before: Tensor, outside: Tensor, inside: Tensor) -> None:
        """A question's answers, (L,) logits each.

        Raises:
            InputError: They are not finite.
        """
        columns = asked.columns
        if not bool(torch.stack([before, outside, inside])[:, columns].isfinite().all()):
            raise InputError("the network's logits are not finite, so nothing can be said of what moves them")
        truth = asked.case.label[columns].to(before.device)
        moves = torch.stack([outside - before, inside - before])[:, columns].to(sum_dtype())
        moves = moves * (1 - 2 * truth) if asked.donor is not None else moves.abs()
        place = torch.nn.functional.one_hot(truth.long(), 2).to(sum_dtype())
        moved, counted = torch.zeros_like(self.moved), torch.zeros_like(self.asked)
        moved[:, columns] = moves[..., None] * place
        counted[columns] = place
        self.moved, self.asked = self.moved + moved, self.asked + counted

    def compute(self) -> Sums:
        """The answers in units of each label's gap; none of a label without a gap to speak of."""
        mean = self.total / self.known
        spread = (self.square / self.known - mean.square()).clamp(min=0).mean(dim=1).sqrt()
        gap = mean[:, 1] - mean[:, 0]
        depends = (gap > _DEPENDS * spread) & (self.known.amin(dim=1) > 1)
        moved = torch.where(depends[:, None], self.moved / gap[:, None], 0.0)
        return Sums(moved.double().cpu(), torch.where(depends[:, None], self.asked, 0.0).double().cpu())

    def joined(self) -> Sums:
        """The same over all processes (all of them must call it together)."""
        with synced(self):
            return Pulls.compute(self)  # not the one that torchmetrics wraps: that syncs by itself


class Sums(NamedTuple):
    """Answers of one check, or of several.

    Attributes:
        moved: (2, L, 2) sums of pulls: outside and inside; absent and present.
        asked: (L, 2) how many.
    """

    moved: Tensor
    asked: Tensor

    def plain(self) -> list[Any]:
        """For a checkpoint."""
        return [self.moved.tolist(), self.asked.tolist()]

    @classmethod
    def of(cls, plain: Sequence[Any]) -> Sums:
        """What `plain` gave."""
        return cls(*(torch.tensor(part, dtype=torch.float64) for part in plain))


def pull_values(checks: Sequence[Sums], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """`outside_pull`, `inside_pull` and `outside_share` of each label over some checks, undefined ones left out.

    Absent and present cases weigh the same. The share is outside / (outside + inside), a pull to the other side being
    none.
    """
    if not checks:
        return {}
    moved, asked = (torch.stack(parts).sum(dim=0) for parts in zip(*checks, strict=True))
    outside, inside = (moved / asked).nanmean(dim=2)
    low, high = outside.clamp(min=0), inside.clamp(min=0)
    share = torch.where(torch.maximum(low, high) > FLOOR, low / (low + high), torch.nan)
    found = {"outside_pull": outside, "inside_pull": inside, "outside_share": share}
    return {
        measure: {name: value for name, value in zip(names, values.tolist(), strict=True) if value == value}
        for measure, values in found.items()
    }
