"""The folder of `--out`: can it be written to, and one that appears whole or not at all."""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from camtrain._errors import InputError


def check_writable(target: Path) -> None:
    """Try to write there, before anything is computed; folders made for the trial are taken away again.

    Args:
        target: A folder, or where one is to be made.

    Raises:
        InputError: It is a file, or cannot be made or written to.
    """
    if target.exists() and not target.is_dir():
        raise InputError(f"--out expects a folder, got the file {target}: choose another name")
    missing = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError as error:
        raise InputError(
            f"--out expects a folder that can be written to, got {target} ({error.strerror}): choose another"
        ) from error
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def appearing(out: str | Path, overwrite: bool, made_by: str) -> Iterator[Path]:
    """Fill a hidden neighbour of `out`, which takes its place when the block ends without an exception.

    Args:
        out: Folder to make. It may exist when it is empty.
        overwrite: Replace an earlier result; only a folder whose scores.json says `made_by` is one.
        made_by: The command.

    Yields:
        The folder to write into.

    Raises:
        InputError: `out` is taken, or cannot be made.
    """
    target = Path(out)
    _check_free(target, overwrite, made_by)
    working = target.with_name(f".{target.resolve().name}.{secrets.token_hex(4)}.tmp")
    old = working.with_suffix(".old")
    try:
        try:
            working.mkdir(parents=True)
        except OSError as error:
            raise InputError(
                f"--out: cannot make a folder beside {target} ({error.strerror}): choose another"
            ) from error
        yield working
        if target.exists():
            target.rename(old)
        working.rename(target)
    finally:
        shutil.rmtree(working, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _check_free(target: Path, overwrite: bool, made_by: str) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"--out expects a folder, got the file {target}: choose another name")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(f"--out {target} is not empty: choose another folder, or pass --overwrite")
    # A mistyped --out shall not delete somebody's data.
    if not _is_result(target, made_by):
        raise InputError(f"--out {target} holds other files than an earlier result of {made_by}: choose another folder")


def _is_result(target: Path, made_by: str) -> bool:
    try:
        said = json.loads((target / "scores.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(said, dict) or said.get("made_by") != made_by:
        return False
    rows = said.get("labels", {}).values()
    files = {"scores.json", "montage.png", *(row.get(key) for row in rows for key in ("file", "allowed"))}
    return all(path.name in files for path in target.iterdir())
