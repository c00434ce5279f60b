"""The cases of a reader study, as one model or two are shown them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from camtrain._errors import InputError
from camtrain.evaluation.case import Case
from camtrain.evaluation.label_names import Names
from camtrain.evaluation.predicting import logits_of
from camtrain.evaluation.reader_study_choosing import Candidate
from camtrain.evaluation.reading_cases import CaseReader, splits_of


@dataclass(frozen=True)
class Contestant:
    """A model whose maps are shown.

    Attributes:
        name: How the key calls it, for example A.
        model: Trained.
        data: Its data module, or loaders by split: what it is shown as it was trained to see it.
    """

    name: str
    model: nn.Module
    data: Any


def _streams(contestants: Sequence[Contestant], split: str, limit: int | None) -> Iterator[tuple[Case, ...]]:
    """The same case as every model sees it, one case after the other.

    Raises:
        InputError: The data of two models differ.
    """
    streams = [CaseReader(c.model).cases(split, splits_of(c.data, [split])[split], limit) for c in contestants]
    for cases in itertools.zip_longest(*streams):
        if None in cases:
            raise InputError(
                f"the data of the two models have unequal numbers of cases in {split!r}: they must be the same"
            )
        first = cases[0]
        for other in cases[1:]:
            if other.id != first.id or other.image.shape != first.image.shape or not _same_truth(other, first):
                raise InputError(
                    f"the two models are shown other cases ({first.id!r} of shape {tuple(first.image.shape[1:])} and "
                    f"{other.id!r} of shape {tuple(other.image.shape[1:])}): compare models of the same data"
                )
        yield cases


def _same_truth(a: Case, b: Case) -> bool:
    return a.label.shape == b.label.shape and np.array_equal(a.label.cpu(), b.label.cpu(), equal_nan=True)


def read_candidates(
    contestants: Sequence[Contestant], split: str, limit: int | None
) -> tuple[list[str], list[Candidate]]:
    """Label names, and what all models say of every case.

    Raises:
        InputError: Other cases or labels for the two models, or no case at all.
    """
    found: dict[str, Candidate] = {}
    names: list[str] = []
    for cases in _streams(contestants, split, limit):
        logits = [logits_of(c.model, case.image)[0] for c, case in zip(contestants, cases, strict=True)]
        if not names:
            of_each = [
                Names(None, c.data, c.model, None).resolve(len(y)) for c, y in zip(contestants, logits, strict=True)
            ]
            names = of_each[0]
            if any(other != names for other in of_each):
                raise InputError(f"the two models have other labels ({', '.join(names)}; {', '.join(of_each[-1])})")
        case = cases[0]
        probabilities = np.stack([y.sigmoid().double().cpu().numpy() for y in logits])
        found.setdefault(
            case.id,
            Candidate(case.id, case.patient or case.id, case.label[0].double().cpu().numpy(), probabilities),
        )
    if not found:
        raise InputError(f"split {split!r} has no case")
    return names, list(found.values())


def shown_cases(
    contestants: Sequence[Contestant], split: str, limit: int | None, wanted: set[str]
) -> Iterator[tuple[str, dict[str, Case]]]:
    """The wanted cases once more: id, and contestant's name -> the case as that model sees it.

    Raises:
        InputError: A case does not come again.
    """
    left = set(wanted)
    for cases in _streams(contestants, split, limit):
        if cases[0].id in left:
            left.remove(cases[0].id)
            yield cases[0].id, {c.name: case for c, case in zip(contestants, cases, strict=True)}
        if not left:
            return
    if left:
        raise InputError(f"the data of {split!r} came without {sorted(left)[0]!r} at the second reading: pass a loader")
