"""Augmentation of training cases: image and organs move together; in a mirrored patient the sides change names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Flip, RandAffined, RandomizableTransform, RandShiftIntensityd, Transform

from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable
from camtrain.anatomy.rules import Rule

_KEYS = ("image", "organs")
_SIDE = re.compile(r"(?<![a-z])(left|right)(?![a-z])", re.IGNORECASE)


def augmentation(table: OrganTable | None, augment: bool, mirror: float, dims: int = 3) -> list[Transform]:
    """Random transforms of training cases.

    Args:
        table: Organ names, for `mirror`.
        augment: Small rotations, scalings, shifts, and changes of brightness.
        mirror: Probability that a case is mirrored.
        dims: Spatial axes.

    Raises:
        InputError: `mirror` is no probability, or a label is bound to a side that has no partner.
    """
    steps: list[Transform] = []
    if not 0 <= mirror <= 1:
        raise InputError(f"mirror expects a probability from 0 to 1, got {mirror}: 0.5 is usual")
    if mirror:
        steps.append(Mirror(table, mirror))
    if augment:
        steps.append(
            RandAffined(
                _KEYS,
                prob=0.8,
                rotate_range=[np.pi / 24] * (3 if dims == 3 else 1),
                scale_range=[0.1] * dims,
                translate_range=[4] * dims,
                mode=("bilinear", "nearest"),
                padding_mode="zeros",
                allow_missing_keys=True,
            )
        )
        steps.append(RandShiftIntensityd("image", offsets=0.03, prob=0.5))
    return steps


class Mirror(RandomizableTransform):  # type: ignore[misc]
    """Mirror a patient: right becomes left in the image, and in the names of organs and findings as well.

    The image and the organs are flipped along the first axis. An organ with a side in its name takes the id of its
    partner (`lung_left` becomes `lung_right`), and the truths of findings with a side change places with those of their
    partners, so that every finding still lies in the organs of its rule. The affine follows: each voxel keeps its place
    in the scanner's world.

    Args:
        table: Organ names and ids, and the rules of the labels in their order; None = no organs, no sides.
        prob: Probability.

    Raises:
        InputError: A label is bound to a side, and no other label is its mirror image.
    """

    def __init__(self, table: OrganTable | None, prob: float = 0.5) -> None:
        RandomizableTransform.__init__(self, prob)
        self.ids = {} if table is None else mirrored_ids(table)
        self.order = None if table is None else mirrored_labels(table)
        self._flip = Flip(spatial_axis=0)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """A case as `ReadCase` gives it, mirrored or not."""
        case = dict(data)
        self.randomize(None)
        return self.mirrored(case) if self._do_transform else case

    def mirrored(self, case: dict[str, Any]) -> dict[str, Any]:
        """The mirror image of a case."""
        case["image"] = self._flip(case["image"])
        if "organs" in case:
            flipped = self._flip(case["organs"])
            case["organs"] = MetaTensor(exchange(flipped.as_tensor(), self.ids), affine=flipped.affine)
        if self.order is not None:
            case["label"] = case["label"][..., list(self.order)]
        return case


def exchange(organs: torch.Tensor, ids: Mapping[int, int]) -> torch.Tensor:
    """Ids with those of other organs in their place.

    Example:
        >>> exchange(torch.tensor([0, 1, 2, 3]), {1: 2, 2: 1})
        tensor([0, 2, 1, 3])
    """
    result = organs.clone()
    for one, other in ids.items():
        result[organs == one] = other
    return result


def other_side(name: str) -> str:
    """A name with left and right exchanged.

    Example:
        >>> other_side("lung_upper_lobe_left"), other_side("Right atrium"), other_side("bright")
        ('lung_upper_lobe_right', 'Left atrium', 'bright')
    """

    def turned(match: re.Match[str]) -> str:
        word = match.group()
        swapped = "right" if word.lower() == "left" else "left"
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return _SIDE.sub(turned, name)


def mirrored_ids(table: OrganTable) -> dict[int, int]:
    """Id -> id of the organ on the other side, for organs that have one (a middle lobe has none and keeps its own)."""
    found: dict[int, int] = {}
    for name, ids in table.organs.items():
        partner = table.organs.get(other_side(name))
        if other_side(name) != name and partner is not None and len(partner) == len(ids):
            found |= dict(zip(ids, partner, strict=True))
    return found


def mirrored_labels(table: OrganTable) -> tuple[int, ...]:
    """For each label the column whose truth it takes in a mirrored patient.

    Raises:
        InputError: A label is bound to a side and has no partner; all of them are named.
    """
    rules = table.rules
    names = list(rules)
    order, alone = [], []
    for column, (name, rule) in enumerate(rules.items()):
        partner = other_side(name)
        wanted = _mirrored_rule(rule, table)
        if partner in rules and partner != name and _same(rules[partner], wanted):
            order.append(names.index(partner))
        else:
            order.append(column)
            if partner != name or not _same(rule, wanted):
                alone.append(name)
    if alone:
        raise InputError(
            f"mirror expects findings that lie on both sides, or with a partner for the other side whose organs mirror "
            f"theirs, got {', '.join(alone)}: set mirror to 0, or add the label of the other side"
        )
    return tuple(order)


def _mirrored_rule(rule: Rule, table: OrganTable) -> Rule:
    def turned(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(other_side(name) if other_side(name) in table.organs else name for name in names)

    return dataclasses.replace(rule, units=tuple(turned(unit) for unit in rule.units), minus=turned(rule.minus))


def _same(one: Rule, other: Rule) -> bool:
    """The same organs, in whatever order they are listed."""
    units = [sorted(tuple(sorted(unit)) for unit in rule.units) for rule in (one, other)]
    rest = [dataclasses.replace(rule, units=(), minus=tuple(sorted(rule.minus))) for rule in (one, other)]
    if not one.hull and not other.hull:  # Units matter to hulls alone.
        units = [[tuple(sorted(rule.organs))] for rule in (one, other)]
    return units[0] == units[1] and rest[0] == rest[1]
