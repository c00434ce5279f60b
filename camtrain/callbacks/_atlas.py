"""Where the organs of a rule usually lie, for cases that were not segmented."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.callbacks._regions import Regions

SHARE = 0.1
"""A voxel belongs to a rule's usual region where at least this share of the segmented cases has it."""
MOST = 2**15 - 1  # counts are int16: thirty rules of 128^3 take 125 MB then


class RegionAtlas:
    """Counts, over the first epoch, how often each voxel lies in the region of each rule; then it stands.

    It takes the grid of the batch as it is: images must be of one shape, and about aligned.

    Args:
        rules: R.
    """

    def __init__(self, rules: int) -> None:
        self._rules = rules
        self._counts: Tensor | None = None
        self._cases = 0
        self._fixed: Tensor | None = None

    @property
    def known(self) -> bool:
        """Has a segmented case been seen?"""
        return self._fixed is not None or self._cases > 0

    def add(self, regions: Regions, has_organs: Tensor, size: tuple[int, ...]) -> None:
        """Count the cases of a batch.

        Args:
            regions: Of the rules, the B cases first.
            has_organs: (B,) bool.
            size: *S.

        Raises:
            InputError: Another shape than before.
        """
        seen = self._fixed if self._fixed is not None else self._counts
        if seen is not None and tuple(seen.shape[1:]) != size:
            raise InputError(
                f"without_organs='atlas' expects images of one shape, {tuple(seen.shape[1:])} so far, got {size}: crop "
                "or resample all to one size, or take 'lend'"
            )
        if self._counts is None and self._fixed is None:
            self._counts = torch.zeros(self._rules, *size, dtype=torch.int16, device=has_organs.device)
        rows = has_organs.nonzero().flatten()
        if self._counts is None or not len(rows) or self._cases + len(rows) > MOST:
            return
        for rule in range(self._rules):
            self._counts[rule] += regions.of(rule, rows)[:, 0].sum(dim=0, dtype=torch.int16)
        self._cases += len(rows)

    def region(self, rule: int) -> Tensor:
        """(1, *S) bool, the usual region of a rule."""
        if self._fixed is not None:
            return self._fixed[rule][None]
        assert self._counts is not None  # noqa: S101 - `add` comes first
        return (self._counts[rule] >= max(1.0, SHARE * self._cases))[None]

    def fix(self, total: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Count no more, once every process has counted; `total` sums a tensor over all (all must call it together)."""
        if self._fixed is not None:
            return
        waits = total(torch.tensor(float(not self.known), device=device))
        cases = total(torch.tensor(float(self._cases), device=device))
        if float(waits) or self._counts is None:
            return
        self._fixed = total(self._counts.float()) >= max(1.0, SHARE * float(cases))
        self._counts = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps once the regions stand: their bits and their shape."""
        if self._fixed is None:
            return {}
        return {
            "bits": torch.from_numpy(np.packbits(self._fixed.cpu().numpy())),
            "shape": list(self._fixed.shape),
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on with the regions of an earlier run; those of another table are left alone."""
        if state and state["shape"][0] == self._rules:
            shape = state["shape"]
            bits = np.unpackbits(state["bits"].cpu().numpy(), count=int(np.prod(shape)))
            self._fixed = torch.from_numpy(bits.reshape(shape).astype(bool)).to(device)
