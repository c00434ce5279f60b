"""Tensors that were made under inference mode, for a forward of which autograd takes note."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def recordable(values: Any) -> Any:
    """The same, of memory that is shared: autograd refuses to save tensors that were made under inference mode.

    A copy would be that of a whole batch of volumes, and what a network does to its input in place would not reach the
    caller, as it does without a watch.

    Args:
        values: Tensors in any nest of lists, tuples and dicts; what is no such tensor stays itself.

    Example:
        >>> with torch.inference_mode():
        ...     image = torch.rand(2, 1, 4, 4, 4)
        >>> usual = recordable({"image": image})["image"]
        >>> usual.is_inference(), usual.data_ptr() == image.data_ptr()
        (False, True)
    """
    return tree_map(_recordable, values)


def _recordable(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_inference():
        return value
    # A subclass may keep its values elsewhere; that of MONAI is a tensor with more attributes.
    of_monai = type(value).__name__ == "MetaTensor" and type(value).__module__.startswith("monai.")
    if not (type(value) is Tensor or of_monai) or value.layout is not torch.strided or value.is_complex():
        return value.clone()
    usual = torch.empty(0, dtype=value.dtype, device=value.device)
    usual.set_(value.untyped_storage(), value.storage_offset(), value.size(), value.stride())
    if of_monai:
        usual = usual.as_subclass(type(value))
        vars(usual).update(vars(value))
    return usual
