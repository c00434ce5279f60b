"""`audit`: which labels are read from outside their organs, told from validation data alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from camtrain._errors import InputError
from camtrain.evaluation.evaluation import Evaluation

ENERGY, OUTSIDE, SHARE = "energy_inside", "outside_effect", "shortcut_reliance"


@dataclass(frozen=True)
class AuditLimits:
    """From where on a figure speaks against a label.

    Attributes:
        energy: Energy inside less than this many times its chance level.
        outside: Outside effect of more than this.
        share: Share of the reaction to the outside of more than this.

    Raises:
        InputError: A limit below 0, or one of `outside` and `share` above 1.
    """

    energy: float = 2.0
    outside: float = 0.1
    share: float = 0.5

    def __post_init__(self) -> None:
        for word, value, most in (("energy", self.energy, math.inf), ("outside", self.outside, 1.0),
                                  ("share", self.share, 1.0)):  # fmt: skip
            if not 0 <= value <= most:
                raise InputError(f"{word}= expects a limit from 0 to {most:g}, got {value!r}")


@dataclass(frozen=True)
class LabelAudit:
    """What the figures say of one label.

    Attributes:
        label: Its name.
        figures: Figure -> value: `energy_inside@<method>` in multiples of chance, `outside_effect/<replacement>`,
            `shortcut_reliance/<replacement>`; NaN = no pair to measure.
        flags: Figure -> does it speak against the label? Never where it is NaN.
        suspect: The verdict: with *every* replacement, share and outside effect are both above their limits. None
            where reliance was not measured. Energy inside has no vote: it says where cells look, and a cell may have
            seen the whole scan.
    """

    label: str
    figures: Mapping[str, float]
    flags: Mapping[str, bool]
    suspect: bool | None


@dataclass(frozen=True)
class Audit:
    """The audit of a model; prints as a sentence.

    Attributes:
        labels: One entry per label.
        split: Where it was measured.
        limits: As given.
    """

    labels: tuple[LabelAudit, ...]
    split: str
    limits: AuditLimits

    @property
    def suspects(self) -> list[str]:
        """Labels that are read from outside their organs, by the verdict."""
        return [row.label for row in self.labels if row.suspect]

    @property
    def unknown(self) -> list[str]:
        """Labels of which reliance was not measured (no donors, no organs, a model that never moves)."""
        return [row.label for row in self.labels if row.suspect is None]

    def __str__(self) -> str:
        names = f": {', '.join(self.suspects)}" if self.suspects else ""
        rest = f"; not measured: {', '.join(self.unknown)}" if self.unknown else ""
        return f"{len(self.suspects)} of {len(self.labels)} labels react more to what lies outside{names}{rest}"


def audit(found: Evaluation, split: str = "val", limits: AuditLimits | None = None) -> Audit:
    """Judge every label by figures that exist in distribution, before anyone has looked at shifted test data.

    A shortcut that holds in validation as it does in training is invisible to AUROC there. What betrays it is that the
    probability follows the outside of the organs (`shortcut_reliance`) whatever is put there, hence the demand that
    all replacements agree: another case's voxels alone also carry that case's other findings, air alone is unlike any
    scan.

    Args:
        found: Of `ct.evaluate(..., measures=["energy_inside", "energy_inside_chance", "reliance"])`; figures that were
            not measured are left out.
        split: Which of its splits.
        limits: From where on a figure speaks against a label; state them before you look.

    Returns:
        Figures, flags and verdict per label.

    Raises:
        InputError: The split was not evaluated, or neither energy inside nor reliance was measured.

    Example:
        >>> import torch, camtrain as ct
        >>> model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4, 1))
        >>> _ = model[2].weight.data.copy_(torch.tensor([[0.0, 0.0, 0.0, 5.0]]))
        >>> batch = {"image": torch.rand(6, 1, 4), "label": torch.tensor([[1.0], [0.0]] * 3), "id": list("abcdef")}
        >>> batch["organs"] = torch.tensor([[[1, 1, 0, 0]]] * 6)
        >>> table = {"organs": {"heart": 1}, "labels": {"stent": ["heart"]}}
        >>> found = ct.evaluate(model, {"val": [batch]}, table, measures=["reliance"], replacements=["air"],
        ...                     repeats=20, progress=False)
        >>> print(audit(found))
        1 of 1 labels react more to what lies outside: stent
    """
    limits = limits or AuditLimits()
    if split not in found.records:
        raise InputError(f"split {split!r} was not evaluated: expected one of {', '.join(found.records)}")
    rows = tuple(_of(label, dict(_figures(found, split, label)), limits) for label in found.names)
    if not any(row.figures for row in rows):
        raise InputError(
            "nothing to audit by: evaluate with measures=['energy_inside', 'energy_inside_chance', 'reliance']"
        )
    return Audit(rows, split, limits)


def _figures(found: Evaluation, split: str, label: str) -> Iterator[tuple[str, float]]:
    """Figure and value; where several layers were measured, the last one counts."""
    values = {
        (row.measure, row.method): _number(row.mean) for row in found.rows if row.split == split and row.label == label
    }
    for (measure, method), value in values.items():
        if measure == ENERGY:
            chance = values.get((f"{ENERGY}_chance", method), math.nan)
            yield f"{ENERGY}@{method}", value / chance if chance > 0 else math.nan
        elif measure.partition("/")[0] in (OUTSIDE, SHARE):
            yield measure, value


def _of(label: str, figures: Mapping[str, float], limits: AuditLimits) -> LabelAudit:
    flags = {name: _against(name, value, limits) for name, value in figures.items()}
    votes = {name: flag for name, flag in flags.items() if not name.startswith(ENERGY)}
    # A share is undefined where the network moves under neither replacement: that is no acquittal.
    silent = not votes or all(math.isnan(figures[name]) for name in votes if name.startswith(SHARE))
    return LabelAudit(label, figures, flags, None if silent else all(votes.values()))


def _against(name: str, value: float, limits: AuditLimits) -> bool:
    if name.startswith(ENERGY):
        return value < limits.energy
    return value > (limits.outside if name.startswith(OUTSIDE) else limits.share)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
