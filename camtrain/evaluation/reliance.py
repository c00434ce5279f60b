"""Probabilities with one side of each label's organs replaced, and which replacement may judge which model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from camtrain._errors import InputError, nearest
from camtrain.anatomy.organ_table import OrganTable, Spacing
from camtrain.anatomy.replacing import replace_inside, replace_outside
from camtrain.anatomy.rules import Rule
from camtrain.cam.logits import PickLogits
from camtrain.evaluation.baselines import make_baseline
from camtrain.evaluation.donors import DonorPool
from camtrain.evaluation.predicting import logits_of

CASE = "case"
REPLACEMENTS = (CASE, "air", "blur", "mean")
"""Another case's image, or the image's own baseline of that kind (`camtrain.evaluation.baselines`)."""
SWAP = "OutsideSwap"
AT_ONCE = 2**28  # bytes of changed images per forward: at 400^3 one image alone


class Probabilities(NamedTuple):
    """What a model says of changed images.

    Attributes:
        outside: (B, L) with everything outside the label's organs replaced; NaN = not measured.
        inside: (B, L) with everything inside them replaced; NaN in the same places.
    """

    outside: Tensor
    inside: Tensor


class Judges(NamedTuple):
    """Replacements that may judge a model.

    Attributes:
        replacements: Those that remain, in the order asked for.
        dropped: The sentence that says which was left out and why; empty if none was.
    """

    replacements: tuple[str, ...]
    dropped: str


@dataclass(frozen=True, eq=False)
class _Job:
    """One changed image, and the pairs that are read off its probabilities: labels of equal rule and donor."""

    case: int
    columns: list[int]
    side: int
    image: Tensor


def reliance_probabilities(
    model: nn.Module,
    image: Tensor,
    organs: Tensor | None,
    table: OrganTable,
    label: Tensor,
    replacement: str,
    donors: DonorPool | None = None,
    ids: Sequence[str] | None = None,
    columns: Iterable[int] | None = None,
    spacing: Spacing | None = None,
    logits: PickLogits | None = None,
    chunk: int = 4,
    *,
    has_organs: Tensor | None = None,
    seam: int = 1,
    air: float | None = None,
) -> Probabilities:
    """What the model says once everything outside a label's organs, or everything inside, is something else.

    A pair is measured where the label is known, the case has organs, and the label's region is neither empty nor the
    whole image; labels of the rule `anywhere` have no outside. For `"case"` there must be a donor of the same shape.
    Labels with the same rule (and donor) share their two images, so a case costs two forwards per distinct rule, for
    `"case"` per rule and donor. One region at full resolution is held at a time, and the changed images of a forward.

    Args:
        model: Any module whose output contains logits (B, L); it is left as it was.
        image: (B, C, *S) on the model's device.
        organs: (B, 1, *S) integer ids; None = nothing is measured.
        table: Rules of all L labels, in the order of the outputs.
        label: (B, L), NaN = unknown.
        replacement: `"case"` (another case's image, of the opposite truth where there is one), `"air"`, `"blur"` or
            `"mean"`.
        donors: For `"case"`: cases of the same split.
        ids: For `"case"`: names of the B cases, so that none becomes its own donor.
        columns: Labels to measure; None = all.
        spacing: Voxel size in mm, for rules with lengths; one number per axis or (B, axes).
        logits: Callable that picks (B, L) from the model's output.
        chunk: Most images per forward; fewer where that many would take more than 256 MiB.
        has_organs: (B,) bool, was the case segmented? None: told by `organs`, which are all zero otherwise.
        seam: Voxels over which a replacement fades in (`camtrain.anatomy.replacing`).
        air: For `"air"`: its intensity in the units of the image; None = 0.0, for images in 0..1.

    Returns:
        `outside` and `inside`, (B, L) each, on the device of `image`; `ShortcutReliance` takes them.

    Raises:
        InputError: Unknown replacement, `"case"` without donors or ids, or inputs that do not fit each other.

    Example:
        >>> from camtrain.metrics import shortcut_reliance
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
        >>> _ = model[1].weight.data.copy_(torch.tensor([[0.0, 0.0, 0.0, 5.0]]))
        >>> table = OrganTable(organs={"heart": 1}, labels={"stent": ["heart"]})
        >>> image, organs, label = torch.ones(1, 1, 4), torch.tensor([[[1, 1, 0, 0]]]), torch.ones(1, 1)
        >>> changed = reliance_probabilities(model, image, organs, table, label, "air")
        >>> shortcut_reliance(logits_of(model, image).sigmoid(), *changed, label).share
        tensor([1.], dtype=torch.float64)
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
            said = logits_of(model, torch.cat([job.image for job in jobs]), logits).sigmoid()
            _check_outputs(said, label)
            for row, job in zip(said, jobs, strict=True):
                found[job.side, job.case, job.columns] = row[job.columns].to(found)
    return Probabilities(found[0], found[1])


def trained_replacements(checkpoint: Mapping[str, Any]) -> set[str]:
    """What a model saw outside the organs while it was trained.

    A Lightning checkpoint keeps the state of its callbacks under their class names. One of an `OutsideSwap` says what
    it put there, under `replacement`, else another case's image.

    Args:
        checkpoint: What `torch.load` gave.

    Returns:
        Replacements; empty if there was no such callback, or if the file holds weights alone.

    Example:
        >>> trained_replacements({"callbacks": {"OutsideSwap[]": {"replacement": "air"}, "ModelCheckpoint": {}}})
        {'air'}
    """
    callbacks = checkpoint.get("callbacks")
    found = set()
    for key, state in callbacks.items() if isinstance(callbacks, Mapping) else ():
        # 'OutsideSwap', 'OutsideSwap[second]', "OutsideSwap{'p': 0.5}", 'package.OutsideSwap': names end there.
        name = re.match(r"[\w.]*", getattr(key, "__qualname__", str(key)))
        if name and name[0].rpartition(".")[2] == SWAP:
            replacement = state.get("replacement") if isinstance(state, Mapping) else None
            found.add(replacement if isinstance(replacement, str) else CASE)
    return found


def judge_with(replacements: Iterable[str], trained: Iterable[str]) -> Judges:
    """Leave out the replacement that a model was trained with: it has learnt not to react to that one.

    Args:
        replacements: Those asked for.
        trained: What `trained_replacements` found.

    Raises:
        InputError: An unknown replacement, or none remains.

    Example:
        >>> judge_with(["case", "air"], {"case"}).replacements
        ('air',)
    """
    asked = tuple(dict.fromkeys(_known(name) for name in replacements))
    seen = {_known(name) for name in trained}
    remain = tuple(name for name in asked if name not in seen)
    out = [repr(name) for name in asked if name in seen]
    others = [name for name in REPLACEMENTS if name not in seen]
    if not remain:
        raise InputError(
            f"no replacement is left to judge with: expected one that the model was not trained with, got "
            f"{', '.join(out) or 'none'}; take {', '.join(others) or 'another model'}"
        )
    if not out:
        return Judges(remain, "")
    return Judges(
        remain,
        f"Replacement {', '.join(out)} is left out: the model was trained with it ({SWAP}), and a model trained with "
        f"one replacement is judged with another.",
    )


@dataclass(frozen=True, eq=False)
class _Source:
    """Where the replacement images come from."""

    replacement: str
    donors: DonorPool | None
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


def _known(replacement: str) -> str:
    if replacement not in REPLACEMENTS:
        raise InputError(
            f"replacement= expects {', '.join(REPLACEMENTS)}, got {replacement!r}"
            f"{nearest(str(replacement), REPLACEMENTS)}"
        )
    return replacement


def _check(
    image: Tensor,
    organs: Tensor | None,
    table: OrganTable,
    label: Tensor,
    replacement: str,
    donors: DonorPool | None,
    ids: Sequence[str] | None,
    chunk: int,
) -> None:
    if _known(replacement) == CASE and (donors is None or ids is None or len(ids) != len(image)):
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
