"""The result of a sanity check: rows for a CSV file, means, verdicts, and how it prints."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from camtrain._errors import InputError

HEAD_LIMIT = 0.7
"""Strength that fails a method once the head alone is random: maps of heads that share nothing stay far below it."""
ALL_LIMIT = 0.5
"""Strength that fails a method once all weights are random; on coarse grids unrelated maps reach 0.3 by chance."""
ALL_SIGNED_LIMIT = 0.3
"""|mean Spearman| that fails it there: chance has no sign, so this mean comes nearer to 0 than the strength does."""
# Above this rate of undefined pairs the others are no sample of all.
_MOSTLY = 0.5


class Likeness(NamedTuple):
    """How alike the maps of P pairs are before and after; NaN in all three where one is undefined.

    Attributes:
        spearman: (P,).
        spearman_abs: (P,).
        ssim: (P,).
    """

    spearman: Tensor
    spearman_abs: Tensor
    ssim: Tensor


@dataclass(frozen=True)
class SanityRow:
    """One stage, method, layer and label. Means are over the cases (and draws) whose likeness is defined.

    Attributes:
        stage: How many modules have lost their weights.
        module: The last of them.
        share: Part of the weights' values that are random.
        method: With the options that were given.
        control: Is it there because it is known to fail?
        layer: Where the maps are from.
        label: Name; "all" in means over labels.
        n: Pairs that were compared: cases in which the label is explained, times draws.
        undefined: Rate of pairs without a likeness: a map before or after is constant. They are in no mean.
        spearman: Mean rank correlation of the signed maps; NaN where nothing is defined.
        spearman_std: Its standard deviation over pairs.
        strength: Mean of |rank correlation|: a map that comes back with the other sign has not changed.
        spearman_abs: Mean rank correlation of the absolute maps.
        spearman_abs_std: Its standard deviation.
        ssim: Mean structural similarity of the absolute maps.
        ssim_std: Its standard deviation.
    """

    stage: int
    module: str
    share: float
    method: str
    control: bool
    layer: str
    label: str
    n: int
    undefined: float
    spearman: float
    spearman_std: float
    strength: float
    spearman_abs: float
    spearman_abs_std: float
    ssim: float
    ssim_std: float


@dataclass(frozen=True)
class Verdict:
    """Does a method depend on the weights?

    Attributes:
        method: With the options that were given.
        layer: Where the maps are from.
        control: Is it there because it is known to fail?
        head: Strength after the head alone was randomised.
        all: Strength after all weights were.
        all_signed: Mean Spearman there.
        passed: None where more than half of the pairs are undefined: not known.
        why: In words.
    """

    method: str
    layer: str
    control: bool
    head: float
    all: float
    all_signed: float
    passed: bool | None
    why: str


@dataclass(frozen=True)
class SanityTable:
    """What `sanity_check` returns; prints as a table, with the verdicts below.

    Attributes:
        rows: A row per stage, method, layer and label.
        independent: Was one module randomised at a time?
    """

    rows: tuple[SanityRow, ...]
    independent: bool = False

    def means(self) -> tuple[SanityRow, ...]:
        """The rows averaged over labels, every pair alike, with the label "all"."""
        groups: dict[tuple[int, str, str], list[SanityRow]] = {}
        for row in self.rows:
            groups.setdefault((row.stage, row.method, row.layer), []).append(row)
        return tuple(_joined(group) for group in groups.values())

    def verdicts(self) -> tuple[Verdict, ...]:
        """A verdict per method and layer.

        A method passes when the strength is under `HEAD_LIMIT` after the head alone was randomised, and, after all
        weights were, under `ALL_LIMIT` with a mean Spearman between plus and minus `ALL_SIGNED_LIMIT`. It is not known
        where more than half of the pairs are undefined.

        Raises:
            InputError: Modules were randomised one at a time, or the head alone was not among the stages.
        """
        means = self.means()
        stages = {row.stage for row in means}
        if self.independent or 1 not in stages:
            raise InputError(
                "verdicts need the cascade from the head alone to all weights: use independent=False and stages=None, "
                "or 2 and more"
            )
        last = max(stages)
        first = {(row.method, row.layer): row for row in means if row.stage == 1}
        return tuple(_verdict(first[row.method, row.layer], row) for row in means if row.stage == last)

    def powerless(self) -> tuple[str, ...]:
        """Controls that did not fail: about the layers and cases asked for, the test then says little."""
        return tuple(v.method for v in self.verdicts() if v.control and v.passed is not False)

    def as_csv(self) -> str:
        """All rows as CSV; undefined numbers are empty.

        Example:
            >>> SanityTable(()).as_csv().split(",")[:3]
            ['stage', 'module', 'share']
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(field.name for field in fields(SanityRow))
        for row in self.rows:
            values = asdict(row).values()
            writer.writerow("" if isinstance(value, float) and math.isnan(value) else value for value in values)
        return text.getvalue()

    def __rich__(self) -> RenderableType:
        """A line per stage, method and layer, then the verdicts."""
        parts: list[RenderableType] = [_stages(self.means())]
        if self.rows and not self.independent and any(row.stage == 1 for row in self.rows):
            parts += [_verdicts(self.verdicts()), _power(self)]
        return Group(*parts)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=100)
        with console.capture() as said:
            console.print(self)
        return said.get()


