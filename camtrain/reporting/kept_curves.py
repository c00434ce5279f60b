"""The curves of a run whose `scores.csv` grows: what has been read once is not read again."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import BinaryIO

from camtrain.reporting.report_digest import Curves
from camtrain.reporting.run_dir import Score, scores_in

_HEADER = ",".join(Score._fields) + "\n"
_BLOCK = 1 << 20


class KeptCurves:
    r"""Curves that are kept from one page to the next, as long as the file only gets longer.

    Making rows of a file costs a hundred times as much as looking whether it still begins as before (a checksum).

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "scores.csv"
        >>> _ = path.write_text("epoch,step,split,method,label,measure,value\n0,9,val,,nodule,auroc,0.5\n")
        >>> kept = KeptCurves()
        >>> kept.read(path)[0].last("val", "", "auroc", "nodule")
        0.5
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._curves, self._rows, self._size, self._sum = Curves([]), 0, 0, 0

    def read(self, path: Path) -> tuple[Curves, int, list[str]]:
        """What a `scores.csv` says.

        Args:
            path: The file; it may not exist yet.

        Returns:
            Its curves, how many rows could be read, and what is wrong with the others.

        Raises:
            OSError: It cannot be opened.
        """
        if not path.exists():
            self._forget()
            return self._curves, 0, []
        with path.open("rb") as file:
            if _checksum(file, self._size) != self._sum:
                self._forget()
                file.seek(0)
            before, fresh = self._size, file.read()
            faults = self._add(fresh)
            if faults and before:  # lines are counted from the beginning
                self._forget()
                file.seek(0)
                faults = self._add(fresh := file.read())
        found = self._curves, self._rows, faults
        if faults or (fresh and not fresh.endswith(b"\n")):  # nothing to build on
            self._forget()
        return found

    def _add(self, fresh: bytes) -> list[str]:
        if self._size and not fresh:
            return []
        text = fresh.decode("utf-8", errors="replace")
        rows, faults = scores_in(io.StringIO(_HEADER + text if self._size else text, newline=""))
        self._curves.add(rows)
        self._rows += len(rows)
        self._size += len(fresh)
        self._sum = zlib.crc32(fresh, self._sum)
        return faults


def _checksum(file: BinaryIO, size: int) -> int | None:
    """Of the first bytes; None where there are fewer."""
    found = 0
    while size and (block := file.read(min(size, _BLOCK))):
        found = zlib.crc32(block, found)
        size -= len(block)
    return None if size else found
