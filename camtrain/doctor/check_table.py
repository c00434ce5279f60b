"""All checks by name: what each one looks at, when it can run, and what it asks. A new check is a row here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from camtrain.doctor import content_checks, form_checks, header_checks, label_checks, net_checks
from camtrain.doctor.facts import Facts
from camtrain.doctor.finding import Finding, worst_first

Stage = Literal["form", "headers", "contents", "network"]


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        run: Facts -> findings; pure.
        stage: What must have been looked at before it says anything: later stages know what earlier ones do.
        asks: Its question.
        of_files: Is it about a manifest and its files, so that other data have nothing to ask?
    """

    run: Callable[[Facts], list[Finding]]
    stage: Stage
    asks: str
    of_files: bool = False


def _check(run: Callable[[Facts], list[Finding]], stage: Stage) -> Check:
    return Check(run, stage, (run.__doc__ or "").splitlines()[0], run in _OF_FILES)


_OF_FILES = (
    *(form_checks.organ_table, form_checks.sheet, form_checks.columns, form_checks.ids, form_checks.paths),
    *(form_checks.label_values, form_checks.rules, header_checks.cut_off, header_checks.grids),
    *(header_checks.orientation, header_checks.spacing, header_checks.stray_files),
    *(content_checks.sides, label_checks.crop),
)


_STAGES: dict[Stage, tuple[Callable[[Facts], list[Finding]], ...]] = {
    "form": (
        form_checks.config,
        form_checks.organ_table,
        form_checks.made,
        form_checks.built,
        form_checks.sheet,
        form_checks.columns,
        form_checks.ids,
        form_checks.paths,
        form_checks.label_values,
        form_checks.rules,
        form_checks.patients,
        form_checks.splits,
        label_checks.balance,
        label_checks.prevalence,
        label_checks.segmented,
    ),
    "headers": (
        header_checks.unreadable,
        header_checks.cut_off,
        header_checks.grids,
        header_checks.orientation,
        header_checks.spacing,
        header_checks.stray_files,
        content_checks.duplicates,
    ),
    "contents": (
        content_checks.intensities,
        content_checks.organ_ids,
        content_checks.organs_never,
        content_checks.sides,
        label_checks.empty_regions,
        label_checks.crop,
    ),
    "network": (net_checks.step, net_checks.layers, net_checks.small_organs, net_checks.memory),
}

CHECKS: dict[str, Check] = {run.__name__: _check(run, stage) for stage, runs in _STAGES.items() for run in runs}


def run_checks(facts: Facts, stages: Iterable[Stage] = ("form", "headers", "contents", "network")) -> list[Finding]:
    """Findings of all checks of some stages, worst first.

    Args:
        facts: What is known.
        stages: What has been looked at.

    Example:
        >>> [finding.severity for finding in run_checks(Facts("data", refused="no such file"), ["form"])]
        ['error']
    """
    wanted = set(stages)
    return worst_first(f for check in CHECKS.values() if check.stage in wanted for f in check.run(facts))
