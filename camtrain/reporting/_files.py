"""Files that are either whole or not there."""

from __future__ import annotations

import os
import re
import secrets
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary neighbour; it takes the place of `path` only when the block ends without an exception.

    Args:
        path: The file to make or to replace; its folder is made where it is missing.

    Yields:
        The temporary path, in the same folder and with the same endings.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "scores.csv"
        >>> with replacing(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The ending stays last: nibabel and Pillow choose the format by it. mkstemp is not used: its files are private.
    temporary = path.with_name(f".{secrets.token_hex(4)}.tmp.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)  # noqa: PTH105  (Path.replace is the same call; this one is known to be atomic)
    finally:
        temporary.unlink(missing_ok=True)


def file_stem(text: str, limit: int = 80) -> str:
    """A file name part for any text; different texts keep different names.

    Args:
        text: Case or label as the user wrote it.
        limit: Longest result in characters.

    Returns:
        The text itself where it is safe, else its safe characters and a checksum.

    Example:
        >>> file_stem("pleural_effusion"), file_stem("a/b"), file_stem("a_b")
        ('pleural_effusion', 'a_b-07f4401c', 'a_b')
    """
    safe = re.sub(r"[^\w.+=-]+", "_", text).lstrip(".")
    if safe == text and 0 < len(safe) <= limit:
        return safe
    return f"{safe[: limit - 9]}-{zlib.crc32(text.encode()):08x}"


def distinct(names: Iterable[str]) -> list[str]:
    """The names, with `_2`, `_3`, ... behind repeated ones.

    Example:
        >>> distinct(["a", "b", "a"])
        ['a', 'b', 'a_2']
    """
    seen: set[str] = set()
    result = []
    for name in names:
        free = next(n for i in range(1, 1 << 30) if (n := name if i == 1 else f"{name}_{i}") not in seen)
        seen.add(free)
        result.append(free)
    return result