def label_rows(
    place: tuple[int, str, float],
    draws: Sequence[Mapping[tuple[str, str], Likeness]],
    pairs: Tensor,
    names: Sequence[str],
    controls: Collection[str],
) -> list[SanityRow]:
    """Rows of one stage.

    Args:
        place: Number, module and share of the stage.
        draws: Per draw: (method, layer) -> likeness of all pairs.
        pairs: (B, L) bool, whose True cells are the pairs, row by row.
        names: Label names.
        controls: Methods that are controls.
    """
    number, module, share = place
    columns = pairs.nonzero()[:, 1].cpu()
    rows = []
    for method, layer in draws[0]:
        three = torch.stack([torch.stack(tuple(draw[method, layer])) for draw in draws]).double()
        for column in torch.unique(columns).tolist():
            mine = three[:, :, columns == column].transpose(1, 2).flatten(0, 1)  # (draws x cases, 3)
            good = mine[~mine.isnan().any(dim=1)]
            rho, absolute, structure = _mean_std(good)
            rows.append(
                SanityRow(
                    stage=number,
                    module=module or "(the model's own)",
                    share=share,
                    method=method,
                    control=method in controls,
                    layer=layer,
                    label=names[column],
                    n=len(mine),
                    undefined=1 - len(good) / len(mine),
                    spearman=rho[0],
                    spearman_std=rho[1],
                    strength=_mean_std(good[:, :1].abs())[0][0],
                    spearman_abs=absolute[0],
                    spearman_abs_std=absolute[1],
                    ssim=structure[0],
                    ssim_std=structure[1],
                )
            )
    return rows


def _mean_std(values: Tensor) -> list[tuple[float, float]]:
    """Mean and standard deviation (over N) of every column; NaN without rows."""
    if not len(values):
        return [(math.nan, math.nan)] * values.shape[1]
    return list(zip(values.mean(dim=0).tolist(), values.std(dim=0, correction=0).tolist(), strict=True))


def _joined(rows: Sequence[SanityRow]) -> SanityRow:
    """The rows of several labels as one."""
    total = sum(row.n for row in rows)
    defined = [row.n * (1 - row.undefined) for row in rows]

    def mean(values: Iterable[float]) -> float:
        pooled = [(value, weight) for value, weight in zip(values, defined, strict=True) if weight > 0]
        return sum(v * w for v, w in pooled) / sum(w for _, w in pooled) if pooled else math.nan

    def std(name: str) -> float:
        squares = mean(getattr(row, name) ** 2 + getattr(row, f"{name}_std") ** 2 for row in rows)
        return math.sqrt(max(0.0, squares - mean(getattr(row, name) for row in rows) ** 2))

    first = rows[0]
    return SanityRow(
        first.stage, first.module, first.share, first.method, first.control, first.layer, "all", total,
        max(0.0, 1 - sum(defined) / total),
        mean(row.spearman for row in rows), std("spearman"), mean(row.strength for row in rows),
        mean(row.spearman_abs for row in rows), std("spearman_abs"), mean(row.ssim for row in rows), std("ssim"),
    )  # fmt: skip


def _verdict(head: SanityRow, last: SanityRow) -> Verdict:
    wrong = [
        text
        for text, value, limit in (
            (f"strength {head.strength:.2f} with a random head", head.strength, HEAD_LIMIT),
            (f"strength {last.strength:.2f} with random weights", last.strength, ALL_LIMIT),
            (f"Spearman {last.spearman:+.2f} with random weights", abs(last.spearman), ALL_SIGNED_LIMIT),
        )
        if value >= limit
    ]
    blank = max(head.undefined, last.undefined)
    passed = None if blank > _MOSTLY else not wrong
    why = f"{blank:.0%} of the maps are constant" if passed is None else ", ".join(wrong) or "changes with the weights"
    return Verdict(head.method, head.layer, head.control, head.strength, last.strength, last.spearman, passed, why)


def _stages(rows: Sequence[SanityRow]) -> Table:
    title = "Maps of two models" if all(row.stage == 0 for row in rows) else "Maps before and after randomising"
    table = Table(title=f"{title} (rho: rank correlation)", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("method, layer", overflow="fold")
    for column in ("n", "undef.", "rho", "strength", "rho |map|", "SSIM"):
        table.add_column(column, justify="right", no_wrap=True)
    shown = 0
    for row in rows:
        if row.stage != shown:
            table.add_section()
            table.add_row(Text(f"{row.stage} {row.module} ({row.share:.0%})", style="bold"))
        shown = row.stage
        numbers = (
            _number(row.spearman, "+.2f"),
            _number(row.strength, ".2f"),
            _number(row.spearman_abs, "+.2f"),
            _number(row.ssim, "+.2f"),
        )
        table.add_row(Text(f"  {_title(row)}, {row.layer}"), str(row.n), f"{row.undefined:.0%}", *numbers)
    return table


def _verdicts(verdicts: Iterable[Verdict]) -> Table:
    table = Table("method, layer", "verdict", "why", title="Do the maps depend on the weights?", box=box.SIMPLE)
    for one in verdicts:
        word = {True: "passes", False: "fails", None: "not known"}[one.passed]
        table.add_row(Text(f"{_title(one)}, {one.layer}"), word, one.why)
    return table


def _title(of: SanityRow | Verdict) -> str:
    return f"{of.method}*" if of.control else of.method


def _power(table: SanityTable) -> str:
    if not any(row.control for row in table.rows):
        return "No control: whether this test can fail a method is not known."
    if weak := table.powerless():
        return f"* control, known to fail. {', '.join(weak)} did not fail here, so passing says little."
    return "* control, known to fail, and it did: the test has power here."


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
