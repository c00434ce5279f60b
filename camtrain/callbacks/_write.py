"""Write changed words back into a user's batch, in the place and the type in which they came."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from camtrain._batch import Adapter
from camtrain._errors import InputError


def written(
    batch: Any, changed: Mapping[str, Tensor], keys: Mapping[str, str] | None = None, adapter: Adapter | None = None
) -> Any:
    """A copy of the batch with other values for some words of the contract.

    Args:
        batch: The user's batch; it is left as it is.
        changed: Contract word -> new value, of as many elements as the old one.
        keys: Contract word -> key in the user's batch.
        adapter: What makes the contract's words of the batch; it must hand on the batch's own tensors.

    Returns:
        A batch of the same structure.

    Raises:
        InputError: A word is a tensor that the batch does not hold.

    Example:
        >>> batch = {"img": torch.zeros(2, 1, 3), "label": torch.zeros(2)}
        >>> written(batch, {"image": torch.ones(2, 1, 3)}, {"image": "img"})["img"].sum()
        tensor(6.)
    """
    words = batch if adapter is None else adapter(batch)
    old = {word: words[(keys or {}).get(word, word)] for word in changed}
    swaps = {id(old[word]): like(old[word], value) for word, value in changed.items()}
    if adapter is None:
        result = copy.copy(batch)
        for word in changed:
            result[(keys or {}).get(word, word)] = swaps[id(old[word])]
        return result
    found: set[int] = set()

    def swap(value: Any) -> Any:
        if id(value) not in swaps:
            return value
        found.add(id(value))
        return swaps[id(value)]

    result = tree_map(swap, batch)
    for word, value in old.items():
        if id(value) not in found:
            raise InputError(
                f"OutsideSwap must write a changed {word} into the batch, but adapter= makes a new tensor of it: let "
                "the adapter hand on the tensors of the batch as they are"
            )
    return result


def like(old: Tensor, value: Tensor) -> Tensor:
    """A value in shape, dtype and type of another (a MONAI MetaTensor keeps its geometry)."""
    # The type is kept by cloning: a subclass knows what belongs to it.
    copy = old.detach().clone()
    torch.Tensor.copy_(copy.as_subclass(Tensor), value.reshape(old.shape))
    return copy
