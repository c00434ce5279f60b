"""A label's rule: which organs, and what is done to their shape. Pure data, and how it acts on one case."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from camtrain.anatomy.morphology import Region, close, convex_hull, dilate, fill_holes

Ids = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rule:
    """Where a label may be read; two labels with equal rules share one computation.

    The options act in the order of the fields. `units` matter to `hull` alone: every unit has a hull of its own.
    A unit is one entry of the YAML's organ list, where a group stands for its members: `[lungs]` with
    `lungs: [lung_left, lung_right]` makes two hulls, one per lung, also when `lung_left` is itself a group of lobes.

    Attributes:
        units: Organ names of each unit; empty for `anywhere`.
        hull: Replace every unit by its convex hull.
        close_mm: Radius of a closing of the union, mm.
        fill: Fill the holes of the union.
        minus: Organ names taken out.
        dilate_mm: Grow the result by so many mm (into what `minus` took out, too: the pleura touches the heart).
    """

    units: tuple[tuple[str, ...], ...] = ()
    hull: bool = False
    close_mm: float = 0.0
    fill: bool = False
    minus: tuple[str, ...] = ()
    dilate_mm: float = 0.0

    @property
    def organs(self) -> tuple[str, ...]:
        """Names of all organs of the rule, each once."""
        return tuple(dict.fromkeys(name for unit in self.units for name in unit))

    @property
    def anywhere(self) -> bool:
        """No constraint at all."""
        return not self.units

    @property
    def in_mm(self) -> bool:
        """An option of the rule is a length: it needs the voxel spacing."""
        return self.close_mm > 0 or self.dilate_mm > 0

    @property
    def shaped(self) -> bool:
        """The rule changes the shape of its organs, at the full resolution of the segmentation."""
        return self.hull or self.fill or bool(self.minus) or self.in_mm

    def only(self, names: Container[str]) -> Rule | None:
        """The rule with some of its organs, as a report narrows it down; `anywhere` stays what it is.

        Args:
            names: Organs that may be used.

        Returns:
            A rule, or None where none of its organs may be used.

        Example:
            >>> Rule(units=(("left", "right"), ("heart",))).only(["right"]).units
            (('right',),)
        """
        if self.anywhere:
            return self
        kept = tuple(some for unit in self.units if (some := tuple(name for name in unit if name in names)))
        return replace(self, units=kept) if kept else None


def shape_region(organs: NDArray[np.integer], rule: Rule, ids: Ids, spacing: Sequence[float] | None) -> Region:
    """The region of one rule in one case, at full resolution.

    Args:
        organs: (*S) integer ids.
        rule: A rule with `units`.
        ids: Organ name -> ids.
        spacing: Size of a voxel along each axis in mm; None will do for rules without lengths.

    Returns:
        (*S) bool.

    Example:
        >>> rule = Rule(units=(("lung",),), hull=True, minus=("heart",))
        >>> shape_region(np.array([0, 1, 0, 2, 1, 0]), rule, {"lung": (1,), "heart": (2,)}, None).astype(int)
        array([0, 1, 1, 0, 1, 0])
    """
    units = [np.isin(organs, [i for name in unit for i in ids[name]]) for unit in rule.units]
    region: Region = np.logical_or.reduce([convex_hull(unit) for unit in units] if rule.hull else units)
    if rule.close_mm and spacing is not None:
        region = close(region, rule.close_mm, spacing)
    if rule.fill:
        region = fill_holes(region)
    if rule.minus:
        region = region & ~np.isin(organs, [i for name in rule.minus for i in ids[name]])
    if rule.dilate_mm and spacing is not None:
        region = dilate(region, rule.dilate_mm, spacing)
    return region


def spacing_of(affine: Tensor) -> Tensor:
    """Size of a voxel along each axis, from voxel-to-world matrices.

    Args:
        affine: (B, 4, 4), voxel to world in mm.

    Returns:
        (B, 3) mm.

    Example:
        >>> import torch
        >>> spacing_of(torch.diag(torch.tensor([-0.8, 0.8, 2.5, 1.0]))[None])
        tensor([[0.8000, 0.8000, 2.5000]])
    """
    return affine[:, :-1, :-1].square().sum(dim=1).sqrt()
