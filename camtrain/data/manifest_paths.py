"""Paths in a manifest: where they start, whether they may lead there, and whether something of use lies there."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from camtrain._errors import InputError

IMAGE_SUFFIXES = (
    *(".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".mrc", ".rec", ".map", ".npz", ".npy"),
    *(".png", ".jpg", ".jpeg", ".dcm"),
)
# Separates files in the column organs; no file system forbids it, but nobody has it in names.
SEVERAL = "|"
_SCAN = "a NIfTI file or another scan (NRRD, MetaImage, MRC, npz, npy, PNG, JPEG), or a folder with one DICOM series"
_ORGANS = "a NIfTI file or another volume, a folder of them, several files with '|' between them, or nothing"


@dataclass(frozen=True)
class Places:
    """How paths of a manifest are read.

    Attributes:
        root: Where relative paths start.
        closed: Must everything lie below the root, links followed?
        touch: May files be looked at? Else paths are judged by their text.
    """

    root: Path
    closed: bool = False
    touch: bool = True

    @cached_property
    def start(self) -> str:
        """The root as a text."""
        return str(self.root)

    def find(self, text: str, where: str, column: str, expected: str) -> tuple[Path, int | None]:
        """A path, and what lies there (`st_mode`; None where no file may be touched).

        Raises:
            InputError: Outside the root, nowhere, or not to be reached.
        """
        # Of a text, once: a manifest has 10,000s of paths, and joining them is what reading it costs.
        path = Path(os.path.join(self.start, text))  # noqa: PTH118
        self._check_inside(path, where, column)
        if not self.touch:
            return path, None
        try:
            return path, path.stat().st_mode
        except (OSError, ValueError) as error:
            raise InputError(f"{where}: column {column!r} expects {expected}, got {path}, {_reason(error)}") from None

    def _check_inside(self, path: Path, where: str, column: str) -> None:
        if not self.closed:
            return
        real = os.path.realpath if self.touch else os.path.abspath
        inside, root = Path(real(path)), Path(real(self.root))
        if inside != root and root not in inside.parents:
            raise InputError(
                f"{where}: column {column!r} expects a path inside the root {self.root}, got {path}, which leads to "
                f"{inside}: move the file, correct the path, or set another root="
            )


def find_image(places: Places, text: str, where: str) -> Path:
    """The scan of a row.

    Raises:
        InputError: It is not there, is of an unknown format, or a folder without files.
    """
    path, mode = places.find(text, where, "image", _SCAN)
    suffix = suffix_of(path)
    folder = stat.S_ISDIR(mode) if mode is not None else suffix == ""
    if folder and mode is not None and not _any_file(path):
        raise InputError(
            f"{where}: column 'image' expects {_SCAN}, got the folder {path}, which holds no file: name the scan"
        )
    if not folder and suffix not in IMAGE_SUFFIXES:
        raise InputError(
            f"{where}: column 'image' expects {_SCAN}, got {path}: known names end in {', '.join(IMAGE_SUFFIXES)}"
        )
    return path


def find_organs(places: Places, text: str, where: str) -> Path | tuple[Path, ...]:
    """The organs of a row: one path, or several files.

    Raises:
        InputError: One of them is not there or of an unknown format.
    """
    parts = [part.strip() for part in text.split(SEVERAL) if part.strip()]
    paths = []
    for part in parts:
        path, mode = places.find(part, where, "organs", _ORGANS)
        folder = mode is not None and stat.S_ISDIR(mode)
        suffix = suffix_of(path)
        unknown = suffix not in IMAGE_SUFFIXES and (mode is not None or suffix != "")
        if folder and len(parts) > 1:
            raise InputError(f"{where}: column 'organs' expects files where there are several, got the folder {path}")
        if not folder and unknown:
            raise InputError(
                f"{where}: column 'organs' expects {_ORGANS}, got {path}: known names end in "
                f"{', '.join(IMAGE_SUFFIXES)}"
            )
        paths.append(path)
    # A separator behind a single file says that it is the binary file of one organ, not a file of ids.
    return paths[0] if len(paths) == 1 and SEVERAL not in text else tuple(paths)


def suffix_of(path: Path) -> str:
    """The end of a file's name in small letters, `.nii.gz` as one.

    Example:
        >>> suffix_of(Path("p1/CT.NII.GZ")), suffix_of(Path("series"))
        ('.nii.gz', '')
    """
    name = path.name.lower()
    if name.endswith(".nii.gz"):
        return ".nii.gz"
    place = name.rfind(".")
    return name[place:] if 0 < place < len(name) - 1 else ""


def stem_of(path: Path) -> str:
    """A file's name without its end; "" for hidden files and unknown formats.

    Example:
        >>> stem_of(Path("organs/heart.nii.gz")), stem_of(Path("organs/.DS_Store"))
        ('heart', '')
    """
    suffix = suffix_of(path)
    return path.name[: -len(suffix)] if suffix in IMAGE_SUFFIXES and not path.name.startswith(".") else ""


def organ_names(stems: Sequence[str], organs: Collection[str]) -> dict[str, str]:
    """Which organs files are of, by their names: the organ's own, or with that of the case before all of them.

    Args:
        stems: Names of the files of one case, without their ends.
        organs: Names of organs that are known.

    Returns:
        Stem -> organ, of the stems that are known.

    Example:
        >>> organ_names(["heart", "notes"], ["heart", "aorta"])
        {'heart': 'heart'}
        >>> organ_names(["A12_lung_left", "A12_lung_right"], ["lung_left", "lung_right", "right"])
        {'A12_lung_left': 'lung_left', 'A12_lung_right': 'lung_right'}
    """
    first = stems[0] if stems else ""
    for cut in [0, *(place + 1 for place, mark in enumerate(first) if mark in "_-. ")]:
        found = {stem: stem[cut:] for stem in stems if stem[cut:] in organs}
        if found and all(stem.startswith(first[:cut]) for stem in stems):
            return found
    return {}


def _any_file(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(not entry.name.startswith(".") for entry in entries)


def _reason(error: OSError | ValueError) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOENT, errno.ENOTDIR):
        return (
            "which does not exist: correct the path (relative paths start at the folder of the manifest, or at root=)"
        )
    if number == errno.ELOOP:
        return "which is a loop of links: point the link to a file"
    if number == errno.EACCES:
        return "which this user may not read: ask for the right to read it"
    return f"which cannot be looked at ({error}): correct the path"
