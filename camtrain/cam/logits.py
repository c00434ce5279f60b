"""Pick the logits (B, L) out of whatever a model returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from camtrain._errors import InputError

PickLogits = Callable[[Any], Tensor]
_USUAL_KEYS = ("logits", "out", "output", "pred", "y_hat")


def find_logits(output: Any, batch: int | None = None) -> Tensor | None:
    """The logits in a model's output, or None when nothing there looks like them.

    A tensor (B, L); (B,) becomes (B, 1). Of a dict the usual key, of a tuple or dict the only tensor of that form.

    Args:
        output: What the model returned.
        batch: B, where it is known.

    Example:
        >>> import torch
        >>> find_logits({"features": torch.zeros(2, 4, 3, 3), "logits": torch.zeros(2, 5)}).shape
        torch.Size([2, 5])
    """
    if isinstance(output, Tensor):
        return _as_columns(output, batch)
    if isinstance(output, Mapping):
        for key in _USUAL_KEYS:
            if isinstance(output.get(key), Tensor):
                return _as_columns(output[key], batch)
        output = list(output.values())
    if isinstance(output, list | tuple):
        found = [c for item in output if isinstance(item, Tensor) and (c := _as_columns(item, batch)) is not None]
        return found[0] if len(found) == 1 else None
    return None


def _as_columns(output: Tensor, batch: int | None) -> Tensor | None:
    if not output.is_floating_point() or output.ndim not in (1, 2) or (batch is not None and len(output) != batch):
        return None
    plain = output.as_subclass(Tensor)
    return plain[:, None] if plain.ndim == 1 else plain


def pick_logits(output: Any, pick: PickLogits | None = None, batch: int | None = None) -> Tensor:
    """The logits in a model's output.

    Args:
        output: What the model returned.
        pick: The user's callable, tried instead of the rules of `find_logits`.
        batch: B, where it is known.

    Raises:
        InputError: Nothing there is (B, L).
    """
    given = output if pick is None else pick(output)
    found = find_logits(given, batch)
    if found is None:
        what = "logits= returned" if pick is not None else "the model returns"
        raise InputError(
            f"expected logits (B, L), but {what} {_describe(given)}: "
            "pass logits=, a callable that picks them from the model's output"
        )
    return found


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a dict with the keys {', '.join(map(str, output))}"
    if isinstance(output, list | tuple):
        return f"a {type(output).__name__} of {', '.join(_describe(item) for item in output)}"
    return f"a {type(output).__name__}"
