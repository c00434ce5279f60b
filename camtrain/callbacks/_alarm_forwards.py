"""What the alarms `reliance` and `depth` ask of a network: forwards of a few fixed cases, without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from camtrain.anatomy import OrganTable, spacing_of
from camtrain.anatomy.sides import AT_ONCE
from camtrain.callbacks._fixed_cases import FixedCase, FixedCases, rule_to_ask
from camtrain.callbacks._pulls import Pulls, chunks, questions
from camtrain.cam.asked import Asked
from camtrain.cam.engine import Reshape
from camtrain.cam.fusing import fused
from camtrain.cam.method_table import find_method
from camtrain.cam.question import WantedLayer
from camtrain.cam.rerun import Rerun
from camtrain.metrics import EnergyInside

Around = Callable[[], AbstractContextManager[Any]]
CHUNK = 8  # images per forward, fewer where they are large


@dataclass(frozen=True, eq=False)
class Stack:
    """Some fixed cases of one shape, on the device of the network.

    Attributes:
        ids: B names.
        image: (B, C, *S) in the dtype that the network got.
        organs: (B, 1, *S).
        label: (B, L), NaN = unknown or not to be asked about.
        spacing: (B, axes) in mm, or None.
    """

    ids: list[str]
    image: Tensor
    organs: Tensor
    label: Tensor
    spacing: Tensor | None


def stacks(cases: FixedCases, table: OrganTable, like: Tensor) -> Iterator[Stack]:
    """The fixed cases a few at a time, each with the labels of the one rule that it is asked about.

    Args:
        cases: The cases.
        table: Rules of all labels.
        like: An image of the network's own step: where, and in which dtype, it wants them.
    """
    listed = list(cases)
    groups = rule_groups(table)
    asked = rule_to_ask([case.label for case in listed], groups)
    by_shape: dict[tuple[int, ...], list[tuple[FixedCase, Tensor]]] = {}
    for case, group in zip(listed, asked, strict=True):
        if group >= 0:
            label = torch.full_like(case.label, torch.nan)
            label[groups[group]] = case.label[groups[group]]
            by_shape.setdefault(tuple(case.image.shape), []).append((case, label))
    for shape, rows in by_shape.items():
        size = torch.Size(shape).numel() * like.element_size()
        chunk = max(1, min(CHUNK, AT_ONCE // size))
        for start in range(0, len(rows), chunk):
            yield _stack(rows[start : start + chunk], table, like)


def rule_groups(table: OrganTable) -> list[list[int]]:
    """Columns of the labels of each rule that has an outside."""
    groups: dict[object, list[int]] = {}
    for column, rule in enumerate(table.rules.values()):
        if not rule.anywhere:
            groups.setdefault(rule, []).append(column)
    return list(groups.values())


def measure_pulls(
    rerun: Rerun,
    cases: FixedCases,
    table: OrganTable,
    replacement: str,
    margin: float,
    turn: int,
    before: Mapping[str, Tensor],
    pulls: Pulls,
    around: Around,
) -> None:
    """Ask every case one question: two forwards each.

    Args:
        rerun: The network.
        cases: The cases; with `case` they lend each other their images.
        table: Rules of all labels.
        replacement: What comes in.
        margin: Share of each axis that still belongs to the organs.
        turn: How many checks have asked before.
        before: Case -> (L,) logits that this pass has seen of it; one that is missing costs a forward more.
        pulls: Where to count.
        around: The precision that the user's step runs in; for the forwards alone.

    Raises:
        InputError: What the table, the baseline or the network refuses.
    """
    like = rerun.call.image

    def said(images: Tensor) -> Tensor:
        with around():
            return rerun.on(images.to(like.dtype)).logits()

    asked = questions(cases, table, replacement, turn)
    largest = max((each.case.image.numel() for each in asked), default=1) * 4
    size = max(1, min(CHUNK, AT_ONCE // largest) // 2)
    for chunk in chunks(asked, table, replacement, margin, like.device, size):
        rows = said(torch.cat([image for _, *both in chunk for image in both]))
        for number, (one, *_) in enumerate(chunk):
            known = before.get(one.case.id)
            if known is None:
                known = said(one.case.image[None].to(like.device))[0]
            pulls.answer(one, known.to(rows), rows[2 * number], rows[2 * number + 1])


def measure_depth(
    rerun: Rerun,
    stack: Stack,
    table: OrganTable,
    last: Asked,
    mid: WantedLayer,
    method: str,
    mode: str,
    reshape: Reshape | None,
    metrics: Mapping[str, EnergyInside],
    around: Around,
) -> None:
    """Count one stack: maps of the present labels at the tapped layer, and by another method at the mid layer.

    Args:
        rerun: The network.
        stack: Images and what to ask.
        table: Rules of all labels.
        last: The monitor's first method.
        mid: The mid layer.
        method: What makes its maps.
        mode: How regions come down to a grid.
        reshape: Makes (B, K, *S') of the tapped layer's output.
        metrics: `last` and `mid` -> where to count.
        around: The precision that the user's step runs in; for the forwards alone.

    Raises:
        InputError: What a method refuses.
    """
    present = stack.label == 1
    ran = rerun.on(stack.image)
    for key, row, options, layers, shape in (
        ("last", last.row, last.options, rerun.layers, reshape),
        ("mid", find_method(method), {}, (mid,), None),
    ):
        with around():
            found = ran.on(stack.image, layers).maps(row, options, present, shape)
        if found is not None:
            maps = fused(found)
            allowed = table.allowed(stack.organs, size=maps.shape[2:], mode=mode, spacing=stack.spacing)
            metrics[key].update(maps, allowed.to(maps.device), torch.where(present, 1.0, torch.nan))


def depth_values(metrics: Mapping[str, EnergyInside], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Energy inside at both layers, and the chance level at the mid one (all processes together)."""
    found = {
        "mid_energy_inside": metrics["mid"].averaged("none"),
        "mid_energy_inside_chance": metrics["mid"].chance("none"),
        "last_energy_inside": metrics["last"].averaged("none"),
    }
    return {measure: _finite(values, names) for measure, values in found.items()}


def _finite(values: Tensor, names: Sequence[str]) -> dict[str, float]:
    kept = zip(names, values.double().cpu().tolist(), strict=True)
    return {name: value for name, value in kept if value == value and abs(value) != float("inf")}


def _stack(rows: Sequence[tuple[FixedCase, Tensor]], table: OrganTable, like: Tensor) -> Stack:
    affines = [case.affine for case, _ in rows]
    known = [affine for affine in affines if affine is not None]
    spacing = spacing_of(torch.stack(known)) if table.needs_spacing and len(known) == len(rows) else None
    return Stack(
        ids=[case.id for case, _ in rows],
        image=torch.stack([case.image for case, _ in rows]).to(like.device, like.dtype),
        organs=torch.stack([case.organs for case, _ in rows]).to(like.device),
        label=torch.stack([label for _, label in rows]).to(like.device),
        spacing=spacing,
    )
