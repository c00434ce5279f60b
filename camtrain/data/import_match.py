"""Which segmentation belongs to which scan, by their names; what is ambiguous is told, never guessed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from camtrain.data.import_find import FILES, Found
from camtrain.data.manifest_paths import SEVERAL


@dataclass
class Matched:
    """Scans with their segmentations.

    Attributes:
        organs: Place of a scan -> its segmentation.
        alone: Segmentations that fit no scan.
        faults: One sentence for each that fits several scans, and for each scan that several fit.
    """

    organs: dict[int, Found] = field(default_factory=dict)
    alone: list[Found] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def match(scans: Sequence[Found], segmentations: Sequence[Found]) -> Matched:
    """Match by the path below the folder, then by name, then by the folder that holds the scan or the segmentation.

    Args:
        scans: What was found.
        segmentations: Likewise.

    Example:
        >>> from camtrain.data.import_find import _found
        >>> scan = Found(Path("s/a.nii.gz"), "NIfTI", ("a", "a", ""), "a")
        >>> mask = Found(Path("m/a_seg.nii.gz"), "NIfTI", ("a", "a", ""), "a")
        >>> match([scan], [mask]).organs[0].path.name
        'a_seg.nii.gz'
    """
    indices = _indices(scans)
    matched = Matched()
    fits: dict[int, list[Found]] = defaultdict(list)
    for segmentation in segmentations:
        places = _places(segmentation, indices)
        if len(places) == 1:
            fits[places[0]].append(segmentation)
        elif places:
            several = ", ".join(str(scans[place].path) for place in places[:3]) + (", ..." if len(places) > 3 else "")
            matched.faults.append(f"{segmentation.path} fits {len(places)} scans: {several}")
        else:
            matched.alone.append(segmentation)
    for place, found in sorted(fits.items()):
        if len(found) > 1:
            several = ", ".join(str(one.path) for one in found[:3]) + (", ..." if len(found) > 3 else "")
            matched.faults.append(f"{scans[place].path} has {len(found)} segmentations: {several}")
        matched.organs[place] = found[0]
    return matched


def match_by_pattern(ids: Sequence[str], organs: Path, pattern: str) -> Matched:
    """Segmentations at stated places.

    Args:
        ids: Ids of the scans.
        organs: Folder in which the places lie.
        pattern: Path with `{id}` in it, or several with `|` between them, of one binary file each.
    """
    matched = Matched()
    for place, name in enumerate(ids):
        wanted = [organs / part.strip().replace("{id}", name) for part in pattern.split(SEVERAL) if part.strip()]
        there = tuple(path for path in wanted if path.exists())
        if there:
            files = there if SEVERAL in pattern else ()
            kind = FILES if files else "by pattern"
            matched.organs[place] = Found(there[0], kind, ("", "", ""), name, files=files)
    return matched


def _indices(scans: Sequence[Found]) -> list[Mapping[str, list[int]]]:
    """For each way of naming: name -> places of the scans that have it."""
    indices: list[dict[str, list[int]]] = [defaultdict(list), defaultdict(list), defaultdict(list)]
    for place, scan in enumerate(scans):
        for index, name in zip(indices, scan.names, strict=True):
            if name:
                index[name].append(place)
    return list(indices)


def _places(segmentation: Found, indices: Sequence[Mapping[str, list[int]]]) -> list[int]:
    """Scans that the strongest name fits: one, several (then nothing weaker can tell), or none."""
    path, name, folder = segmentation.names
    by_path, by_name, by_folder = indices
    # (A name of the segmentation, among which names of the scans), from the strongest on.
    for wanted, index in ((path, by_path), (name, by_name), (folder, by_name), (name, by_folder), (folder, by_folder)):
        if wanted and (places := index.get(wanted)):
            return places
    return []
