"""Checks of headers: what files say about themselves, before a voxel is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import nibabel as nib
import numpy as np

from camtrain.doctor.facts import Facts, Header
from camtrain.doctor.finding import Finding, Place, count, some
from camtrain.doctor.form_checks import exists
from camtrain.doctor.grids import how_grids_differ, turned_to_ras

_FEW = 5  # cases below which nothing is an outlier
_APART = 2.0  # factor from the median of the others
_LEAST_MM, _MOST_MM = 0.05, 20.0


def unreadable(facts: Facts) -> list[Finding]:
    """Files that training cannot read: damaged, cut off, 4D, RGB, complex, or without geometry."""
    places = []
    for index, row in enumerate(facts.rows):
        content = facts.contents.get(index)
        of_image, of_organs = ("", "") if content is None else (content.image_fault, content.organs_fault)
        for column, file, headers, told in (
            ("image", row.image, facts.image_headers, of_image),
            ("organs", row.organs, facts.organ_headers, of_organs),
        ):
            header = headers.get(index)
            fault = (header.fault if header else "") or told
            files = file if isinstance(file, tuple) else () if file is None else (file,)
            if fault and all(exists(path) for path in files):  # what is missing is told by `paths`
                places.append(row.place(f"{column}: {_one_line(fault)}", header.path if header else file))
    if not places:
        return []
    return [
        Finding(
            "unreadable",
            facts.of_a_file,
            f"{count(len(places), 'volume')} cannot be used",
            "whole, readable 3D files with one real number per voxel and a place in the world",
            some(dict.fromkeys(_in_short(place.got) for place in places), 3),
            "export or copy them again; one file per time point or channel; or take the rows out",
            tuple(places),
        )
    ]


def cut_off(facts: Facts) -> list[Finding]:
    """Files whose end does not fit their header, where they have not been read in full."""
    places = [
        facts.rows[index].place(f"{column}: {header.doubt}", header.path)
        for column, headers in (("image", facts.image_headers), ("organs", facts.organ_headers))
        for index, header in headers.items()
        if header.doubt and not header.fault and index not in facts.contents
    ]
    if not places:
        return []
    title = f"{count(len(places), 'file')} perhaps truncated"
    todo = "read in full (without --headers-only), which tells for certain, or copy them again"
    expected = "an end that fits the header"
    return [Finding("cut_off", "warning", title, expected, "another", todo, tuple(places))]


def grids(facts: Facts) -> list[Finding]:
    """Do image and organs of a case lie on one voxel grid?"""
    places = []
    for index, row in enumerate(facts.rows):
        content = facts.contents.get(index)
        if content is not None and content.grids:
            places.append(row.place(content.grids, row.organs))
            continue
        image, organs = facts.image_headers.get(index), facts.organ_headers.get(index)
        if content is None and image and organs and _usable(image) and _usable(organs):
            differs = how_grids_differ(image.shape, image.affine, organs.shape, organs.affine)
            if differs:
                places.append(row.place(differs, organs.path))
    if not places:
        return []
    return [
        Finding(
            "grids",
            facts.of_a_file,
            f"organs of {count(len(places), 'case')} lie on another grid than the image",
            "one voxel grid for image and organs (corners within a tenth of a voxel, any order of the axes)",
            some(dict.fromkeys(place.got for place in places), 2),
            "resample the segmentation to the image (nearest neighbour), or segment this very image",
            tuple(places),
        )
    ]


def orientation(facts: Facts) -> list[Finding]:
    """Does every header say where left and right are?"""
    found = []
    lost = [
        facts.rows[index].place("not said", header.path)
        for headers in (facts.image_headers, facts.organ_headers)
        for index, header in headers.items()
        if not header.placed and _usable(header)
    ]
    if lost:
        todo = "write it (in NIfTI sform or qform) where you know it: left and right may be swapped, with their organs"
        title = f"{count(len(lost), 'header')} without orientation: NIfTI's default is assumed"
        expected = "a header that says where left and right are"
        found.append(Finding("orientation", "warning", title, expected, "not said", todo, tuple(lost)))
    codes = Counter("".join(nib.aff2axcodes(h.affine)) for h in facts.image_headers.values() if _usable(h))
    if len(codes) > 1:
        got = ", ".join(f"{code} {n}" for code, n in codes.most_common())
        todo = "nothing: every volume is turned to RAS when it is read"
        found.append(Finding("orientation", "note", "scans in several orientations", "one orientation", got, todo))
    return found


def spacing(facts: Facts) -> list[Finding]:
    """Voxel sizes and fields of view that are impossible, or far from those of the other scans."""
    steps = {index: _ras_step(header) for index, header in facts.image_headers.items() if _usable(header)}
    odd = [
        facts.rows[index].place(_mm(step), facts.image_headers[index].path)
        for index, step in steps.items()
        if min(step) < _LEAST_MM or max(step) > _MOST_MM
    ]
    found = []
    if odd:
        title = f"{count(len(odd), 'scan')} with impossible voxels"
        todo = "correct the header: lengths are mm; metres, micrometres and a spacing that got lost look like this"
        expected = f"voxels of {_LEAST_MM} to {_MOST_MM:g} mm"
        got = some(p.got for p in odd)
        found.append(Finding("spacing", "warning", title, expected, got, todo, tuple(odd)))
    told = {place.file for place in odd}
    rest = {i: step for i, step in steps.items() if str(facts.image_headers[i].path) not in told}
    middle = np.median(np.array(list(rest.values())), axis=0) if rest else np.ones(3)
    sizes = {i: np.array(_ras_shape(facts.image_headers[i])) * rest[i] for i in rest}
    field = np.median(np.array(list(sizes.values())), axis=0) if sizes else np.ones(3)
    for name, values, typical, unit in (("voxel size", rest, middle, "voxels"), ("field of view", sizes, field, "")):
        far = outliers(values, typical)
        if far:
            places = tuple(
                facts.rows[index].place(_mm(values[index]), facts.image_headers[index].path) for index in far
            )
            title = f"{count(len(far), 'scan')} with a {name} far from the others"
            todo = "look at them: another protocol, a scout, a part of the body, or a wrong header"
            expected = f"{unit + ' of ' if unit else ''}about {_mm(typical)}, the median of all scans"
            got = some((place.got for place in places), 3)
            found.append(Finding("spacing", "warning", title, expected, got, todo, places))
    return found


def outliers(values: Mapping[int, Iterable[float]], typical: Iterable[float], factor: float = _APART) -> list[int]:
    """Indices whose numbers differ from the typical ones by more than a factor along any axis.

    Example:
        >>> outliers({n: (1.0, 3.0 if n else 9.0) for n in range(6)}, (1.0, 3.0))
        [0]
    """
    if len(values) < _FEW:
        return []
    middle = np.array(list(typical))
    return [
        index
        for index, numbers in values.items()
        if (np.abs(np.log(np.array(list(numbers)) / middle)) > np.log(factor)).any()
    ]


def stray_files(facts: Facts) -> list[Finding]:
    """Organ files in folders that the table has no name for: they are left out."""
    names: dict[str, list[Place]] = {}
    for index, files in facts.stray_files.items():
        for name in files:
            row = facts.rows[index]
            names.setdefault(name, []).append(row.place(name, row.organs))
    if not names:
        return []
    todo = "nothing, if no label needs them; else add them to the table under organs, by the file's name"
    got = some(names)
    title = f"{count(len(names), 'organ file is', 'organ files are')} unknown to the table and left out"
    return [Finding("stray_files", "note", title, "names of the organ table", got, todo)]


def _usable(header: Header) -> bool:
    return not header.fault and len(header.shape) == 3


def _ras_step(header: Header) -> tuple[float, ...]:
    _, affine = turned_to_ras(header.shape, header.affine)
    return tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist())


def _ras_shape(header: Header) -> tuple[int, ...]:
    return turned_to_ras(header.shape, header.affine)[0]


def _mm(values: Iterable[float]) -> str:
    return " x ".join(f"{value:.3g}" for value in values) + " mm"


def _one_line(text: str) -> str:
    first, *lines = text.splitlines() or [""]
    return "; ".join(line.removeprefix("- ") for line in lines) or first


def _in_short(text: str) -> str:
    return text if len(text) < 90 else text[:87] + "..."
