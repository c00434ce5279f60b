"""Faults of an input, gathered so that all of them are told at once: one line each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from camtrain._errors import InputError

# Lines of one message; the rest is counted. A wrong separator makes every row of a file wrong.
MOST = 50


def told(error: InputError) -> list[str]:
    r"""The faults of an error, one line each.

    Example:
        >>> told(InputError("a.csv: 2 faults\n- row 2: x\n- row 3: y")), told(InputError("expected\n a number"))
        (['row 2: x', 'row 3: y'], ['expected a number'])
    """
    _, *lines = str(error).splitlines() or [""]
    if lines and all(line.startswith("- ") for line in lines):
        return [line.removeprefix("- ") for line in lines]
    return [" ".join(str(error).split())]


class Faults:
    """What is wrong, in the order of finding it.

    Args:
        subject: What was read, for the first line where there are several faults.

    Attributes:
        aside: What else the first line of several faults says.

    Example:
        >>> faults = Faults("cases.csv")
        >>> with faults.noting():
        ...     raise InputError("row 2: expected a number, got 'x': correct it")
        >>> with faults.noting():
        ...     raise InputError("row 5: expected a number, got 'y': correct it")
        >>> faults.stop()
        Traceback (most recent call last):
        ...
        camtrain._errors.InputError: cases.csv: 2 faults
        - row 2: expected a number, got 'x': correct it
        - row 5: expected a number, got 'y': correct it
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.lines: list[str] = []
        self.aside = ""

    def __len__(self) -> int:
        """Number of faults."""
        return len(self.lines)

    def add(self, line: str) -> None:
        """Note one fault; the same one is noted once."""
        if line not in self.lines[-MOST:]:
            self.lines.append(line)

    def add_all(self, error: InputError, before: str = "") -> None:
        """Note the faults of an error, each with a place before it."""
        for line in told(error):
            self.add(f"{before}{line}")

    @contextmanager
    def noting(self, before: str = "") -> Iterator[None]:
        """Note an `InputError` instead of raising it."""
        try:
            yield
        except InputError as error:
            self.add_all(error, before)

    def stop(self) -> None:
        """Raise what was found.

        Raises:
            InputError: There is a fault; a single one is the message itself, several are a list.
        """
        if self.lines:
            raise InputError(self.message())

    def message(self) -> str:
        """One fault as it is; several below a line that counts them."""
        if len(self.lines) == 1:
            return self.lines[0]
        shown = [f"- {' '.join(line.split())}" for line in self.lines[:MOST]]
        if len(self.lines) > MOST:
            shown.append(f"- and {len(self.lines) - MOST} more")
        return "\n".join([f"{self.subject}: {len(self.lines)} faults{self.aside}", *shown])
