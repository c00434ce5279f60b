"""Truths that a composite does not show: OutsideSwap tells, the mask loss of the same step leaves them out."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_now: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()


@contextmanager
def leaving_out(trainer: Any, pairs: Tensor) -> Iterator[None]:
    """For the time of a step: these (B, L) truths are not known."""
    before = _now.get(trainer)
    _now[trainer] = pairs if before is None else before | pairs
    try:
        yield
    finally:
        if before is None:
            _now.pop(trainer, None)
        else:
            _now[trainer] = before


def known_truths(trainer: Any, label: Tensor) -> Tensor:
    """(B, L) labels of this step, NaN where they are left out."""
    pairs = _now.get(trainer)
    return label if pairs is None else label.masked_fill(pairs.to(label.device), torch.nan)
