"""Checks of what volumes hold: intensities, organ ids, sides, duplicates."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from camtrain.doctor.facts import Content, Facts, OrganSize
from camtrain.doctor.finding import Finding, Place, count, some

_FEW = 5
_NEVER_HU = (-5000.0, 35000.0)  # metal ends at about 31,000; padding of scanners at -3,024
_FAR = 400.0  # HU from the median of the others at which a scan's own median is odd
_CLIPPED = 0.999


def intensities(facts: Facts) -> list[Finding]:
    """Scans whose values cannot be HU, or that say nothing after the window."""
    found = []
    for title, expected, todo, wrong in _KINDS if facts.hounsfield else _KINDS[:1]:
        places = [
            facts.rows[i].place(f"{c.low:g} to {c.high:g}, middle {c.quantiles[1]:g}", facts.rows[i].image)
            for i, c in facts.contents.items()
            if c.low == c.low and wrong(c)
        ]
        if places:
            got = some(place.got for place in places[:3])
            said = f"{count(len(places), 'scan')} {title}"
            found.append(Finding("intensities", "warning", said, expected, got, todo, tuple(places)))
    return found + _far_from_others(facts) + _nothing_in_window(facts)


def _flat(content: Content) -> bool:
    return content.low == content.high


def _never(content: Content) -> bool:
    return content.low < _NEVER_HU[0] or content.high > _NEVER_HU[1]


def _scaled(content: Content) -> bool:
    return not _flat(content) and content.low >= 0 and content.high <= 255 and content.quantiles[2] <= 255


def _unsigned(content: Content) -> bool:
    return not _scaled(content) and not _flat(content) and content.low >= 0


_Wrong = Callable[[Content], bool]
_KINDS: tuple[tuple[str, str, str, _Wrong], ...] = (
    ("of one value everywhere", "a picture", "export again, or take the rows out", _flat),
    (
        "with values that no scanner writes",
        f"HU between {_NEVER_HU[0]:g} and {_NEVER_HU[1]:g}",
        "look at them: a wrong byte order, a wrong scale, or several volumes in one",
        _never,
    ),
    (
        "that look scaled already (0 to 255 or less)",
        "HU, air near -1000",
        "export HU, or set window= to what the files hold ([0, 255], [0, 1])",
        _scaled,
    ),
    (
        "without any value below 0",
        "HU, air near -1000",
        "subtract 1024 where the rescale intercept was lost, or set window= to what the files hold",
        _unsigned,
    ),
)


def _far_from_others(facts: Facts) -> list[Finding]:
    middles = {i: c.quantiles[1] for i, c in facts.contents.items() if c.low == c.low}
    if not facts.hounsfield or len(middles) < _FEW:
        return []
    typical = float(np.median(list(middles.values())))
    # Only where the values themselves pass: what no scanner writes is told above.
    far = [
        i
        for i, value in middles.items()
        if abs(value - typical) > _FAR and not any(wrong(facts.contents[i]) for *_, wrong in _KINDS)
    ]
    if not far:
        return []
    places = tuple(facts.rows[i].place(f"middle {middles[i]:g} HU", facts.rows[i].image) for i in far)
    title = f"{count(len(far), 'scan')} much brighter or darker than the others"
    todo = "look at them: another part of the body, a wrong scale, much padding"
    expected = f"a middle value near {typical:g} HU, the median of all scans"
    return [Finding("intensities", "warning", title, expected, some(p.got for p in places[:3]), todo, places)]


def _nothing_in_window(facts: Facts) -> list[Finding]:
    if facts.window is None:
        return []
    places = tuple(
        facts.rows[i].place(f"{c.clipped:.1%} of the voxels outside", facts.rows[i].image)
        for i, c in facts.contents.items()
        if c.clipped > _CLIPPED and not _flat(c)
    )
    if not places:
        return []
    title = f"{count(len(places), 'scan')} of which the window leaves nothing"
    expected = f"values within window={list(facts.window)}"
    todo = "set window= to what the files hold, or export HU"
    return [Finding("intensities", "warning", title, expected, some(p.got for p in places[:3]), todo, places)]


def organ_ids(facts: Facts) -> list[Finding]:
    """Ids in the segmentations that the organ table does not know."""
    if facts.table is None:
        return []
    known = {0, *(i for ids in facts.table.organs.values() for i in ids)}
    by_id: dict[int, list[Place]] = {}
    for index, content in facts.contents.items():
        for number, size in (content.organs or {}).items():
            if number not in known:
                row = facts.rows[index]
                by_id.setdefault(number, []).append(row.place(f"id {number}: {size.voxels:,} voxels", row.organs))
    if not by_id:
        return []
    passes = bool(facts.table.to_dict().get("ignore_unknown"))
    places = tuple(place for group in by_id.values() for place in group)
    title = f"{count(len(by_id), 'organ id')} that the table does not know"
    got = some(f"{number} in {count(len(group), 'case')}" for number, group in sorted(by_id.items()))
    expected = f"ids of the table ({some(sorted(known - {0}), 8)})"
    todo = "add them to the table under organs, or set ignore_unknown: true there"
    if passes:
        todo = "nothing: ignore_unknown lets them pass; are they organs that a label needs?"
    return [Finding("organ_ids", "note" if passes else facts.of_a_file, title, expected, got, todo, places)]


def organs_never(facts: Facts) -> list[Finding]:
    """Organs that a rule names and no case has."""
    there = [index for index, content in facts.contents.items() if content.organs is not None]
    if facts.table is None or not there:
        return []
    found = {name for name in facts.table.organs if any(facts.organ_voxels(index, name) for index in there)}
    rules = {label: set(rule.organs) for label, rule in facts.table.rules.items() if not rule.anywhere}
    lost = [label for label, organs in rules.items() if not organs & found]
    others = sorted(set().union(*rules.values(), []) - found - {name for label in lost for name in rules[label]})
    said = []
    number = count(len(there), "segmented case")
    todo = "compare the table's ids with those of the segmenter, and names with its files"
    if lost:
        title = f"{count(len(lost), 'label')} whose organs are in none of {number}"
        got = some(f"{label} ({some(sorted(rules[label]), 3)})" for label in lost)
        said.append(Finding("organs_never", "warning", title, "organs of every label in some case", got, todo))
    if others:
        title = f"{count(len(others), 'organ')} of the rules in none of {number}; their labels have others"
        said.append(Finding("organs_never", "note", title, "every organ in some case", some(others), todo))
    return said


def sides(facts: Facts) -> list[Finding]:
    """Is every left organ on the left of its right twin? Else image or segmentation were mirrored."""
    if facts.table is None or not facts.files:
        return []
    pairs = [
        (name, name.replace("left", "right"))
        for name in facts.table.organs
        if "left" in name and name.replace("left", "right") in facts.table.organs
    ]
    places = []
    for index, content in facts.contents.items():
        swapped = [
            f"{left} lies right of {right}"
            for left, right in pairs
            if (a := _centre(facts, content, left)) is not None
            and (b := _centre(facts, content, right)) is not None
            and a[0] > b[0]
        ]
        if swapped:
            row = facts.rows[index]
            places.append(row.place(some(swapped, 2), row.organs))
    if not places:
        return []
    title = f"left and right are swapped in {count(len(places), 'case')}"
    todo = "mirror image and segmentation back together (or correct the header), or swap the ids in the table"
    got = some((place.got for place in places), 2)
    expected = "left organs on the patient's left (the world's first axis runs to the right)"
    return [Finding("sides", "warning", title, expected, got, todo, tuple(places))]


def _centre(facts: Facts, content: Content, name: str) -> tuple[float, ...] | None:
    found: list[OrganSize] = [(content.organs or {})[i] for i in facts.organ_ids(name) if i in (content.organs or {})]
    return max(found, key=lambda size: size.voxels).centre if found else None


def duplicates(facts: Facts) -> list[Finding]:
    """One content under several names: equal files, or equal voxels in different files."""
    groups: dict[str, list[int]] = {}
    # Prints of voxels where all were read, else those of files: the two cannot be compared.
    read = all(index in facts.contents for index, header in facts.image_headers.items() if not header.fault)
    for index, row in enumerate(facts.rows):
        content, header = facts.contents.get(index), facts.image_headers.get(index)
        if read:
            mark = content.print if content is not None and content.low != content.high else ""
        else:
            mark = header.print if header is not None and not header.fault else ""
        # Test splits of a simulation show the same cases under other rules.
        if mark and (row.image is not None or row.split in (facts.train, facts.val)):
            groups.setdefault(mark, []).append(index)
    same = [members for members in groups.values() if len(members) > 1]
    across = [m for m in same if len({facts.rows[i].split for i in m}) > 1]
    within = [m for m in same if len({facts.rows[i].split for i in m}) == 1]
    found = []
    for members, title, todo in (
        (across, "in more than one split", "keep each in one split: scores on cases of training are worth nothing"),
        (within, "several times in a split", "keep one row of each, unless that is meant"),
    ):
        if members:
            places = tuple(
                facts.rows[i].place(f"copy {n}, split {facts.rows[i].split!r}", facts.rows[i].image)
                for n, group in enumerate(members, start=1)
                for i in group
            )
            said = f"{count(len(members), 'scan')} {title} under different names"
            got = some(_equal([facts.rows[i].id or facts.rows[i].where for i in group]) for group in members)
            found.append(Finding("duplicates", "warning", said, "every scan once", got, todo, places))
    return found


def _equal(names: list[str]) -> str:
    more = f" and {len(names) - 4:,} more" if len(names) > 4 else ""
    return " = ".join(names[:4]) + more
