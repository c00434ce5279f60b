"""Which (sample, label) pairs take part in the mask loss, and which of their cells are forbidden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from camtrain.losses.forms import Cells, Form

Labels = Literal["all", "present"]


@dataclass(frozen=True)
class Truths:
    """What is known of each (sample, label) pair of a batch.

    Attributes:
        present: (B, L) bool, the finding is there.
        absent: (B, L) bool, the finding is known not to be there.
        region: (B, L) bool, the label has an allowed cell in this sample.
        segmented: (B, 1) bool, the sample has organs.
        usable: (B, L) bool, the sample has organs and the map was computed.
    """

    present: Tensor
    absent: Tensor
    region: Tensor
    segmented: Tensor
    usable: Tensor

    @classmethod
    def read(cls, allowed: Tensor, label: Tensor, has_organs: Tensor | None, selected: Tensor) -> Truths:
        """Read them off the batch, without looking at a value from the host.

        Args:
            allowed: (B, L, N) bool.
            label: (B, L): 1 present, 0 absent, anything else unknown.
            has_organs: (B,) bool; None: a sample with nothing allowed for any label has none.
            selected: (B, L) bool, the map was computed.

        Returns:
            The truths.

        Example:
            >>> allowed = torch.tensor([[[True, False]], [[False, False]]])
            >>> truths = Truths.read(allowed, torch.ones(2, 1), None, torch.tensor([[True], [True]]))
            >>> truths.usable.tolist()
            [[True], [False]]
        """
        region = allowed.any(-1)
        segmented = region.any(1, keepdim=True) if has_organs is None else has_organs.bool()[:, None]
        return cls(label == 1, label == 0, region, segmented, selected & segmented)

    def counts(self) -> Tensor:
        """What is left out.

        Returns:
            (3,) whole numbers: unknown labels, cases without organs, present labels without a region.
        """
        unknown = (~(self.present | self.absent)).sum()
        return torch.stack([unknown, (~self.segmented).sum(), (self.present & self.usable & ~self.region).sum()])


def gather(maps: Tensor, allowed: Tensor, truths: Truths, form: Form, labels: Labels, factor: float) -> Cells:
    """The pairs that take part, their forbidden cells and their scaled maps.

    Args:
        maps: (B, L, N) float, signed.
        allowed: (B, L, N) bool.
        truths: What is known of the pairs.
        form: Says what an absent label forbids.
        labels: Which truths take part.
        factor: Scale of the maps.

    Returns:
        The cells; pairs without a forbidden one take no part.

    Example:
        >>> from camtrain.losses.forms import FORMS
        >>> maps, allowed = torch.ones(1, 2, 2), torch.tensor([[[True, False], [True, False]]])
        >>> truths = Truths.read(allowed, torch.tensor([[1.0, 0.0]]), None, torch.ones(1, 2, dtype=torch.bool))
        >>> gather(maps, allowed, truths, FORMS["softplus"], "all", 1.0).forbidden.tolist()
        [[[False, True], [True, True]]]
    """
    pairs = truths.present & truths.region
    if labels == "all" and form.absent != "nothing":
        pairs = pairs | (truths.absent & truths.region if form.absent == "outside" else truths.absent)
    pairs = pairs & truths.usable
    # Where an absent label forbids everything, only a present one is sheltered by its organs.
    shelter = allowed & truths.present[..., None] if form.absent == "everything" else allowed
    forbidden = pairs[..., None] & ~shelter
    pairs = forbidden.any(-1)
    # Selected before any arithmetic: a NaN of a pair that was not computed must not reach value or gradient.
    maps = torch.where(pairs[..., None], maps, 0.0)
    return Cells(maps if factor == 1 else maps * factor, forbidden, pairs)
