"""Lungs and heart of a chest CT without a trained segmenter: thresholds, components and boxes.

The rules are those that Draelos and Carin (2022) call PARTITION; ids are those of the shipped table `rad_chestct`. A
trained segmenter (TotalSegmentator) gives far better organs: this is for comparison with the paper, and for machines
without one. Axes are those of RAD-ChestCT files: axis 0 downwards, axis 1 to the back, axis 2 to the patient's left.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy import ndimage

from camtrain._errors import InputError

Bools = NDArray[np.bool_]
Ids = NDArray[np.uint8]
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

RIGHT, HEART, LEFT, ROUGH_RIGHT, ROUGH_LEFT = 1, 2, 3, 4, 5
"""Ids of the organs; the rough ones are lung of that side or heart, where the segmentation failed."""
AIR = -300
"""HU below which a voxel may be lung."""
LEAST = 1_000_000
"""Voxels of a component that is kept, 512 mL at 0.8 mm."""
BORDERS = (130, 300)
"""A right border of the lungs beyond the first voxel, or a left one before the second, says that a lung is missing."""


def lungs_of(hu: NDArray[Any], least: int = LEAST, air: float = AIR) -> Bools:
    """Lungs of a scan, both in one.

    In every axial slice: voxels below `air`, less the components that touch the edge of the slice, then the two largest
    components (more where sizes are equal). Of that in 3D, the components of at least `least` voxels. Components meet
    at corners in a slice and at faces in 3D.

    Args:
        hu: (Z, Y, X) in Hounsfield units.
        least: Voxels of a component that is kept.
        air: HU.

    Returns:
        (Z, Y, X) bool.

    Example:
        >>> hu = np.zeros((2, 5, 8))
        >>> hu[:, 1:4, 1:3] = hu[:, 1:4, 5:7] = -900
        >>> int(lungs_of(hu, least=12).sum()), int(lungs_of(hu, least=13).sum())
        (24, 0)
    """
    found = np.zeros(hu.shape, dtype=bool)
    for index, section in enumerate(hu):
        found[index] = _lungs_in_slice(section < air)
    labels, count = ndimage.label(found)
    keep = np.bincount(labels.ravel(), minlength=count + 1) >= least
    keep[0] = False
    lungs: Bools = keep[labels]
    return lungs


def _lungs_in_slice(dark: Bools) -> Bools:
    labels, count = ndimage.label(dark, structure=np.ones((3, 3), dtype=int))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    areas[np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])] = 0
    areas[0] = 0
    second = np.sort(areas)[-2] if count > 1 else 1
    kept: Bools = (areas >= max(1, int(second)))[labels]
    return kept


def box_of(lungs: Bools) -> Box | None:
    """First and last-but-one-beyond index of the lungs along each axis; None where there are none.

    Example:
        >>> lungs = np.zeros((3, 4, 5), dtype=bool)
        >>> lungs[1, 2:4, 1:4] = True
        >>> box_of(lungs)
        ((1, 2), (2, 4), (1, 4))
    """
    (found,) = ndimage.find_objects(lungs.astype(np.uint8), max_label=1)
    return None if found is None else tuple((axis.start, axis.stop) for axis in found)  # type: ignore[return-value]


def lung_is_missing(box: Box | None, borders: tuple[int, int] | None = BORDERS) -> bool:
    """Is the segmentation too bad to use?

    Args:
        box: From `box_of`.
        borders: See `BORDERS`; None = only a segmentation without any voxel is bad.

    Example:
        >>> lung_is_missing(((0, 9), (0, 9), (60, 390))), lung_is_missing(((0, 9), (0, 9), (200, 390)))
        (False, True)
    """
    return box is None or (borders is not None and (box[2][0] > borders[0] or box[2][1] < borders[1]))


def split_organs(lungs: Bools, borders: tuple[int, int] | None = BORDERS) -> Ids | None:
    """Organs from the lungs: right lung 1, heart and mediastinum 2, left lung 3.

    Lungs are parted at the middle of the volume. What is no lung within their box is heart, in the columns from a
    quarter of the box's width to an eighth before its end: the spine behind and the dome of the diaphragm, too.

    Args:
        lungs: (Z, Y, X) bool.
        borders: See `lung_is_missing`.

    Returns:
        (Z, Y, X) uint8 ids, or None where a lung is missing: take `rough_organs` on the grid of the network.

    Example:
        >>> lungs = np.zeros((1, 1, 12), dtype=bool)
        >>> lungs[..., 1:4] = lungs[..., 7:11] = True
        >>> split_organs(lungs, borders=None).tolist()
        [[[0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 0]]]
    """
    box = box_of(lungs)
    if box is None or lung_is_missing(box, borders):
        return None
    rows, lines, (first, last) = slice(*box[0]), slice(*box[1]), box[2]
    quarter = int((last - first) / 4)
    heart = (rows, lines, slice(first + quarter, last - int(0.5 * quarter)))
    middle = lungs.shape[2] // 2
    organs = lungs.astype(np.uint8)
    organs[:, :, middle:][lungs[:, :, middle:]] = LEFT
    organs[heart][~lungs[heart]] = HEART
    return organs


def rough_organs(size: tuple[int, int, int]) -> Ids:
    """Where the authors let a network look when the segmentation failed.

    Of six columns along axis 2 the first three are right lung, the last three left lung, and the four in the middle
    heart; where lung and heart overlap the ids 4 and 5 stand for both.

    Args:
        size: (Z, Y, X) voxels of the network's input.

    Returns:
        (Z, Y, X) uint8 ids.

    Example:
        >>> rough_organs((1, 1, 12)).tolist()
        [[[1, 1, 4, 4, 4, 4, 5, 5, 5, 5, 3, 3]]]
    """
    columns = np.array([RIGHT, ROUGH_RIGHT, ROUGH_RIGHT, ROUGH_LEFT, ROUGH_LEFT, LEFT], dtype=np.uint8)
    of_voxel = columns[np.arange(size[2]) * len(columns) // size[2]]
    return np.broadcast_to(of_voxel, size).copy()


# Many scans ----------------------------------------------------------------------------------------------------------


def partition_files(
    scans: Mapping[str, Path],
    folder: str | os.PathLike[str],
    read: Callable[[Path], NDArray[Any]],
    workers: int = 1,
    least: int = LEAST,
    progress: bool = True,
) -> dict[str, str]:
    """Lungs of many scans, one file each, `<folder>/<id>_seg.npz` with the key `segmap` (uint8, 1 = lung).

    Files that are there are left alone, so that an interrupted run goes on where it stopped; a file is either whole or
    not there. A scan that fails does not stop the others. In a program started as a file, call it under
    `if __name__ == "__main__":` when there are several workers.

    Args:
        scans: Id -> file.
        folder: Where to write, made if missing; nothing is written anywhere else.
        read: Reads a file as (Z, Y, X) in HU; with several workers a function of a module.
        workers: Processes.
        least: See `lungs_of`.
        progress: Show a bar, on standard error.

    Returns:
        Id -> what went wrong, of the scans that failed.

    Raises:
        InputError: The folder cannot be written to, or an argument is out of range.
    """
    if workers < 1 or least < 1:
        raise InputError(f"expected workers and least from 1 on, got {workers} and {least}")
    target = _made(Path(folder))
    todo = [(name, path) for name, path in scans.items() if not segmap_file(target, name).exists()]
    failed: dict[str, str] = {}
    with _bar(len(scans), len(scans) - len(todo), progress) as advance:
        for name, problem in _outcomes(todo, partial(_partition_one, folder=target, read=read, least=least), workers):
            if problem:
                failed[name] = problem
            advance()
    return failed


def segmap_file(folder: Path, name: str) -> Path:
    """File of a scan's lungs, as the authors name it."""
    return folder / f"{name}_seg.npz"


