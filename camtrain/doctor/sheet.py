"""The manifest as text, read without giving up at the first fault: what `read_manifest` refuses is looked at here."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from camtrain.data.manifest import OPTIONAL, REQUIRED


@dataclass(frozen=True)
class Sheet:
    """A CSV file as far as it can be read.

    Attributes:
        path: The file.
        columns: Header, stripped.
        rows: Number of the row in the file, and its fields by column; short rows lack some, blank rows are left out.
        ragged: Numbers of rows with more or fewer fields than the header, with how many they have.
        delimiter: What separates the columns.
        encoding: What it was read as.
        fault: Why nothing could be read, "" = something could.
    """

    path: Path
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[int, Mapping[str, str]], ...] = ()
    ragged: tuple[tuple[int, int], ...] = ()
    delimiter: str = ","
    encoding: str = "utf-8"
    fault: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """Columns that are labels."""
        return tuple(name for name in dict.fromkeys(self.columns) if name and name not in REQUIRED + OPTIONAL)

    def where(self, number: int) -> str:
        """File and row, for messages."""
        return f"{self.path}, row {number}"


def read_sheet(path: str | os.PathLike[str]) -> Sheet:
    r"""Read a CSV file with any of the usual separators and encodings.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "cases.csv"
        >>> _ = file.write_text("id;image;split\nA;ct.nii;train\n")
        >>> sheet = read_sheet(file)
        >>> sheet.delimiter, sheet.columns, dict(sheet.rows[0][1])["image"]
        (';', ('id', 'image', 'split'), 'ct.nii')
    """
    file = Path(path)
    try:
        raw = file.read_bytes()
    except OSError as error:
        return Sheet(file, fault=error.strerror or str(error))
    text, encoding = _decode(raw)
    first = next((line for line in text.splitlines() if line.strip()), "")
    if not first:
        return Sheet(file, encoding=encoding, fault="the file is empty")
    delimiter = max(",;\t", key=first.count)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        lines = [(reader.line_num, [field.strip() for field in fields]) for fields in reader]
    except csv.Error as error:
        return Sheet(file, encoding=encoding, delimiter=delimiter, fault=str(error))
    lines = [(number, fields) for number, fields in lines if any(fields)]
    columns = tuple(lines[0][1])
    return Sheet(
        path=file,
        columns=columns,
        rows=tuple((number, dict(zip(columns, fields, strict=False))) for number, fields in lines[1:]),
        ragged=tuple((number, len(fields)) for number, fields in lines[1:] if len(fields) != len(columns)),
        delimiter=delimiter,
        encoding=encoding,
    )


def _decode(raw: bytes) -> tuple[str, str]:
    """UTF-8 (with or without a mark), UTF-16 with a mark as spreadsheets write it, or Latin-1, which fits always."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", errors="replace"), "utf-16"
    try:
        return raw.decode("utf-8-sig"), "utf-8"
    except UnicodeDecodeError:
        return raw.decode("latin-1"), "latin-1"
