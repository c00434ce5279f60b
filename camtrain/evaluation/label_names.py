"""Where label names come from, and the organ table that goes with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from camtrain._errors import InputError
from camtrain.anatomy import OrganTable


class Names:
    """Label names of data, model and table."""

    def __init__(self, given: Sequence[str] | None, data: Any, model: nn.Module, table: Any) -> None:
        self.sources = [("names=", given), ("the data", _labels(data)), ("the model", _labels(model))]
        source = getattr(data, "table", None) if table is None else table
        self.table = None if source is None else OrganTable.load(source)

    def resolve(self, outputs: int) -> list[str]:
        """Label names in the order of the outputs.

        Raises:
            InputError: Their number differs from the outputs, or data and model disagree.
        """
        listed = [(who, [str(n) for n in names]) for who, names in self.sources if names is not None]
        if not listed:
            fits = self.table is not None and len(self.table.labels) == outputs
            return list(self.table.labels) if fits and self.table else [f"label_{i}" for i in range(outputs)]
        who, names = listed[0]
        if len(names) != outputs:
            raise InputError(f"{who} has {len(names)} label names, but the network gives {outputs} outputs: name= each")
        for other, different in listed[1:]:
            if different != names:
                raise InputError(
                    f"{who} names the labels {', '.join(names)}; {other} names {', '.join(different)}: evaluate with "
                    "the data that the model was trained for, or say names="
                )
        return names


def _labels(owner: Any) -> list[str] | None:
    found = getattr(owner, "labels", None)
    usable = isinstance(found, list | tuple) and all(isinstance(name, str) for name in found)
    return list(found) if usable and found is not None else None
