"""`methods=` of the monitor: which maps are made in every epoch, and which need forwards of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from camtrain._errors import InputError
from camtrain.cam.asked import Asked, read_asked
from camtrain.cam.method_table import methods


def read_methods(given: Sequence[str | Mapping[str, Any]]) -> list[Asked]:
    """The argument `methods=`.

    Args:
        given: Names, or dicts with the key `name` and the method's options.

    Raises:
        InputError: No list, an unknown method or option, one named twice, or a paid one first.

    Example:
        >>> [each.name for each in read_methods(["hirescam", {"name": "scorecam", "channels": 16}])]
        ['hirescam', 'scorecam']
    """
    asked = read_asked(given)
    names = [each.name for each in asked]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"methods= lists {name!r} twice: give a second monitor, with a name=, the other options")
    if asked[0].paid:
        free = ", ".join(row.name for row in methods() if row.family == "gradient")
        raise InputError(
            f"the first of methods= has the plain keys, which are logged in every epoch, but {names[0]!r} needs "
            f"forwards of its own and is scored only where pictures are drawn: put one of {free} first"
        )
    return asked


def refuse_never(asked: Sequence[Asked], every_n_epochs: int) -> None:
    """Methods that are scored with pictures only need pictures.

    Raises:
        InputError: There never are any.
    """
    paid = next((each.name for each in asked if each.paid), None)
    if paid is not None and not every_n_epochs:
        raise InputError(
            f"method {paid!r} needs forwards of its own and is scored only in epochs with pictures, but "
            "every_n_epochs=0 means never: set it to 1 or more"
        )
