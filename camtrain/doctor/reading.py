"""The two readings of files: headers, which take moments, and whole volumes, which take as long as an epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from camtrain.data.manifest_paths import organ_names, stem_of
from camtrain.doctor.contents import lenient, read_content
from camtrain.doctor.facts import Facts, Header, Row
from camtrain.doctor.form_checks import exists
from camtrain.doctor.grids import how_grids_differ
from camtrain.doctor.headers import read_header, volume_files

_T = TypeVar("_T")
_PROBES = 3  # cases that are read to tell how long all will take
_PROBE_SECONDS = 20.0


@dataclass(frozen=True)
class Estimate:
    """How long a full read will take.

    Attributes:
        cases: To be read.
        bytes: On disk.
        seconds: In all, with the workers that were asked for.
        measured: Cases that the estimate comes from.
    """

    cases: int
    bytes: int
    seconds: float
    measured: int


def read_headers(facts: Facts, workers: int = 1) -> None:
    """Fill in the headers of all files that exist.

    Args:
        facts: Changed in place: headers and stray files.
        workers: Threads.
    """

    def one(index: int) -> tuple[Header | None, Header | None, tuple[str, ...]]:
        return _headers_of(facts.rows[index], set(facts.table.organs) if facts.table else set())

    for index, (image, organs, stray) in in_threads(one, range(len(facts.rows)), workers, "reading headers"):
        if image is not None:
            facts.image_headers[index] = image
        if organs is not None:
            facts.organ_headers[index] = organs
        if stray:
            facts.stray_files[index] = stray
    # In the order of the rows, whichever thread was first.
    facts.image_headers = dict(sorted(facts.image_headers.items()))
    facts.organ_headers = dict(sorted(facts.organ_headers.items()))
    facts.stray_files = dict(sorted(facts.stray_files.items()))


def _headers_of(row: Row, organs: set[str]) -> tuple[Header | None, Header | None, tuple[str, ...]]:
    image = read_header(row.image) if row.image is not None else None
    files, stray = _organ_files(row, organs)
    headers = [read_header(path) for path in files]
    if not files and row.organs is not None:
        headers = [Header(row.organ_files[0], fault="no file is named after an organ of the table")]
    # One header stands for all of them: one with a fault, or on another grid than the image, or the first.
    worst = next((header for header in headers if header.fault), None)
    worst = worst or next((header for header in headers if image and _elsewhere(image, header)), None)
    return image, worst or next(iter(headers), None), stray


def _organ_files(row: Row, organs: set[str]) -> tuple[list[Path], tuple[str, ...]]:
    """Files that are read for the organs of a case, and names of those that the table does not know."""
    files = list(row.organ_files)
    if not isinstance(row.organs, tuple):
        if not files or not files[0].is_dir() or not (inside := volume_files(files[0])):
            return files, ()
        known = [path for path in inside if not organs or stem_of(path) in organs]
        return known, tuple(stem_of(path) for path in inside if path not in known)
    named = organ_names([stem_of(path) for path in files], organs) if organs else {stem_of(path) for path in files}
    known = [path for path in files if stem_of(path) in named]
    return known, tuple(stem_of(path) for path in files if path not in known)


def _elsewhere(image: Header, organs: Header) -> bool:
    return (
        not image.fault
        and len(image.shape) == len(organs.shape) == 3
        and bool(how_grids_differ(image.shape, image.affine, organs.shape, organs.affine))
    )


def to_read(facts: Facts) -> list[int]:
    """Rows worth a full read: those of which a header has not said already that they cannot be read."""
    return [
        index
        for index, row in enumerate(facts.rows)
        if _readable((row.image,) if row.image else (), facts.image_headers.get(index))
        or _readable(row.organ_files, facts.organ_headers.get(index))
    ]


def _readable(files: Sequence[Path], header: Header | None) -> bool:
    return bool(files) and all(exists(path) for path in files) and not (header is not None and header.fault)


def probe(facts: Facts, workers: int = 1) -> Estimate | None:
    """Read a few cases of middling size, and say how long all will take; None where there is nothing to read.

    Args:
        facts: Changed in place: contents of these cases.
        workers: Threads that the full read will have.
    """
    cases = to_read(facts)
    if not cases:
        return None
    sizes = {index: _voxels(facts, index) for index in cases}
    by_size = sorted(cases, key=lambda index: sizes[index])
    middle = len(by_size) // 2
    chosen = by_size[max(0, middle - _PROBES // 2) :][:_PROBES]
    begin = time.perf_counter()
    measured: list[int] = []
    for index in chosen:
        if measured and time.perf_counter() - begin > _PROBE_SECONDS:
            break
        _read_into(facts, index)
        measured.append(index)
    per_voxel = (time.perf_counter() - begin) / max(1, sum(sizes[index] for index in measured))
    left = sum(sizes[index] for index in cases if index not in facts.contents)
    size = sum(h.size for headers in (facts.image_headers, facts.organ_headers) for h in headers.values())
    return Estimate(len(cases), size, per_voxel * left / max(1, workers), len(measured))


def _voxels(facts: Facts, index: int) -> int:
    """Voxels of image and organs as the headers say; 1 where no header could be read."""
    headers = (facts.image_headers.get(index), facts.organ_headers.get(index))
    return sum(header.voxels for header in headers if header is not None) or 1


def read_all(facts: Facts, workers: int = 1) -> None:
    """Read every case that is not read yet, as training would.

    Args:
        facts: Changed in place: contents.
        workers: Threads; each holds one case in memory.
    """
    rest = [index for index in to_read(facts) if index not in facts.contents]
    for _ in in_threads(lambda index: _read_into(facts, index), rest, workers, "reading volumes"):
        pass
    facts.contents = dict(sorted(facts.contents.items()))


def _read_into(facts: Facts, index: int) -> None:
    row = facts.rows[index]
    if not _readable((row.image,) if row.image else (), facts.image_headers.get(index)):
        row = replace(row, image=None)
    if not _readable(row.organ_files, facts.organ_headers.get(index)):
        row = replace(row, organs=None)
    facts.contents[index] = read_content(row, lenient(facts.table), facts.spacing, facts.size, facts.window)


def in_threads(
    action: Callable[[int], _T], indices: Sequence[int] | range, workers: int, title: str
) -> Iterator[tuple[int, _T]]:
    """Results as they come, with a bar on stderr where it takes a while; few are under way at a time.

    Args:
        action: What to do with an index.
        indices: All of them.
        workers: Threads; 1 = this one.
        title: Beside the bar.
    """
    with bar(title, len(indices)) as advance:
        if workers <= 1:
            for index in indices:
                yield index, action(index)
                advance()
            return
        with ThreadPoolExecutor(workers) as pool:
            waiting: dict[Future[_T], int] = {}
            todo = iter(indices)
            try:
                for index in todo:
                    waiting[pool.submit(action, index)] = index
                    if len(waiting) >= 2 * workers:
                        yield from _done(waiting, advance)
                while waiting:
                    yield from _done(waiting, advance)
            finally:
                for future in waiting:
                    future.cancel()


def _done(waiting: dict[Future[_T], int], advance: Callable[[], None]) -> Iterator[tuple[int, _T]]:
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        index = waiting.pop(future)
        yield index, future.result()
        advance()


class bar:  # noqa: N801  (a context manager, used as a function)
    """A progress bar on stderr, which a log file does not get."""

    def __init__(self, title: str, total: int) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> Callable[[], None]:
        self._bar.start()
        return lambda: self._bar.advance(self._task)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
