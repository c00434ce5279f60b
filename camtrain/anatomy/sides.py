"""Images with one side of each label's organs replaced, and what a network says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from camtrain._errors import InputError, nearest
from camtrain.anatomy.baselines import make_baseline
from camtrain.anatomy.donors import Donor
from camtrain.anatomy.organ_table import OrganTable, Spacing
from camtrain.anatomy.replacing import replace_inside, replace_outside
from camtrain.anatomy.rules import Rule

CASE = "case"
REPLACEMENTS = (CASE, "air", "blur", "mean")
"""Another case's image, or the image's own baseline of that kind (`camtrain.anatomy.baselines`)."""
AT_ONCE = 2**28  # bytes of changed images per forward: at 400^3 one image alone


class Lenders(Protocol):
    """Cases that lend their image, such as a `DonorPool`."""

    def donor(self, case: str, column: int, truth: float, shape: Sequence[int]) -> Donor | None:
        """Another case's image of that shape, of the opposite truth where there is one; None if there is no other."""


class Probabilities(NamedTuple):
    """What a model says of changed images.

    Attributes:
        outside: (B, L) with everything outside the label's organs replaced; NaN = not measured.
        inside: (B, L) with everything inside them replaced; NaN in the same places.
    """

    outside: Tensor
    inside: Tensor


@dataclass(frozen=True, eq=False)
class _Job:
    """One changed image, and the pairs that are read off its probabilities: labels of equal rule and donor."""

    case: int
    columns: list[int]
    side: int
    image: Tensor


