"""The one exception that tells a user about wrong input, and the help that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one sentence or two: what was expected, what came, what to do next. The command line prints it
    as one line and exits with code 2; in Python it is an ordinary `ValueError`.

    Example:
        >>> raise InputError("expected 3 labels, got 2: pass names= with 3 entries")
        Traceback (most recent call last):
        ...
        camtrain._errors.InputError: expected 3 labels, got 2: pass names= with 3 entries
    """


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Names that look like `name`, as a clause for an error message.

    Args:
        name: What the user wrote.
        known: What exists.
        n: How many names to offer at most.

    Returns:
        `"; nearest: a, b"`, or `"; known: a, b, ..."` when nothing is close, or `""` when nothing is known.

    Example:
        >>> nearest("laier4", ["layer1", "layer4"])
        '; nearest: layer4, layer1'
    """
    names = list(known)
    # The last part of a dotted name carries the meaning: 'layer4' should find 'net.layer4'.
    tails = {tail: full for full in reversed(names) for tail in (full, full.rsplit(".", 1)[-1])}
    close = list(dict.fromkeys(tails[t] for t in difflib.get_close_matches(name, tails, n=2 * n, cutoff=0.6)))[:n]
    if close:
        return "; nearest: " + ", ".join(close)
    more = ", ..." if len(names) > 2 * n else ""
    return "; known: " + ", ".join(names[: 2 * n]) + more if names else ""
