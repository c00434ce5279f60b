"""The alarms: what each one looks at, from where on it speaks, what it means and what to try. Pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from camtrain._errors import InputError, nearest
from camtrain.anatomy.sides import CASE, known_replacement
from camtrain.callbacks._alarm_seen import ALL, Judgement, Seen, check_numbers, rises
from camtrain.cam.layer_table import SEEN_SHARE_LIMIT
from camtrain.cam.method_table import find_method


@dataclass(frozen=True)
class Reliance:
    """A label's logit follows what is put in place of the image far from its organs.

    Args:
        threshold: Share of the outside in the whole pull, outside / (outside + inside).
        patience: Checks in a row.
        window: Checks taken together, this one included; each asks the cases about another organ rule.
        outside: The pull of the outside must be above this too, in units of the gap between the mean logits of the
            label's positives and negatives.
        every_n_epochs: Ask every so many epochs.
        cases: Fixed cases; each is asked about one organ rule, in two forwards.
        replacement: What comes in: `case` (another case's image, of the opposite truth), `air`, `blur`, `mean`. One
            that an `OutsideSwap` trains with gives way to another.
        margin: Share of each axis of the image around the organs that still counts as inside, at least a voxel: an
            organ's border is known by what lies beyond it. 0: none.
        memory_mib: Most memory of the fixed cases, over all processes.
    """

    threshold: float = 0.33
    patience: int = 2
    window: int = 3
    outside: float = 0.2
    every_n_epochs: int = 2
    cases: int = 32
    replacement: str = CASE
    margin: float = 1 / 32
    memory_mib: int = 1024
    name: ClassVar[str] = "reliance"
    measures: ClassVar[tuple[str, ...]] = ("outside_share", "outside_pull", "inside_pull")
    what: ClassVar[str] = "share of what moves the logit that lies far from the organs"
    means: ClassVar[str] = "The network decides by what lies outside the label's organs: a shortcut."
    tries: ClassVar[str] = (
        "OutsideSwap, or data in which the shortcut does not go with the label; check first that the organ table has "
        "all organs in which the finding shows"
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        known_replacement(self.replacement)

    def judge(self, seen: Seen) -> Iterator[Judgement]:
        """Share and pull of the outside, both above their limits."""
        pulls = seen.of("outside_pull")
        for label, share in seen.of("outside_share").items():
            speaks = share > self.threshold and pulls.get(label, 0.0) > self.outside
            yield Judgement(label, share, self.threshold, speaks)


@dataclass(frozen=True)
class Depth:
    """The last layer's maps lie in the organ while those of a layer in the middle do not.

    Args:
        threshold: Energy inside at the mid layer, in multiples of its chance level, below which it counts as outside.
        patience: Checks in a row.
        inside: Energy inside at the last layer, above which it counts as inside.
        layer: The mid layer; None = the deepest one whose cells have seen at most `seen` of the image.
        seen: Share of the image.
        method: Makes the mid layer's maps.
        every_n_epochs: Ask every so many epochs.
        cases: Fixed cases; each is asked about its present labels.
        memory_mib: Most memory of the fixed cases, over all processes.
    """

    threshold: float = 1.2
    patience: int = 2
    inside: float = 0.6
    layer: str | None = None
    seen: float = SEEN_SHARE_LIMIT
    method: str = "relevancecam"
    every_n_epochs: int = 2
    cases: int = 32
    memory_mib: int = 1024
    name: ClassVar[str] = "depth"
    measures: ClassVar[tuple[str, ...]] = ("mid_energy_inside", "mid_energy_inside_chance", "last_energy_inside")
    what: ClassVar[str] = "energy inside at the mid layer, in multiples of chance"
    means: ClassVar[str] = (
        "The last maps lie in the organ, but what they are made of was picked up elsewhere: their cells have seen the "
        "whole image, and the tidy picture is no evidence."
    )
    tries: ClassVar[str] = "OutsideSwap instead of more mask loss, and a mask loss on an earlier layer"

    def __post_init__(self) -> None:
        check_numbers(self)
        find_method(self.method)

    def judge(self, seen: Seen) -> Iterator[Judgement]:
        """Mid layer near chance, last layer inside."""
        chance, last = seen.of("mid_energy_inside_chance"), seen.of("last_energy_inside")
        for label, energy in seen.of("mid_energy_inside").items():
            if chance.get(label, 0.0) > 0 and label in last:
                times = energy / chance[label]
                yield Judgement(label, times, self.threshold, times < self.threshold and last[label] > self.inside)


@dataclass(frozen=True)
class EnergyBelowChance:
    """A label's maps lie in its organs less than evenly spread maps would.

    Args:
        threshold: Energy inside in multiples of its chance level.
        patience: Epochs in a row.
    """

    threshold: float = 0.7
    patience: int = 3
    name: ClassVar[str] = "energy_below_chance"
    measures: ClassVar[tuple[str, ...]] = ("energy_inside", "energy_inside_chance")
    what: ClassVar[str] = "energy inside in multiples of chance"
    means: ClassVar[str] = "The maps avoid the organ: an even spread would have more in it."
    tries: ClassVar[str] = (
        "look at the pictures: image and organs may not lie on each other (flips, orientation), the organ table may "
        "miss an organ, or the network reads something else; then MaskLossCallback or OutsideSwap"
    )

    def __post_init__(self) -> None:
        check_numbers(self)

    def judge(self, seen: Seen) -> Iterator[Judgement]:
        """Energy over chance."""
        chance = seen.of("energy_inside_chance")
        for label, energy in seen.of("energy_inside").items():
            if chance.get(label, 0.0) > 0:
                times = energy / chance[label]
                yield Judgement(label, times, self.threshold, times < self.threshold)


@dataclass(frozen=True)
class SamePlaces:
    """All maps peak at one place that is no organ of theirs, or the maps of a case's labels are one map.

    Args:
        threshold: Share of the maps that peak in one place outside their regions (`SamePlace`), of all labels together
            and of each label.
        patience: Epochs in a row.
        correlation: Mean correlation between the maps of a case's labels (`ClassSensitivity`), for each label.
        cases: Maps with a peak that a label must have to be judged by itself: few may well lie in one place.
    """

    threshold: float = 0.5
    patience: int = 3
    correlation: float = 0.95
    cases: int = 8
    name: ClassVar[str] = "same_place"
    measures: ClassVar[tuple[str, ...]] = ("same_place", "same_place_maps", "class_sensitivity")
    what: ClassVar[str] = "share of maps that peak in one place outside the organs, or correlation with other labels"
    means: ClassVar[str] = "The maps do not depend on what is asked: one spot, or one picture, for everything."
    tries: ClassVar[str] = (
        "look at that spot (a burnt-in text, a padded border, a table edge) and crop it away; where labels share one "
        "map, tap an earlier layer or another method, and see whether the network has learnt anything yet (AUROC)"
    )

    def __post_init__(self) -> None:
        check_numbers(self)

    def judge(self, seen: Seen) -> Iterator[Judgement]:
        """The place for all labels together, then for each label; there the more telling of place and correlation."""
        places, maps, alike = dict(seen.of("same_place")), seen.of("same_place_maps"), seen.of("class_sensitivity")
        if (share := places.pop(ALL, None)) is not None:
            yield Judgement(ALL, share, self.threshold, share > self.threshold)
        own = {label: share for label, share in places.items() if maps.get(label, 0) >= self.cases}
        for label in dict.fromkeys([*own, *alike]):
            figures = [(own.get(label), self.threshold), (alike.get(label), self.correlation)]
            # One judgement per label: a figure that is silent must not end the patience of one that speaks.
            yield max(
                (Judgement(label, value, limit, value > limit) for value, limit in figures if value is not None),
                key=lambda said: (said.speaks, said.value - said.threshold),
            )


@dataclass(frozen=True)
class EmptyMaps:
    """More and more present labels have no positive evidence anywhere.

    Args:
        threshold: Rise of the empty-map rate above its lowest value of the window.
        patience: Epochs in a row.
        window: Epochs to look back.
    """

    threshold: float = 0.3
    patience: int = 3
    window: int = 10
    name: ClassVar[str] = "empty_maps"
    measures: ClassVar[tuple[str, ...]] = ("empty_map_rate",)
    what: ClassVar[str] = "rise of the share of empty maps"
    means: ClassVar[str] = (
        "The network says 'present' without positive evidence at the tapped layer, by its bias alone."
    )
    tries: ClassVar[str] = "a lower weight of the mask loss, a ramp (warmup), or a layer before the last activation"

    def __post_init__(self) -> None:
        check_numbers(self)

    def judge(self, seen: Seen) -> Iterator[Judgement]:
        """The rate now, less the lowest before."""
        yield from rises(seen, "empty_map_rate", self.window, self.threshold)


@dataclass(frozen=True)
class Drifting:
    """A label's AUROC rises while its attention leaves the organ: the signature of a shortcut being learnt.

    Args:
        threshold: Fall of energy inside, or of OrganIoU, as a share of its highest value of the window.
        patience: Epochs in a row.
        gain: AUROC must have risen by this since then.
        auroc: Epochs in which it was lower do not count as "then": maps of an untrained network lie anywhere.
        window: Epochs to look back.
    """

    threshold: float = 0.5
    patience: int = 3
    gain: float = 0.02
    auroc: float = 0.7
    window: int = 8
    name: ClassVar[str] = "drifting"
    measures: ClassVar[tuple[str, ...]] = ("auroc", "energy_inside", "organ_iou")
    what: ClassVar[str] = "fall of energy inside or OrganIoU while AUROC rises"
    means: ClassVar[str] = "It gets better at the label while it looks away from the organ."
    tries: ClassVar[str] = "look at where the maps go (pictures of these epochs), then OutsideSwap or the mask loss"

    def __post_init__(self) -> None:
        check_numbers(self)

    def judge(self, seen: Seen) -> Iterator[Judgement]:
        """The larger fall of the two, each against the epoch in which it was highest."""
        for label, auroc in seen.of("auroc").items():
            falls = [fall for m in self.measures[1:] if (fall := self._fall(seen, label, auroc, m)) is not None]
            if falls:
                yield Judgement(label, max(falls), self.threshold, max(falls) > self.threshold)

    def _fall(self, seen: Seen, label: str, auroc: float, measure: str) -> float | None:
        """None without figures; 0 where AUROC has not risen since."""
        now = seen.of(measure).get(label)
        known = []
        for row in seen.before[-self.window :]:
            value, then = row.get(measure, {}).get(label), row.get("auroc", {}).get(label)
            if value is not None and then is not None and value > 0 and then >= self.auroc:
                known.append((value, then))
        if now is None or not known:
            return None
        highest, then = max(known)
        return (highest - now) / highest if auroc - then >= self.gain else 0.0


@dataclass(frozen=True)
class BiasShareRising:
    """More and more of a logit comes from biases, which lie nowhere.

    Args:
        threshold: Rise of the bias share above its lowest value of the window.
        patience: Epochs in a row.
        window: Epochs to look back.
    """

    threshold: float = 0.7
    patience: int = 3
    window: int = 10
    name: ClassVar[str] = "bias_share"
    measures: ClassVar[tuple[str, ...]] = ("bias_share",)
    what: ClassVar[str] = "rise of the share of the logit that no cell accounts for"
    means: ClassVar[str] = "The maps account for less and less of the logit."
    tries: ClassVar[str] = "a layer nearer to the logits, or a head without bias; then read the maps with that in mind"

    def __post_init__(self) -> None:
        check_numbers(self)

    def judge(self, seen: Seen) -> Iterator[Judgement]:
        """The size of the share now, less the smallest before: biases may push the logit up or down."""
        yield from rises(seen, "bias_share", self.window, self.threshold)


ALARMS: dict[str, type[Any]] = {
    kind.name: kind for kind in (Reliance, Depth, EnergyBelowChance, SamePlaces, EmptyMaps, Drifting, BiasShareRising)
}


def read_alarms(given: Sequence[str | Mapping[str, Any]] | None) -> list[Any]:
    """The argument `alarms=`.

    Args:
        given: None = all with their defaults, [] = none, else names or dicts with the key `name` and options.

    Raises:
        InputError: No list, an unknown alarm or option, a value out of range, or one named twice.

    Example:
        >>> [alarm.threshold for alarm in read_alarms(["depth", {"name": "reliance", "threshold": 0.6}])]
        [1.2, 0.6]
    """
    if given is None:
        return [kind() for kind in ALARMS.values()]
    if isinstance(given, str | Mapping):
        raise InputError(f"alarms= expects a list such as ['reliance'], [] for none, or None for all, got {given!r}")
    read = [_read(each) for each in given]
    for alarm in read:
        if [other.name for other in read].count(alarm.name) > 1:
            raise InputError(f"alarms= lists {alarm.name!r} twice: name every alarm once")
    return read


def _read(given: str | Mapping[str, Any]) -> Any:
    options: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"name": given}
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in ALARMS:
        raise InputError(f"alarms= expects names of alarms, got {name!r}{nearest(str(name), ALARMS)}")
    known = [field.name for field in dataclasses.fields(ALARMS[name])]
    for option in options:
        if option not in known:
            raise InputError(
                f"alarm {name!r} has the options {', '.join(known)}, got {option}={nearest(option, known)}"
            )
    return ALARMS[name](**options)