def ask_sides(
    said: Callable[[Tensor], Tensor],
    image: Tensor,
    organs: Tensor | None,
    table: OrganTable,
    label: Tensor,
    replacement: str,
    donors: Lenders | None = None,
    ids: Sequence[str] | None = None,
    columns: Iterable[int] | None = None,
    spacing: Spacing | None = None,
    chunk: int = 4,
    *,
    has_organs: Tensor | None = None,
    seam: int = 1,
    air: float | None = None,
) -> Probabilities:
    """What is said once everything outside a label's organs, or everything inside, is something else.

    A pair is measured where the label is known, the case has organs, and the label's region is neither empty nor the
    whole image; labels of the rule `anywhere` have no outside. For `"case"` there must be a donor of the same shape.
    Labels with the same rule (and donor) share their two images, so a case costs two forwards per distinct rule, for
    `"case"` per rule and donor. One region at full resolution is held at a time, and the changed images of a forward.

    Args:
        said: Probabilities (N, L) of images (N, C, *S).
        image: (B, C, *S) on the device where they are looked at.
        organs: (B, 1, *S) integer ids; None = nothing is measured.
        table: Rules of all L labels, in the order of the outputs.
        label: (B, L), NaN = unknown.
        replacement: `"case"`, `"air"`, `"blur"` or `"mean"`.
        donors: For `"case"`: cases of the same split.
        ids: For `"case"`: names of the B cases, so that none becomes its own donor.
        columns: Labels to measure; None = all.
        spacing: Voxel size in mm, for rules with lengths; one number per axis or (B, axes).
        chunk: Most images per forward; fewer where that many would take more than 256 MiB.
        has_organs: (B,) bool, was the case segmented? None: told by `organs`, which are all zero otherwise.
        seam: Voxels over which a replacement fades in (`camtrain.anatomy.replacing`).
        air: For `"air"`: its intensity in the units of the image; None = 0.0, for images in 0..1.

    Returns:
        `outside` and `inside`, (B, L) each, on the device of `image`.

    Raises:
        InputError: Unknown replacement, `"case"` without donors or ids, or inputs that do not fit each other.

    Example:
        >>> table = OrganTable(organs={"heart": 1}, labels={"stent": ["heart"]})
        >>> image, organs, label = torch.ones(1, 1, 4), torch.tensor([[[1, 1, 0, 0]]]), torch.ones(1, 1)
        >>> ask_sides(lambda images: images[:, 0, 3:], image, organs, table, label, "air").outside
        tensor([[0.]])
    """
    _check(image, organs, table, label, replacement, donors, ids, chunk)
    if air is not None and replacement != "air":
        raise InputError(f"air= belongs to the replacement 'air', got it with {replacement!r}: leave it out")
    label = label.detach().cpu()
    shape = (2, *label.shape)
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    found = torch.full(shape, torch.nan, dtype=dtype, device=image.device)
    if organs is not None:
        wanted = _wanted(label, columns, has_organs)
        source = _Source(replacement, donors, ids, label, air)
        plan = _Plan(image, organs, table, wanted, spacing, seam, source)
        for jobs in _chunks(plan.jobs(), min(chunk, max(1, AT_ONCE // image[0].nbytes))):
            rows = said(torch.cat([job.image for job in jobs]))
            _check_outputs(rows, label)
            for row, job in zip(rows, jobs, strict=True):
                found[job.side, job.case, job.columns] = row[job.columns].to(found)
    return Probabilities(found[0], found[1])


def known_replacement(replacement: str) -> str:
    """The word, if it is one of `REPLACEMENTS`.

    Raises:
        InputError: It is not.
    """
    if replacement not in REPLACEMENTS:
        raise InputError(
            f"replacement= expects {', '.join(REPLACEMENTS)}, got {replacement!r}"
            f"{nearest(str(replacement), REPLACEMENTS)}"
        )
    return replacement


@dataclass(frozen=True, eq=False)
class _Source:
    """Where the replacement images come from."""

    replacement: str
    donors: Lenders | None
    ids: Sequence[str] | None
    label: Tensor
    air: float | None

    def images(self, case: int, columns: list[int], image: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        """Replacements (1, C, *S) for labels of one rule, each with its labels; a label without one is left out."""
        if self.replacement != CASE:
            yield columns, make_baseline(image, self.replacement, value=self.air)
            return
        if self.donors is None or self.ids is None:
            return
        lenders: dict[str, tuple[list[int], Tensor]] = {}
        for column in columns:
            truth = float(self.label[case, column])
            donor = self.donors.donor(self.ids[case], column, truth, image.shape[1:])
            if donor is not None:
                lenders.setdefault(donor.id, ([], donor.image))[0].append(column)
        for served, lent in lenders.values():
            yield served, lent.to(image)[None]


@dataclass(frozen=True, eq=False)
class _Plan:
    """All changed images of a batch, made one after the other."""

    image: Tensor
    organs: Tensor
    table: OrganTable
    wanted: Tensor
    spacing: Spacing | None
    seam: int
    source: _Source

    def jobs(self) -> Iterator[_Job]:
        rules: dict[Rule, list[int]] = {}
        for column, rule in enumerate(self.table.rules.values()):
            rules.setdefault(rule, []).append(column)
        alone = {rule: self.table.select([self.table.labels[columns[0]]]) for rule, columns in rules.items()}
        for case in range(len(self.image)):
            for rule, columns in rules.items():
                asked = [column for column in columns if bool(self.wanted[case, column])]
                if asked and not rule.anywhere:
                    yield from self._of_rule(case, asked, alone[rule])

    def _of_rule(self, case: int, columns: list[int], table: OrganTable) -> Iterator[_Job]:
        region = table.allowed(self.organs[case : case + 1], size=None, spacing=self._spacing(case))
        region = region.to(self.image.device)
        if not bool(region.any()) or bool(region.all()):
            return
        image = self.image[case : case + 1]
        for served, other in self.source.images(case, columns, image):
            for side, replace in enumerate((replace_outside, replace_inside)):
                yield _Job(case, served, side, replace(image, other, region, self.seam))

    def _spacing(self, case: int) -> Tensor | None:
        if self.spacing is None:
            return None
        rows = torch.as_tensor(self.spacing)
        return rows[case] if rows.ndim == 2 else rows


def _chunks(jobs: Iterator[_Job], size: int) -> Iterator[list[_Job]]:
    held: list[_Job] = []
    for job in jobs:
        held.append(job)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held


def _wanted(label: Tensor, columns: Iterable[int] | None, has_organs: Tensor | None) -> Tensor:
    """(B, L) bool: known labels that are asked for, of cases that were segmented."""
    wanted = ~label.isnan()
    if has_organs is not None:
        wanted = wanted & has_organs.to(label.device).bool()[:, None]
    if columns is None:
        return wanted
    asked = list(columns)
    if asked and not 0 <= min(asked) <= max(asked) < label.shape[1]:
        raise InputError(f"columns= must lie in 0..{label.shape[1] - 1}, got {asked}")
    chosen = torch.zeros(label.shape[1], dtype=torch.bool, device=label.device)
    chosen[asked] = True
    return wanted & chosen


def _check(
    image: Tensor,
    organs: Tensor | None,
    table: OrganTable,
    label: Tensor,
    replacement: str,
    donors: Lenders | None,
    ids: Sequence[str] | None,
    chunk: int,
) -> None:
    if known_replacement(replacement) == CASE and (donors is None or ids is None or len(ids) != len(image)):
        raise InputError(
            "replacement 'case' needs donors= (a DonorPool of the split) and ids= (one name per image), so that no "
            "case is replaced by itself: give the batch an 'id', or take 'air' or 'blur'"
        )
    if label.ndim != 2 or len(label) != len(image) or label.shape[1] != len(table.labels):
        raise InputError(
            f"expected label (B, L) = ({len(image)}, {len(table.labels)}) for these images and the labels of the "
            f"table, got {tuple(label.shape)}: pass table.select(names) with the names of the outputs"
        )
    if organs is not None and tuple(organs.shape) != (len(image), 1, *image.shape[2:]):
        raise InputError(
            f"expected organs (B, 1, *S) of the image's resolution, {(len(image), 1, *image.shape[2:])}, got "
            f"{tuple(organs.shape)}: give both the same spatial transforms"
        )
    if chunk < 1:
        raise InputError(f"chunk= expects at least 1 image per forward, got {chunk}")


def _check_outputs(said: Tensor, label: Tensor) -> None:
    if said.shape[1] != label.shape[1]:
        raise InputError(
            f"the network gives {said.shape[1]} outputs but there are {label.shape[1]} labels: pass the labels and "
            "the table in the order of the outputs"
        )
