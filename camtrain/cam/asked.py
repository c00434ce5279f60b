"""A method as a user asks for it: a name, or a dict with the method's options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from camtrain._errors import InputError
from camtrain.cam.answering import read_options
from camtrain.cam.method_table import Method, find_method


@dataclass(frozen=True)
class Asked:
    """One attention method with its options.

    Attributes:
        row: Of the method table.
        options: By name.
    """

    row: Method
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the method."""
        return self.row.name

    @property
    def key(self) -> str:
        """The name, with the options that the user gave.

        Example:
            >>> read_asked([{"name": "lrp", "contrast": "paper"}])[0].key
            'lrp(contrast=paper)'
        """
        options = ", ".join(f"{name}={value}" for name, value in self.options.items() if name != "progress")
        return f"{self.name}({options})" if options else self.name

    @property
    def paid(self) -> bool:
        """Does it need forwards of its own, beyond the user's?"""
        return self.row.family != "gradient"


def read_asked(given: Sequence[str | Mapping[str, Any]]) -> list[Asked]:
    """The methods of a list of names, or of dicts with the key `name` and the method's options.

    Raises:
        InputError: No list, or an unknown method or option.

    Example:
        >>> [each.name for each in read_asked(["hirescam", {"name": "scorecam", "channels": 16}])]
        ['hirescam', 'scorecam']
    """
    if not given or isinstance(given, str | Mapping):
        raise InputError(f"methods= expects a list such as ['hirescam'], got {given!r}")
    return [_read(each) for each in given]


def _read(given: str | Mapping[str, Any]) -> Asked:
    options: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"name": given}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise InputError(
            "an entry of methods= is a name, or a dict with the key 'name' and options of that method, "
            f"such as {{'name': 'scorecam', 'channels': 16}}; got {given!r}"
        )
    row = find_method(name)
    if row.family == "perturbation":
        # A bar of its own would run into that of whoever asks many times.
        options.setdefault("progress", False)
    read_options(row, options)
    return Asked(row, options)
