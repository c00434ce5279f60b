"""A manifest, its organ table and its splits, checked together; where they have faults, volumes are looked at as well.

So that a user who has to mend a file anyway hears of all that is wrong, and not of one kind of fault per run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable
from camtrain.data._faults import Faults
from camtrain.data.manifest import Case, Manifest, gather_manifest
from camtrain.data.manifest_splits import Splits, splits_from_files
from camtrain.data.manifest_transforms import ReadCase

# Who misspelt a column should not wait for minutes; a small study is looked through in this time.
SECONDS = 10.0
_seconds = ContextVar("seconds", default=SECONDS)


@contextmanager
def not_looking() -> Iterator[None]:
    """Within, nothing is looked at: for who reads all files anyway (`camtrain doctor`)."""
    token = _seconds.set(0.0)
    try:
        yield
    finally:
        _seconds.reset(token)


def checked_manifest(
    path: str | os.PathLike[str],
    table: Any,
    labels: Sequence[str] | None,
    splits: Splits | None,
    check_files: bool = True,
    **options: Any,
) -> tuple[OrganTable, Manifest]:
    """The organ table and the manifest of a data module.

    Args:
        path: The manifest.
        table: What `OrganTable.load` takes.
        labels: Label columns, None = all.
        splits: Splits from elsewhere.
        check_files: Are all files there, and what is in them where something else is wrong? False touches none.
        options: As `read_manifest` takes them.

    Raises:
        InputError: What is wrong, all of it.
    """
    faults = Faults(os.fspath(path))
    rules: OrganTable | None = None
    with faults.noting():
        rules = OrganTable.load(os.fspath(table) if isinstance(table, os.PathLike) else table)
    known = None if rules is None else rules.labels
    try:
        read, lost = gather_manifest(path, labels, faults, check_files=check_files, rules=known, **options)
    except InputError as error:
        faults.add_all(error)
        raise InputError(faults.message()) from None
    if splits is not None:
        with faults.noting():
            read = splits_from_files(read, splits)
    if faults and check_files:
        look_inside([case for case in read.cases if case.where not in lost], rules, faults)
    faults.stop()
    assert rules is not None  # noqa: S101  (there are no faults)
    return rules, read


def look_inside(cases: Sequence[Case], table: OrganTable | None, faults: Faults) -> int:
    """Read the volumes of cases for at most ten seconds, and note what is wrong with them.

    Args:
        cases: Those whose files are there.
        table: Organ table; None leaves organs unread.
        faults: Takes what is found, and how many cases were left.

    Returns:
        Number of cases that were read.
    """
    read, begin, limit = ReadCase(table, organs=table is not None), time.perf_counter(), _seconds.get()
    if limit == 0:
        return 0
    for number, case in enumerate(cases):
        if time.perf_counter() - begin > limit:
            faults.aside = f" ({number} of {len(cases)} cases were looked into; camtrain doctor looks into all)"
            return number
        try:
            read(case)
        except InputError as error:
            faults.add_all(error, f"{case.where}: ")
    return len(cases)
