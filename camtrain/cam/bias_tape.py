"""How much of a logit comes from constants: biases and the shifts of norms, per sample, in the backward pass itself.

Functions are watched, not modules: `F.conv3d(x, w, b)` in somebody's forward counts as well as `nn.Conv3d`, and what
runs twice counts twice. Nothing is copied: a hook set before an in-place ReLU hears of the value before it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Arguments = Callable[[int, str], Any]
Constant = Callable[[Tensor, Arguments], Tensor | None]


class BiasTape(TorchFunctionMode):
    """While active, notes the constant that each function adds; backward passes then sum <constant, gradient>.

    Only what lies on the way from the scores to the tensor that `autograd.grad` is asked about runs in that pass, so a
    branch beside the layer is left out by itself.

    Args:
        batch: B. Functions that work on B * N rows (slices, patches) are folded, rows of a sample being adjacent.

    Attributes:
        unfolded: Names of functions whose rows are no multiple of B.
    """

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.unfolded: set[str] = set()
        self._total: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function and note what it adds."""
        given = kwargs or {}
        output = func(*args, **given)
        rule = _CONSTANTS.get(func)
        if rule is None or not isinstance(output, Tensor) or not output.requires_grad:
            return output
        # Without a graph: what a checkpointed part saves must not depend on whether somebody listens.
        with torch.no_grad():
            constant = rule(output, lambda at, word: args[at] if at < len(args) else given.get(word))
        if constant is None:
            return output
        hear = partial(self._hear, constant.detach(), getattr(func, "__name__", str(func)))
        output.register_hook(hear)  # type: ignore[no-untyped-call]
        return output

    def _hear(self, constant: Tensor, name: str, gradient: Tensor) -> None:
        if gradient.shape[0] % self.batch:
            self.unfolded.add(name)
            return
        rows = (gradient.detach() * constant).reshape(self.batch, -1)
        part = rows.sum(dim=1, dtype=_widest(rows))
        self._total = part if self._total is None else self._total + part

    def take(self, like: Tensor) -> Tensor:
        """(B,) what all backward passes since the last call heard."""
        total, self._total = self._total, None
        return torch.zeros(self.batch, device=like.device, dtype=_widest(like)) if total is None else total


def _widest(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _on_channels(constant: Tensor | None, output: Tensor) -> Tensor | None:
    return None if constant is None else constant.reshape(-1, *[1] * (output.ndim - 2))


def _linear(output: Tensor, argument: Arguments) -> Tensor | None:
    bias: Tensor | None = argument(2, "bias")
    return bias


def _convolution(output: Tensor, argument: Arguments) -> Tensor | None:
    batched = output.ndim == argument(1, "weight").ndim
    return _on_channels(argument(2, "bias"), output) if batched else None


def _running_norm(flag: str, output: Tensor, argument: Arguments) -> Tensor | None:
    """On running statistics a norm is affine, and its shift is beta - gamma mean / sqrt(var + eps)."""
    mean, var, weight, bias = (
        argument(at, word) for at, word in enumerate(("running_mean", "running_var", "weight", "bias"), start=1)
    )
    own = argument(5, flag)
    if own or (own is None and flag == "use_input_stats"):
        return _on_channels(bias, output)
    eps = argument(7, "eps")
    shift = -mean / (var + (1e-5 if eps is None else eps)).sqrt()
    shift = shift if weight is None else shift * weight
    return _on_channels(shift if bias is None else shift + bias, output)


def _layer_norm(output: Tensor, argument: Arguments) -> Tensor | None:
    bias: Tensor | None = argument(3, "bias")
    return bias


def _group_norm(output: Tensor, argument: Arguments) -> Tensor | None:
    return _on_channels(argument(3, "bias"), output)


def _added(output: Tensor, argument: Arguments) -> Tensor | None:
    """A parameter that is added by itself (a bias layer, a positional embedding)."""
    if argument(2, "alpha") is not None:
        return None
    operands = (argument(0, "input"), argument(1, "other"))
    return next((operand for operand in operands if isinstance(operand, nn.Parameter)), None)


_CONSTANTS: dict[Any, Constant] = {
    F.linear: _linear,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.conv_transpose1d: _convolution,
    F.conv_transpose2d: _convolution,
    F.conv_transpose3d: _convolution,
    F.batch_norm: partial(_running_norm, "training"),
    F.instance_norm: partial(_running_norm, "use_input_stats"),
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    torch.add: _added,
    Tensor.add: _added,
    Tensor.__add__: _added,
    Tensor.__radd__: _added,
    Tensor.add_: _added,
    Tensor.__iadd__: _added,
}
