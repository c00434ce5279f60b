"""What this room reads of a user's data: one batch or many, labels only when the number of outputs is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from camtrain._batch import Adapter, Batch, read_batch
from camtrain._errors import InputError

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
