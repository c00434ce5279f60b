"""Scans and segmentations in folders as people have them: found by their names, none of them opened.

A scan is a volume file (NIfTI, NRRD, MetaImage, MRC, npz, npy) or a folder with DICOM files. A segmentation is a volume
file with the ids of all organs, a folder with one binary file per organ, named after organs, or several such files that
are named after case and organ: `A12_heart.nii.gz`, `A12_aorta.nii.gz`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

FORMATS = {
    **dict.fromkeys((".nii.gz", ".nii"), "NIfTI"),
    **dict.fromkeys((".nrrd", ".nhdr"), "NRRD"),
    **dict.fromkeys((".mha", ".mhd"), "MetaImage"),
    **dict.fromkeys((".mrc", ".rec", ".map"), "MRC"),
    **dict.fromkeys((".npz", ".npy"), "numpy"),
}
DICOM = "DICOM series"
SEVERAL = "folder of binary files"
FILES = "binary files of a case"
_MASKS = ("NIfTI", "NRRD", "MetaImage")
_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_SCAN_ENDS = r"(?:[_\-. ](?:0000|ct|img|image|scan|volume|vol))$"
_SEG_ENDS = (
    r"(?:[_\-. ](?:seg|segs|segmentation|segmentations|organ|organs|mask|masks|label|labels|total|totalsegmentator"
    r"|totalseg|ts|ml|multilabel|pred|prediction))$"
)
_SCAN_WORDS = {"ct", "img", "image", "images", "scan", "volume", "vol", "series", "dicom", "dcm", "ct_0000", "data"}
_SEG_WORDS = {
    *("seg", "segs", "segmentation", "segmentations", "organ", "organs", "mask", "masks", "label", "labels", "total"),
    *("totalsegmentator", "totalseg", "ts", "ml", "multilabel", "pred", "prediction"),
}


@dataclass(frozen=True)
class Found:
    """A scan or a segmentation.

    Attributes:
        path: File or folder.
        kind: A value of `FORMATS`, `DICOM`, `SEVERAL` or `FILES`.
        names: What it may be matched by: the path below the folder that was searched without what says "scan" or
            "segmentation", then its own name likewise, then the folder it lies in; in small letters.
        stem: Its own name, for an id.
        organs: Names of organs, of binary files.
        files: These files, where they are no folder's.
    """

    path: Path
    kind: str
    names: tuple[str, str, str]
    stem: str
    organs: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


def find_scans(root: Path, organs: Collection[str], segmentations_too: bool) -> tuple[list[Found], list[Found]]:
    """Scans below a folder, and segmentations if they lie among them.

    Args:
        root: The folder.
        organs: Names by which a folder of binary files is known.
        segmentations_too: Take files that are named as segmentations, and folders of binary files, for such; else
            they are passed over.

    Returns:
        Scans and segmentations, each in the order of their paths.
    """
    scans: list[Found] = []
    segmentations: list[Found] = []
    for folder, files in walk(root):
        if binary := binary_organs(files, organs):
            segmentations.append(_found(root, folder, SEVERAL, _SEG_ENDS, _SEG_WORDS, binary))
            scans += [
                _found(root, folder / name, kind, _SCAN_ENDS, _SCAN_WORDS)
                for name in files
                if (kind := FORMATS.get(suffix_of(name))) and is_scan(name)
            ]
        elif holds_dicom(folder, files):
            scans.append(_found(root, folder, DICOM, _SCAN_ENDS, _SCAN_WORDS))
        else:
            # One organ alone may be the name of a scan, such as that of a liver.
            groups = organ_files(files, organs, least=2)
            segmentations += _of_cases(root, folder, groups)
            inside = {name for group in groups.values() for name in group.values()}
            for name in files:
                if name in inside:
                    continue
                if kind := FORMATS.get(suffix_of(name)):
                    if is_segmentation(name):
                        segmentations.append(_found(root, folder / name, kind, _SEG_ENDS, _SEG_WORDS))
                    else:
                        scans.append(_found(root, folder / name, kind, _SCAN_ENDS, _SCAN_WORDS))
    return scans, segmentations if segmentations_too else []


def find_segmentations(root: Path, organs: Collection[str]) -> list[Found]:
    """Everything below a folder that holds nothing but segmentations."""
    found: list[Found] = []
    for folder, files in walk(root):
        if binary := binary_organs(files, organs):
            found.append(_found(root, folder, SEVERAL, _SEG_ENDS, _SEG_WORDS, binary))
            continue
        groups = organ_files(files, organs)
        found += _of_cases(root, folder, groups)
        inside = {name for group in groups.values() for name in group.values()}
        kinds = {name: kind for name in files if name not in inside and (kind := FORMATS.get(suffix_of(name)))}
        found += [_found(root, folder / name, kind, _SEG_ENDS, _SEG_WORDS) for name, kind in kinds.items()]
    return found


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders below `root` with the names of their files, sorted; hidden ones are left out, links are followed once."""
    seen: set[tuple[int, int]] = set()
    for folder, inner, files in os.walk(root, followlinks=True):
        state = Path(folder).stat()
        if (state.st_dev, state.st_ino) in seen:
            inner.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield Path(folder), sorted(name for name in files if not name.startswith("."))


