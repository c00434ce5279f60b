"""`methods=` of the monitor: which maps are made in every epoch, and which need forwards of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.cam.asked import Asked, read_asked
from camtrain.cam.engine import Reshape
from camtrain.cam.fusing import fused
from camtrain.cam.method_table import methods
from camtrain.cam.several import maps_of_layers
from camtrain.cam.watch import ModuleWatch


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


def maps_of_methods(
    asked: Sequence[Asked],
    watch: ModuleWatch,
    sources: Mapping[str, Tensor],
    logits: Tensor,
    present: Tensor,
    shown: Tensor,
    reshape: Reshape | None,
) -> dict[str, Tensor]:
    """Maps of the present labels, one per method: of several layers their mean on the finest grid.

    Absent labels that are shown get maps of the methods that cost no forward.

    Args:
        asked: The methods.
        watch: What has seen the user's step.
        sources: What it took of the layers.
        logits: (B, L), with a graph down to the sources.
        present: (B, L) bool.
        shown: (B, L) bool: the present labels, and others that pictures show.
        reshape: Makes (B, K, *S') of a layer's output.

    Returns:
        Method -> (B, L, *S') with NaN for the other labels; a paid method is left out where no label is.

    Raises:
        InputError: What a method refuses, and for paid ones a step that does not run the network as one.
    """
    maps = {}
    for each in asked:
        if not each.paid:
            found = maps_of_layers(sources, logits, each.name, shown, False, reshape)
            maps[each.name] = fused(list(found.values()))
        elif (own := watch.rerun().maps(each.row, each.options, present, reshape)) is not None:
            maps[each.name] = fused(own)
    return maps


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


def first_only(present: Tensor) -> Tensor:
    """Of (B, L) bool all but the first True made False."""
    return present & (present.flatten().cumsum(0).view_as(present) == 1)


def only(maps: Mapping[str, Tensor], present: Tensor, asked: Tensor) -> dict[str, Tensor]:
    """The maps with NaN for what was asked for besides the present labels.

    Args:
        maps: Method -> (B, L, *S').
        present: (B, L) bool.
        asked: (B, L) bool: which maps were made.
    """
    if not bool((asked & ~present).any()):
        return dict(maps)
    return {m: torch.where(present[(..., *[None] * (each.ndim - 2))], each, torch.nan) for m, each in maps.items()}
