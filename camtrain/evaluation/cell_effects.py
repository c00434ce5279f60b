"""What the cells of a layer do for the logits, by experiment: take one away and look."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from camtrain._errors import InputError


@torch.no_grad()
def cell_effects(head: Callable[[Tensor], Tensor], activations: Tensor) -> Tensor:
    """How far each logit falls when the activations of a single cell are set to zero.

    One forward of the head per cell, and nothing assumed about it. Behind exactly one linear layer this equals
    HiResCAM of the layer; behind others it is still what the cell does, while maps are not. Cells are zeroed in the
    layer's output: what a cell has seen of the image is not taken from its neighbours.

    Args:
        head: From the layer's output to the logits (B, L), such as `lambda a: net.head(a.flatten(1))`, in eval mode.
        activations: (B, K, *S') output of the layer.

    Returns:
        (B, L, *S') logit minus logit without the cell.

    Raises:
        InputError: Activations without spatial axes, or a head that does not give (B, L).

    Example:
        >>> cell_effects(lambda a: a.flatten(1) @ torch.tensor([[2.0], [-1.0]]), torch.tensor([[[3.0, 5.0]]]))
        tensor([[[ 6., -5.]]])
    """
    if activations.ndim < 3:
        raise InputError(f"expected activations (B, K, *S), got {tuple(activations.shape)}: pass the layer's output")
    whole = head(activations)
    if whole.ndim != 2 or len(whole) != len(activations):
        raise InputError(f"expected logits (B, L) from head, got {tuple(whole.shape)}: give what follows the layer")
    flat, falls = activations.flatten(2), []
    for cell in range(flat.shape[2]):
        without = flat.clone()
        without[..., cell] = 0
        falls.append(whole - head(without.reshape(activations.shape)))
    return torch.stack(falls, dim=2).reshape(*whole.shape, *activations.shape[2:])