def holds_dicom(folder: Path, files: Sequence[str]) -> bool:
    """Do DICOM files lie in this folder? Files without suffix are asked for their mark at byte 128, one of them."""
    if any(name.lower().endswith(_DICOM_SUFFIXES) for name in files):
        return True
    plain = next((name for name in files if re.fullmatch(r"[\w\-]+|[\d.]+", name) and name.upper() != "DICOMDIR"), None)
    if plain is None:
        return False
    try:
        with (folder / plain).open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def binary_organs(files: Sequence[str], organs: Collection[str]) -> tuple[str, ...]:
    """Names of the organs whose binary files these are: at least half of the volumes are named after known organs."""
    stems = [stem_of(name) for name in files if FORMATS.get(suffix_of(name)) in _MASKS and not is_scan(name)]
    known = sum(stem in organs for stem in stems)
    return tuple(stems) if known and 2 * known >= len(stems) else ()


def organ_files(files: Sequence[str], organs: Collection[str], least: int = 1) -> dict[str, dict[str, str]]:
    """Binary files that are named after case and organ.

    Args:
        files: Names of the files of a folder.
        organs: Names of organs.
        least: Organs that a case must have.

    Returns:
        Case -> organ -> file.

    Example:
        >>> organ_files(["A1_heart.nii.gz", "A1_lung_left.nii.gz", "B2.nii.gz"], ["heart", "lung_left", "left"])
        {'A1': {'heart': 'A1_heart.nii.gz', 'lung_left': 'A1_lung_left.nii.gz'}}
    """
    found: dict[str, dict[str, str]] = {}
    for name in files:
        stem = stem_of(name)
        if FORMATS.get(suffix_of(name)) not in _MASKS:
            continue
        # The longest organ: lung_left, not left.
        ends = [place for place, mark in enumerate(stem) if mark in "_-. " and stem[place + 1 :] in organs and place]
        if ends:
            found.setdefault(stem[: ends[0]], {})[stem[ends[0] + 1 :]] = name
    return {case: group for case, group in found.items() if len(group) >= least}


def is_scan(name: str) -> bool:
    """Does a file's name say so?

    Example:
        >>> is_scan("ct.nii.gz"), is_scan("A12_ct.nii.gz"), is_scan("A12.nii.gz"), is_scan("heart.nii.gz")
        (True, True, False, False)
    """
    stem = stem_of(name).lower()
    return stem in _SCAN_WORDS or re.search(_SCAN_ENDS, stem) is not None


def is_segmentation(name: str) -> bool:
    """Does a file's name say so?

    Example:
        >>> is_segmentation("A12_seg.nii.gz"), is_segmentation("A12.nii.gz"), is_segmentation("segmentations.nii.gz")
        (True, False, True)
    """
    stem = stem_of(name).lower()
    return stem in _SEG_WORDS or re.search(_SEG_ENDS, stem) is not None


def suffix_of(name: str) -> str:
    """End of a file's name in small letters, `.nii.gz` as one."""
    name = name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else PurePosixPath(name).suffix


def stem_of(name: str) -> str:
    """A file's name without its end, if that is one of a volume.

    Example:
        >>> stem_of("A12.nii.gz"), stem_of("1.2.840.113")
        ('A12', '1.2.840.113')
    """
    suffix = suffix_of(name)
    return name[: -len(suffix)] if suffix in FORMATS else name


def without_end(stem: str, ends: str = f"{_SCAN_ENDS}|{_SEG_ENDS}") -> str:
    """A stem without what says that it is a scan or a segmentation.

    Example:
        >>> without_end("A12_0000"), without_end("A12_ct_seg"), without_end("A12")
        ('A12', 'A12', 'A12')
    """
    while (shorter := re.sub(ends, "", stem, flags=re.IGNORECASE)) != stem and shorter:
        stem = shorter
    return stem


def _of_cases(root: Path, folder: Path, groups: Mapping[str, Mapping[str, str]]) -> list[Found]:
    """Segmentations of several files each; a case is named as a file of that name would be."""
    found = []
    for case, group in groups.items():
        whole = _found(root, folder / f"{case}.nii", FILES, _SEG_ENDS, _SEG_WORDS, tuple(group))
        paths = tuple(folder / name for name in group.values())
        found.append(replace(whole, path=paths[0], files=paths))
    return found


def _found(root: Path, path: Path, kind: str, ends: str, words: Collection[str], organs: tuple[str, ...] = ()) -> Found:
    """What is there, with its names.

    A file that says nothing but "scan" or "segmentation" has the name of the folder it lies in; so has a folder.
    """
    parts = list(path.relative_to(root).parts)
    if parts:
        parts[-1] = stem_of(parts[-1])
    while parts and parts[-1].lower() in words:
        parts.pop()
    if not parts:  # the folder itself holds one scan
        return Found(path, kind, (".", ".", ""), root.resolve().name, organs)
    both = f"{_SCAN_ENDS}|{_SEG_ENDS}"
    clean = [*(part.lower() for part in parts[:-1]), without_end(parts[-1], both).lower()]
    return Found(
        path=path,
        kind=kind,
        names=("/".join(clean), clean[-1], clean[-2] if len(clean) > 1 else ""),
        stem=without_end(parts[-1], ends if organs else _SCAN_ENDS),
        organs=organs,
    )
