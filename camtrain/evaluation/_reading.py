"""What this room reads of a user's data: one batch or many, labels only when the number of outputs is known."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from camtrain._batch import Adapter, Batch, read_batch
from camtrain._errors import InputError, nearest

Keys = Mapping[str, str] | None


def is_batch(data: Any, adapter: Adapter | None) -> bool:
    """Is this one batch, and not an iterable of them?"""
    if isinstance(data, Mapping):
        return True
    return adapter is not None and isinstance(data, list | tuple) and any(isinstance(item, Tensor) for item in data)


def batches_of(data: Any, adapter: Adapter | None, progress: bool, what: str) -> Iterator[Any]:
    """One batch or many, after the user's adapter.

    Raises:
        InputError: Neither.
    """
    if is_batch(data, adapter):
        yield data if adapter is None else adapter(data)
        return
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise InputError(f"data= expects a batch (a dict) or an iterable of batches, got {type(data).__name__}")
    # On stderr: what is printed of the result may go into a file.
    for batch in track(data, what, console=Console(stderr=True), transient=True, disable=not progress):
        yield batch if adapter is None else adapter(batch)


def unlabelled(words: Any, keys: Keys) -> Batch:
    """The batch without its labels: class indices cannot be read before the number of outputs is known."""
    if not isinstance(words, Mapping):
        return read_batch(words, keys)
    key = (keys or {}).get("label", "label")
    rest = {word: value for word, value in words.items() if word != key}
    return read_batch(rest, {word: name for word, name in (keys or {}).items() if word != "label"})


def labels_of(words: Mapping[str, Any], keys: Keys, outputs: int) -> Tensor | None:
    """The labels (B, L) of a batch, None where it has none.

    Raises:
        InputError: They do not fit the number of outputs.
    """
    return read_batch(words, keys, outputs=outputs).label


def image_for(model: nn.Module, batch: Batch) -> Tensor:
    """The image of a batch, where the model is.

    Raises:
        InputError: There is none.
    """
    if batch.image is None:
        raise InputError("the batch has no image: pass keys={'image': ...} or adapter=")
    image = batch.image if batch.image.is_floating_point() else batch.image.float()
    parameter = next(model.parameters(), None)
    return image if parameter is None else image.to(parameter.device)


def columns_of(labels: Any, names: Sequence[str]) -> list[int]:
    """The columns of the outputs that a user asks for.

    Args:
        labels: Columns or names, one of either, or a bool for every label.
        names: Names of all labels, in the order of the outputs.

    Raises:
        InputError: An unknown label, or a mask of another length.

    Example:
        >>> columns_of("b", "abc"), columns_of([2, "a"], "abc"), columns_of([True, False, True], "abc")
        ([1], [2, 0], [0, 2])
    """
    given = labels.tolist() if hasattr(labels, "tolist") else labels
    if isinstance(given, str) or (isinstance(given, int) and not isinstance(given, bool)):
        return [_column(given, names)]
    if not isinstance(given, Sequence):
        raise InputError(f"labels= expects columns, names or a bool mask ({len(names)},), got {type(labels).__name__}")
    # Numbers of NumPy and tensors of one number, in a list.
    items = [item.item() if getattr(item, "ndim", None) == 0 else item for item in given]
    if not any(isinstance(item, bool) for item in items):
        return [_column(item, names) for item in items]
    if len(items) != len(names) or not all(isinstance(item, bool) for item in items):
        raise InputError(f"a bool labels= expects one bool for each of the {len(names)} labels, got {labels!r}")
    return [column for column, wanted in enumerate(items) if wanted]


def _column(label: Any, names: Sequence[str]) -> int:
    if isinstance(label, str):
        if label not in names:
            raise InputError(f"labels= names {label!r}, which is none of the labels{nearest(label, names)}")
        return list(names).index(label)
    try:
        column = operator.index(label)
    except TypeError:
        raise InputError(f"labels= expects columns, names or a bool mask ({len(names)},), got {label!r}") from None
    if not 0 <= column < len(names):
        raise InputError(f"labels= must lie in 0..{len(names) - 1}, got {column}")
    return column