def read_segmap(file: Path) -> Bools:
    """Lungs that `partition_files` (or the authors' own program) wrote.

    Args:
        file: npz with the key `segmap`, 0 and 1.

    Returns:
        (Z, Y, X) bool.

    Raises:
        InputError: The file cannot be read, or holds something else.
    """
    try:
        with np.load(file, allow_pickle=False) as content:
            lungs: NDArray[Any] = content["segmap"]
    except MemoryError:
        raise
    except Exception as error:  # whatever the reader stumbles over, it is the content of this file
        raise InputError(
            f"{file}: expected lungs under the key 'segmap', got {type(error).__name__} "
            f"({' '.join(str(error).split())}): delete the file and run the partition again"
        ) from None
    if lungs.ndim != 3 or (lungs.size and not 0 <= lungs.min() <= lungs.max() <= 1):
        raise InputError(f"{file}: expected a volume of 0 and 1 under 'segmap', got {lungs.dtype} {lungs.shape}")
    return lungs.astype(bool)


def _partition_one(case: tuple[str, Path], folder: Path, read: Callable[[Path], NDArray[Any]], least: int) -> str:
    """Write one file; returns what went wrong, in words (exceptions of all kinds do not survive a process)."""
    name, path = case
    try:
        lungs = lungs_of(read(path), least)
    except (InputError, OSError, ValueError, MemoryError) as error:
        return str(error) or type(error).__name__
    file = segmap_file(folder, name)
    temporary = file.with_name(f".{secrets.token_hex(4)}.tmp.npz")
    try:
        np.savez_compressed(temporary, segmap=lungs.astype(np.uint8))
        temporary.replace(file)
    except OSError as error:
        return str(error)
    finally:
        temporary.unlink(missing_ok=True)
    return ""


def _outcomes(
    todo: list[tuple[str, Path]], work: Callable[[tuple[str, Path]], str], workers: int
) -> Iterator[tuple[str, str]]:
    """(id, problem) of each scan, as they end; never more than two scans wait for a process."""
    if workers == 1:
        yield from ((case[0], work(case)) for case in todo)
        return
    # Threads of torch do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = iter(todo)
        running: dict[Future[str], str] = {}
        while True:
            running |= {pool.submit(work, case): case[0] for case in islice(waiting, 2 * workers - len(running))}
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(done), done.result()


@contextmanager
def _bar(total: int, done: int, show: bool) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("lungs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task("lungs", total=total, completed=done)
        yield lambda: bar.advance(task)


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{secrets.token_hex(4)}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: expected a folder to write the lungs to, got {error.strerror or error}") from None
    return folder
