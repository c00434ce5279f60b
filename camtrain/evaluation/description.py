"""A logit in words: what each organ's cells add, what comes from biases, which channels speak for and against it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

_LISTED = 5  # parts that a sentence names; the others are summed up


@dataclass(frozen=True, eq=False)
class ChannelPart:
    """What one channel adds to a logit.

    Attributes:
        index: Its number in the layer.
        name: What it responds to, None where that has no name.
        iou: Its overlap with the best concept.
        importance: Mean gradient, alpha of Grad-CAM.
        contribution: Sum over cells of activation x gradient; over all channels these add up to the cells' sum.
        activation: (*S') its response in this case; None in an average.
    """

    index: int
    name: str | None
    iou: float
    importance: float
    contribution: float
    activation: Tensor | None = None

    def __str__(self) -> str:
        name = "unnamed" if self.name is None else f"{self.name}, IoU {self.iou:.2f}"
        return f"ch {self.index} ({name}) {self.contribution:+.2g}"


@dataclass(frozen=True, eq=False, repr=False)
class Description:
    """What one label's logit is made of, for one case or averaged over the cases in which the label is present.

    Attributes:
        label: Name of the label.
        logit: `sum(by_organ) + bias + residual`.
        probability: Sigmoid of the logit; in an average the mean of the cases' probabilities.
        by_organ: Part of the volume -> sum of the cells in it, the largest first.
        bias: Part of all biases and norm shifts behind the layer.
        residual: What is left.
        layer: Name of the layer whose cells are accounted.
        valid: Do the parts add up to the logit?
        why: Why not, in sentences.
        case: Name of the case; None in an average.
        channels: The channels that add most, then those that take most away; empty without `channels=`.
        importance: (K,) mean gradient of each channel, over the cases with the label in an average.
        importance_absent: (K,) the same over the cases without the label, None if there are none.
        n: Number of cases.
        spread: Standard deviation over cases per part (n - 1 in the denominator), empty for fewer than two.
        left_out: Why cases did not count -> how many.
    """

    label: str
    logit: float
    probability: float
    by_organ: Mapping[str, float]
    bias: float
    residual: float
    layer: str
    valid: bool
    why: tuple[str, ...] = ()
    case: str | None = None
    channels: tuple[ChannelPart, ...] = ()
    importance: Tensor | None = None
    importance_absent: Tensor | None = None
    n: int = 1
    spread: Mapping[str, float] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def bias_share(self) -> float:
        """|bias| / (|bias| + sum of |parts|)."""
        total = abs(self.bias) + sum(map(abs, self.by_organ.values()))
        return abs(self.bias) / total if total else 0.0

    def __str__(self) -> str:
        return "\n".join(self._lines())

    __repr__ = __str__

    def _lines(self) -> Iterator[str]:
        case = f"{self.case}: " if self.case is not None else ""
        if self.n == 0:
            yield f"{self.label}: no present case with known organs to average{self._left_out()}."
            return
        mean = "" if self.case is not None else f", mean of {self.n} present case{'s' * (self.n > 1)}"
        yield (
            f"{case}{self.label}{mean} {self.probability:.2f} (logit {self.logit:+.2f}): {self._parts()}, "
            f"{100 * self.bias_share:.0f} % bias ({self.bias:+.2g}){self._left_out()}. An account of cells at "
            f"{self.layer!r}: a cell may have seen more than the organ it lies in."
        )
        if not self.valid:
            yield f"Not an account of the logit ({self.residual:+.2f} is left): {'; '.join(self.why)}."
        for word, parts in (
            ("for", [p for p in self.channels if p.contribution > 0]),
            ("against", [p for p in self.channels if p.contribution < 0]),
        ):
            if parts:
                yield f"{word}: {', '.join(map(str, parts))}"

    def _parts(self) -> str:
        named = list(self.by_organ.items())
        listed, rest = named[:_LISTED], named[_LISTED:]
        # What rounds to nothing is not worth a name, but the first part is always told.
        least = 0.005 * sum(map(abs, self.by_organ.values()))
        told = [
            f"{value:+.2g}{self._spread(name)} {'cells in ' if i == 0 else ''}{name}"
            for i, (name, value) in enumerate(listed)
            if i == 0 or abs(value) >= least
        ]
        others = sum(value for _, value in rest)
        if abs(others) >= least and rest:
            told.append(f"{others:+.2g} elsewhere")
        return ", ".join(told)

    def _spread(self, name: str) -> str:
        return f" \N{PLUS-MINUS SIGN} {self.spread[name]:.2g}" if name in self.spread else ""

    def _left_out(self) -> str:
        told = [f"{count} {reason}" for reason, count in self.left_out.items() if count]
        return f" (left out: {', '.join(told)})" if told else ""
