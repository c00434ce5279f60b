"""Checks of labels against splits, organs and each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scipy.stats import fisher_exact

from camtrain.doctor.facts import Facts
from camtrain.doctor.finding import Finding, Severity, count, some

_CHANCE = 0.001  # below this, having organs and having a finding do not go together by chance
_GAP = 0.2  # difference of shares from which that matters


@dataclass(frozen=True)
class Tally:
    """How often a label is present, absent and unknown.

    Attributes:
        present: Cases with it.
        absent: Cases without.
        unknown: Cases of which nobody knows.
    """

    present: int
    absent: int
    unknown: int


def tally(facts: Facts, indices: Iterable[int], label: int) -> Tally:
    """Counts of a label among some rows."""
    values = [facts.rows[i].label[label] for i in indices if label < len(facts.rows[i].label)]
    present, absent = values.count(1.0), values.count(0.0)
    return Tally(present, absent, len(values) - present - absent)


def balance(facts: Facts) -> list[Finding]:
    """Labels without positives or negatives in a split that training, validation or test reads."""
    lacking: dict[tuple[str, bool], dict[str, list[str]]] = {}
    for split in facts.used_splits:
        indices = facts.of_split(split)
        for number, label in enumerate(facts.labels if indices else ()):
            t = tally(facts, indices, number)
            if not t.present + t.absent:
                what = "known truths"
            elif not t.present:
                what = "positives"
            elif not t.absent:
                what = "negatives"
            else:
                continue
            lacking.setdefault((what, split == facts.train), {}).setdefault(label, []).append(split)
    return [_lacking(what, training, where) for (what, training), where in lacking.items()]


def _lacking(what: str, training: bool, where: dict[str, list[str]]) -> Finding:
    todo = "move cases between splits, add cases, or leave the labels out with labels="
    consequence = "cannot be learned" if training else "has no AUROC there"
    splits = some({split: None for many in where.values() for split in many}, 4)
    title = f"{count(len(where), 'label')} without {what} in {splits}: such a label {consequence}"
    got = some(f"{label} ({some(many, 4)})" for label, many in where.items())
    # Negatives are missing where all cases of a small split have the finding: worth knowing, not more.
    severity: Severity = "note" if what == "negatives" and not training else "warning"
    return Finding("balance", severity, title, f"some {what} of every label", got, todo)


def empty_regions(facts: Facts) -> list[Finding]:
    """Positives that may be read nowhere: their organs are missing from the segmentation, or outside the crop."""
    if facts.table is None:
        return []
    missing, outside = [], []
    for index, row in enumerate(facts.rows):
        content = facts.contents.get(index)
        if content is None or content.organs is None:
            continue
        for label in _present(facts, index):
            rule = facts.table.rules.get(label)
            if rule is None or rule.anywhere:
                continue
            if not sum(facts.organ_voxels(index, name) for name in rule.organs):
                missing.append(row.place(f"{label}: no voxel of {some(rule.organs, 4)}", row.organs))
            elif not sum(facts.organ_voxels(index, name, inside=True) for name in rule.organs):
                outside.append(row.place(f"{label}: {some(rule.organs, 4)} outside the crop", row.organs))
    found = []
    consequence = "the mask loss leaves them out, and no score looks at them"
    if missing:
        title = f"{count(len(missing), 'positive')} whose organs are missing from the segmentation: {consequence}"
        todo = "segment again, correct the label, or widen the rule in the organ table"
        got = some((place.got for place in missing), 3)
        found.append(
            Finding("empty_regions", "warning", title, "organs where the label may be read", got, todo, tuple(missing))
        )
    if outside:
        title = f"{count(len(outside), 'positive')} whose organs lie outside the crop: {consequence}"
        todo = "enlarge size=, or spacing="
        got = some((place.got for place in outside), 3)
        found.append(Finding("empty_regions", "warning", title, "organs within the crop", got, todo, tuple(outside)))
    return found


def segmented(facts: Facts) -> list[Finding]:
    """How many cases have organs, and does having them give a finding away?"""
    if facts.table is None or not facts.rows or facts.organs_to_come or all(facts.table.anywhere):
        return []
    train = facts.of_split(facts.train)
    has = {index: _has_organs(facts, index) for index in train}
    number = sum(has.values())
    if train and not number:
        todo = "name segmentations (column organs): without them the mask loss is 0 and no score of place exists"
        title = "no training case has organs"
        return [Finding("segmented", "warning", title, "organs for some cases", f"0 of {len(train)}", todo)]
    found = []
    if number < len(train):
        todo = "nothing: cases without organs train the classification only; more organs make the mask loss surer"
        title = f"{number:,} of {len(train):,} training cases have organs"
        found.append(Finding("segmented", "note", title, "organs for all or some", title, todo))
        found += _told_by_organs(facts, has)
    return found


def _told_by_organs(facts: Facts, has: dict[int, bool]) -> list[Finding]:
    said = []
    for number, label in enumerate(facts.labels):
        sides = {value: [has[i] for i in has if facts.rows[i].label[number] == value] for value in (1.0, 0.0)}
        present, absent = sides[1.0], sides[0.0]
        if not present or not absent:
            continue
        gap = sum(present) / len(present) - sum(absent) / len(absent)
        table = [[sum(side), len(side) - sum(side)] for side in (present, absent)]
        if abs(gap) >= _GAP and fisher_exact(table).pvalue < _CHANCE:
            said.append(
                f"{label}: {sum(present)} of {len(present)} positives, {sum(absent)} of {len(absent)} negatives"
            )
    if not said:
        return []
    title = f"having organs tells {count(len(said), 'label')}"
    todo = "segment cases of both kinds alike: else the mask loss acts on one side only, and can be read from"
    expected = "organs as often for positives as for negatives"
    return [Finding("segmented", "warning", title, expected, some(said, 4), todo)]


def crop(facts: Facts) -> list[Finding]:
    """Organs that the crop cuts through in many cases."""
    if facts.table is None or facts.size is None:
        return []
    used = {name for rule in facts.table.rules.values() for name in rule.organs}
    said = []
    for name in facts.table.organs:
        shares = [
            facts.organ_voxels(index, name, inside=True) / whole
            for index in facts.contents
            if (whole := facts.organ_voxels(index, name))
        ]
        cut = sum(share < _KEPT for share in shares)
        if name in used and shares and cut > len(shares) / 10:
            said.append(f"{name} in {cut} of {len(shares)} cases")
    if not said:
        return []
    title = f"the crop takes more than {1 - _KEPT:.0%} of {count(len(said), 'organ')} in many cases"
    todo = "enlarge size= or spacing=, if the findings may lie there"
    return [Finding("crop", "warning", title, "whole organs", some(said, 5), todo)]


_KEPT = 0.8


def _present(facts: Facts, index: int) -> list[str]:
    return [name for name, value in zip(facts.labels, facts.rows[index].label, strict=False) if value == 1]


def _has_organs(facts: Facts, index: int) -> bool:
    if facts.files:
        return facts.rows[index].organs is not None
    return index in facts.contents and facts.contents[index].organs is not None


def prevalence(facts: Facts) -> list[Finding]:
    """Labels much more frequent in one split than in training."""
    said = []
    train = facts.of_split(facts.train)
    for split in facts.used_splits:
        for number, label in enumerate(facts.labels):
            ours, theirs = tally(facts, train, number), tally(facts, facts.of_split(split), number)
            if split == facts.train or not (ours.present + ours.absent) or not (theirs.present + theirs.absent):
                continue
            table = [[ours.present, ours.absent], [theirs.present, theirs.absent]]
            shares = [present / (present + absent) for present, absent in table]
            if abs(shares[0] - shares[1]) >= _GAP and fisher_exact(table).pvalue < _CHANCE:
                said.append(f"{label}: {shares[0]:.0%} in {facts.train!r}, {shares[1]:.0%} in {split!r}")
    if not said:
        return []
    title = f"{count(len(said), 'label')} much more or less frequent than in training"
    todo = "check how the splits were made; probabilities will be off there, AUROC is not"
    return [Finding("prevalence", "note", title, "like shares in all splits", some(said, 4), todo)]
