"""Which organs each label may be read from, and the cells of the map's grid that this allows."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from camtrain._errors import InputError, nearest
from camtrain._grid import to_grid
from camtrain.anatomy._ids import narrowed, voxels_with
from camtrain.anatomy._rule_plan import RulePlan
from camtrain.anatomy.rules import Rule, shape_region
from camtrain.anatomy.table_file import check_sections, parse_groups, parse_organs, parse_rule, read_table

AT_ONCE = 2**22  # voxels x organs compared in one go: bounds the memory of tables with a hundred organs

Spacing = Sequence[float] | Tensor


class OrganTable:
    """Organs with their ids, and for each label the organs it may be read from.

    The arguments are the sections of the YAML file. Organs are brought to the map's grid one by one, so that a small
    organ beside a large one keeps its cells; labels only combine them, so that eighty labels cost what their organs
    cost. A rule's shape options (hull, close_mm, fill, minus, dilate_mm) act at the full resolution of the
    segmentation, once per distinct rule and case, on the CPU.

    Args:
        organs: Organ name -> id or ids in the segmentation.
        labels: Label -> list of organs or groups, `"anywhere"`, or a rule
            `{organs, hull, close_mm, fill, minus, dilate_mm}`.
        groups: Shorthands: group name -> organs or groups.
        ignore_unknown: Let ids that the table does not know pass in `check_ids`.

    Raises:
        InputError: Something in the table is wrong; the message names the entry.

    Example:
        >>> table = OrganTable(organs={"lung": 1, "heart": 2}, labels={"nodule": ["lung"], "stent": ["heart"]})
        >>> table.allowed(torch.tensor([[[1, 1, 1, 1, 0, 2, 0, 0]]]), size=(2,))
        tensor([[[ True, False],
                 [False,  True]]])
    """

    def __init__(
        self,
        organs: Mapping[str, int | Sequence[int]],
        labels: Mapping[str, Any],
        groups: Mapping[str, Sequence[str]] | None = None,
        ignore_unknown: bool = False,
    ) -> None:
        self._build({"organs": organs, "labels": labels, "groups": groups or {}, "ignore_unknown": ignore_unknown})

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | OrganTable) -> OrganTable:
        """Read a table.

        Args:
            source: Path of a YAML file, the name of a shipped table (`phantom`, `rad_chestct`, `rad_chestct_plain`,
                `ct_rate`, `totalsegmentator_chest`, `totalsegmentator_abdomen`), or a mapping with the sections of the
                YAML. A table is handed through.

        Returns:
            The table.

        Raises:
            InputError: No such file, no YAML, or something in the table is wrong; the message names source and entry.

        Example:
            >>> OrganTable.load("phantom").labels[:3]
            ['nodule', 'ground_glass', 'consolidation']
        """
        if isinstance(source, OrganTable):
            return source
        if isinstance(source, (str, Path)):
            return cls.__new__(cls)._build(read_table(source), f"organ table {source}")
        return cls.__new__(cls)._build(source)

    def _build(self, content: Any, where: str = "organ table") -> OrganTable:
        sections = check_sections(content, where)
        self._where = where
        self._organs = parse_organs(sections["organs"], where)
        self._groups = parse_groups(sections.get("groups") or {}, self._organs, where)
        self._entries = copy.deepcopy(dict(sections["labels"]))
        self._rules = {n: parse_rule(n, v, self._organs, self._groups, where) for n, v in self._entries.items()}
        self._ignore_unknown: bool = sections.get("ignore_unknown", False)
        self._plan = RulePlan.of([*self._rules.values()])
        return self

    def __repr__(self) -> str:
        return f"OrganTable({len(self._rules)} labels, {len(self._organs)} organs)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OrganTable) and self.to_dict() == other.to_dict() and self.labels == other.labels

    __hash__ = None  # type: ignore[assignment]

    @property
    def labels(self) -> list[str]:
        """Label names, in the order of the network's outputs."""
        return list(self._rules)

    @property
    def organs(self) -> dict[str, tuple[int, ...]]:
        """Organ name -> ids."""
        return dict(self._organs)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Group name -> organs or groups."""
        return dict(self._groups)

    @property
    def rules(self) -> dict[str, Rule]:
        """Label -> rule, groups resolved."""
        return dict(self._rules)

    @property
    def anywhere(self) -> tuple[bool, ...]:
        """For each label: may it be read from anywhere?"""
        return tuple(rule.anywhere for rule in self._rules.values())

    @property
    def needs_spacing(self) -> bool:
        """A rule has an option in mm, so that `allowed` needs `spacing`."""
        return any(rule.in_mm for rule in self._rules.values())

    def to_dict(self) -> dict[str, Any]:
        """The table as the YAML's sections; `OrganTable.load(table.to_dict())` gives an equal table.

        Example:
            >>> OrganTable(organs={"heart": 3}, labels={"stent": ["heart"]}).to_dict()
            {'organs': {'heart': 3}, 'labels': {'stent': ['heart']}}
        """
        content: dict[str, Any] = {"organs": {n: i[0] if len(i) == 1 else list(i) for n, i in self._organs.items()}}
        if self._groups:
            content["groups"] = {name: list(members) for name, members in self._groups.items()}
        content["labels"] = copy.deepcopy(self._entries)
        if self._ignore_unknown:
            content["ignore_unknown"] = True
        return content

    def select(self, names: Iterable[str]) -> OrganTable:
        """The table for these labels, in this order.

        Args:
            names: Label names, each once.

        Returns:
            A table with those labels and all organs.

        Raises:
            InputError: A label has no rule here, or is named twice.

        Example:
            >>> OrganTable.load("phantom").select(["aneurysm", "nodule"]).labels
            ['aneurysm', 'nodule']
        """
        names = list(names)
        for name in names:
            if name not in self._rules:
                raise InputError(
                    f"{self._where}: label {name!r} has no rule{nearest(name, self._rules)}: "
                    "add it under labels, with its organs or 'anywhere'"
                )
            if names.count(name) > 1:
                raise InputError(f"{self._where}: expected each label once, got {name!r} {names.count(name)} times")
        if not names:
            raise InputError(f"{self._where}: expected at least one label to select, got none")
        content = {**self.to_dict(), "labels": {name: self._entries[name] for name in names}}
        return OrganTable.__new__(OrganTable)._build(content, self._where)

    def check_ids(self, organs: Tensor) -> None:
        """Check that the table knows every id of a segmentation; for data modules, once per case.

        Args:
            organs: Integer ids of any shape, 0 = background.

        Raises:
            InputError: An id has no organ in the table (unless it has `ignore_unknown: true`), or is no whole number.

        Example:
            >>> OrganTable.load("phantom").check_ids(torch.tensor([[[0, 1, 6]]]))
        """
        found: list[int] = torch.unique(_whole(organs)).tolist()
        known = {0, *(i for ids in self._organs.values() for i in ids)}
        unknown = [i for i in found if i not in known]
        if unknown and not self._ignore_unknown:
            listed = ", ".join(map(str, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
            raise InputError(
                f"{self._where}: the segmentation holds ids that belong to no organ of the table: {listed} "
                f"(known: {_ranges(known - {0})}); add them under organs, or set ignore_unknown: true"
            )

    def compose_ids(self, names: Iterable[str]) -> dict[str, int]:
        """Ids with which a folder of binary organ files becomes one volume.

        Args:
            names: File stems, such as `lung_upper_lobe_left`.

        Returns:
            Name -> id to write (an organ's first), in the order of `names`; with `ignore_unknown` other names are
            left out.

        Raises:
            InputError: A name is no organ of the table.

        Example:
            >>> OrganTable.load("phantom").compose_ids(["heart", "spine"])
            {'heart': 3, 'spine': 6}
        """
        composed: dict[str, int] = {}
        for name in names:
            if name in self._organs:
                composed[name] = self._organs[name][0]
            elif not self._ignore_unknown:
                raise InputError(
                    f"{self._where}: no organ has the name of the file {name!r}{nearest(name, self._organs)}: "
                    "add it under organs, or set ignore_unknown: true"
                )
        return composed

    @torch.no_grad()
    def allowed(
        self,
        organs: Tensor,
        size: Sequence[int] | None = None,
        mode: str = "fill",
        spacing: Spacing | None = None,
        allowed_organs: Tensor | None = None,
    ) -> Tensor:
        """Cells that each label may use.

        Args:
            organs: (B, 1, *S) integer ids, 0 = background. Ids are not checked here, see `check_ids`.
            size: Cells along each axis, `maps.shape[2:]`; None keeps the resolution of `organs`.
            mode: How an organ's voxels become cells: `fill`, `nearest`, `trilinear`, `any`; see `camtrain._grid`.
            spacing: Voxel size in mm, one number per axis or (B, axes); needed by options in mm only.
            allowed_organs: (B, L, O) bool, organs in the order of `self.organs`: which of a rule's organs hold in this
                case, where a report says more than the table (the left lung). `anywhere` is not narrowed down.

        Returns:
            (B, L, *S') bool on the device of `organs`. A label whose organs are all missing has no True cell.

        Raises:
            InputError: `organs` is no (B, 1, *S) tensor of whole ids, a size, mode or spacing does not fit, a rule
                has options in mm and there is no spacing, or `allowed_organs` has another shape.

        Example:
            >>> organs = torch.zeros(2, 1, 16, 16, 16, dtype=torch.int32)
            >>> OrganTable.load("phantom").allowed(organs, size=(4, 4, 4)).shape
            torch.Size([2, 8, 4, 4, 4])
        """
        ids = narrowed(_volume(organs))
        grid = tuple(ids.shape[2:] if size is None else size)
        steps = self._steps(spacing, ids)
        if allowed_organs is None:
            return self._regions(ids, self._plan, grid, mode, steps)
        parts = [
            self._regions(ids[b : b + 1], RulePlan.of(rules), grid, mode, steps and steps[b : b + 1])
            for b, rules in enumerate(self._narrowed(allowed_organs, len(ids)))
        ]
        return torch.cat(parts)

    def _narrowed(self, allowed_organs: Tensor, cases: int) -> list[list[Rule | None]]:
        """For each case the rules of all labels, with the organs that hold in it; None = no organ is left."""
        wanted = (cases, len(self._rules), len(self._organs))
        if tuple(allowed_organs.shape) != wanted:
            raise InputError(
                f"{self._where}: expected allowed_organs of shape {wanted}, one bool for each case, label and organ of "
                f"the table, got {tuple(allowed_organs.shape)}: keep the order of table.labels and table.organs"
            )
        rows: list[list[list[bool]]] = allowed_organs.bool().tolist()
        return [
            [
                rule.only({name for name, may in zip(self._organs, told, strict=True) if may})
                for rule, told in zip(self._rules.values(), row, strict=True)
            ]
            for row in rows
        ]

    def _regions(
        self, ids: Tensor, plan: RulePlan, grid: tuple[int, ...], mode: str, steps: list[list[float]] | None
    ) -> Tensor:
        """(B, L, *S') of one rule per label, each distinct one made once."""
        regions = self._combined(ids, plan, grid, mode)
        for index, rule in enumerate(plan.rules):
            if rule.anywhere:
                regions[:, index] = True
            elif rule.shaped:
                regions[:, index] = self._shaped(ids, rule, grid, mode, steps)
        if plan.columns == range(len(plan.rules)):
            return regions
        if len(plan.rules) in plan.columns:
            regions = torch.cat([regions, regions.new_zeros((len(ids), 1, *grid))], dim=1)
        return regions[:, plan.columns]

    def _combined(self, ids: Tensor, plan: RulePlan, grid: tuple[int, ...], mode: str) -> Tensor:
        """(B, R, *S'): for rules that are plain lists, the union of their organs' cells; False for the others."""
        member = plan.member.to(ids.device)
        regions = torch.zeros((len(ids), len(plan.rules), *grid), dtype=torch.bool, device=ids.device)
        step = max(1, AT_ONCE // max(1, ids.numel()))
        for start in range(0, len(plan.names), step):
            part = slice(start, start + step)
            voxels = [self._voxels(ids, name) for name in plan.names[part]]
            # One organ at a time is what large volumes come as: no second copy of it.
            cells = to_grid(torch.cat(voxels, dim=1) if len(voxels) > 1 else voxels[0], grid, mode)
            # A sum of zeros and ones is above zero in any precision: this is a union, whatever autocast does.
            hits = member[:, part].float() @ cells.flatten(2).float() > 0
            regions |= hits.reshape(regions.shape)
        return regions

    def _shaped(
        self, ids: Tensor, rule: Rule, grid: tuple[int, ...], mode: str, steps: list[list[float]] | None
    ) -> Tensor:
        volumes: Any = ids[:, 0].cpu().numpy()
        shaped = np.stack(
            [shape_region(v, rule, self._organs, steps[b] if steps else None) for b, v in enumerate(volumes)]
        )
        region = torch.from_numpy(shaped)[:, None].to(ids.device)
        # The organs' own share is brought down organ by organ too, so that a small one beside a large one stays.
        cells = to_grid(region, grid, mode)
        for name in rule.organs:
            cells = cells | to_grid(self._voxels(ids, name) & region, grid, mode)
        return cells[:, 0]

    def _voxels(self, ids: Tensor, name: str) -> Tensor:
        first, *others = self._organs[name]
        voxels = voxels_with(ids, first)
        for other in others:
            voxels |= voxels_with(ids, other)
        return voxels

    def _steps(self, spacing: Spacing | None, ids: Tensor) -> list[list[float]] | None:
        """Spacing as one list per case, or None where no rule asks for it."""
        if not self.needs_spacing:
            return None
        if spacing is None:
            label = next(name for name, rule in self._rules.items() if rule.in_mm)
            raise InputError(
                f"{self._where}: mm options need an affine/spacing, and label {label!r} has one: "
                "put 'affine' (B, 4, 4) into the batch, or pass spacing="
            )
        rows = torch.as_tensor(spacing, dtype=torch.float64).cpu()
        wanted = (len(ids), ids.ndim - 2)
        if rows.shape not in (wanted, wanted[1:]) or not all(0 < s < math.inf for s in rows.flatten().tolist()):
            raise InputError(f"spacing= expects {wanted[1]} lengths in mm, or {wanted} of them, got {spacing!r}")
        listed: list[list[float]] = rows.expand(wanted).tolist()
        return listed


def _volume(organs: Tensor) -> Tensor:
    if organs.ndim < 3 or organs.shape[1] != 1:
        raise InputError(f"expected organs of shape (B, 1, *S), one channel of integer ids, got {tuple(organs.shape)}")
    return _whole(organs)


def _whole(organs: Tensor) -> Tensor:
    organs = organs.as_subclass(Tensor)
    if not organs.is_floating_point():
        return organs
    if bool((organs != organs.round()).any()):
        raise InputError(
            "organs hold values that are no whole ids, as a linear resampling leaves them: "
            "resample organs with mode='nearest'"
        )
    return organs.long()


def _ranges(ids: set[int]) -> str:
    """Ids in short: 1-3, 7."""
    runs: list[list[int]] = []
    for i in sorted(ids):
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
