"""Decide pair by pair which logits of a user's step the loss may teach, without a word to the module or its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from camtrain._errors import InputError
from camtrain.cam.capture import eager, level, recomputing
from camtrain.cam.layer_lookup import find_layer
from camtrain.cam.logits import find_logits, pick_logits
from camtrain.cam.watch import LogitsFrom

Handle = torch.utils.hooks.RemovableHandle


class LogitGate:
    """While it is open, the gradient of each logit of the step is multiplied by a factor; values stay as they are.

    The logits are what the outermost module that the step calls returns, if that is (B, L). A hook of its own goes on
    that module when it is entered, after those of all watches: maps of the mask loss see the logits before the gate.

    Args:
        model: The LightningModule.
        logits: Dotted name of the module whose output the logits are, or a callable that picks them, as they are, from
            the output of the outermost module.

    Raises:
        InputError: There is no such module.
    """

    def __init__(self, model: nn.Module, logits: LogitsFrom = None) -> None:
        self._model = model
        self._head = find_layer(model, logits)[1] if isinstance(logits, str) else None
        self._pick: Callable[[Any], Tensor] | None = None if isinstance(logits, str) else logits
        self._handles: list[Handle] = []
        self._open = 0
        self._factor: Tensor | None = None
        self.raw: list[Tensor] = []
        self.gated: list[Tensor] = []

    def start(self, factor: Tensor) -> None:
        """Open the gate for one step.

        Args:
            factor: (B, L), what gradients are multiplied by.
        """
        self.stop()
        self._factor = factor
        modules = [self._head] if self._head is not None else _eager_modules(self._model)
        for module in modules:
            self._handles.append(module.register_forward_pre_hook(eager(self._enter)))

    def stop(self) -> None:
        """Remove every hook, and forget the step."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._open, self._factor = 0, None
        self.raw, self.gated = [], []

    def _enter(self, module: nn.Module, _: Any) -> None:
        if recomputing() or level():
            return
        self._open += 1
        if self._open == 1:
            # Registered only now, so that it comes after the hooks of whoever watches this forward.
            own: list[Handle] = []
            hook = eager(lambda *call: self._leave(own[0], *call))
            own.append(module.register_forward_hook(hook, with_kwargs=True, always_call=True))
            self._handles.append(own[0])
        else:
            self._open -= 1

    def _leave(self, handle: Handle, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        handle.remove()
        self._open = 0
        factor = self._factor
        if factor is None or output is None:
            return None
        found = pick_logits(output, self._pick) if self._pick is not None else find_logits(output)
        # What has no gradient teaches nothing: a teacher, a metric.
        if found is None or found.shape != factor.shape or not found.requires_grad:
            return None
        if self._head is None and self._pick is None and not self._from_features((args, kwargs), factor, module):
            return None
        holder = next((t for t in _tensors(output) if t is found), None)
        holder = holder if holder is not None else next((t for t in _tensors(output) if _same_values(t, found)), None)
        if holder is None:
            raise InputError(
                "OutsideSwap must hand on other logits than the network gave, but what logits= picks is no tensor of "
                "its own there (a slice, or makes new ones): name the module that gives them, such as logits='head'"
            )
        gated = _scaled(found, factor)
        self.raw.append(found)
        self.gated.append(gated)
        return tree_map(lambda value: gated.view_as(holder) if value is holder else value, output)

    def _from_features(self, given: Any, factor: Tensor, module: nn.Module) -> bool:
        """Are these logits, and not what a criterion or an activation made of logits?

        Raises:
            InputError: It cannot be told: a module with weights turns (B, L) into (B, L).
        """
        if not any(t.is_floating_point() and find_logits(t, len(factor)) is not None and t.shape[-1] == factor.shape[1]
                   for t in _tensors(given)):  # fmt: skip
            return True
        if next(module.parameters(), None) is None:
            return False
        raise InputError(
            f"the step calls a {type(module).__name__} with weights on a tensor {tuple(factor.shape)}, so that it "
            "cannot be told which of the two are the logits: say so with logits= (the module that gives them)"
        )


def _same_values(tensor: Tensor, logits: Tensor) -> bool:
    """Is this the tensor that the logits are a view of, such as (B,) of (B, 1)?"""
    same = tensor.data_ptr() == logits.data_ptr() and tensor.numel() == logits.numel()
    return same and tensor.requires_grad


def _scaled(logits: Tensor, factor: Tensor) -> Tensor:
    """The same values with other gradients; a factor of 0 cuts a logit off."""
    fixed = logits.detach()
    # Where a logit is infinite the difference would be NaN, and so would all that comes after it.
    change = torch.where(fixed.isfinite(), logits - fixed, 0.0)
    return fixed + factor.to(logits.dtype) * change


def _tensors(output: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda value: found.append(value) if isinstance(value, Tensor) else None, output)
    return found


def _eager_modules(model: nn.Module) -> list[nn.Module]:
    """All modules, without those inside a compiled one: its hooks are part of what was compiled."""
    found: list[nn.Module] = []
    compiled: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in compiled):
            continue
        found.append(module)
        if hasattr(module, "_orig_mod"):
            compiled.append(name)
    return found


def refuse_mixing(loss: Tensor, gated: list[Tensor], factor: Tensor) -> None:
    """Check that a loss treats every (case, label) pair by itself, so that closing one leaves the others right.

    The gradient of the open pairs must not change with the closed logits. A loss that is linear in pieces (hinge,
    ranking) changes nowhere, so that it passes whether it mixes or not.

    Args:
        loss: What the step returned, with its graph.
        gated: Logits behind the gate.
        factor: (B, L) of the gate.

    Raises:
        InputError: The loss mixes pairs, or does not depend on the logits of the gate.
    """
    first = torch.autograd.grad(loss, gated, create_graph=True, retain_graph=True, allow_unused=True)
    used = [(g, y) for g, y in zip(first, gated, strict=True) if g is not None]
    if not used:
        raise InputError(
            "the loss of training_step does not depend on the logits that OutsideSwap found, the output of the "
            "network: say where they are with logits= (a module's name, or a callable)"
        )
    opened = factor != 0
    # Uneven weights, so that mixed terms do not cancel in the sum.
    weights = torch.linspace(1, 2, factor.numel(), device=factor.device).reshape(factor.shape)
    for gradient, logits in used:
        try:
            total = (gradient * weights.to(gradient.dtype))[opened].sum()
            (second,) = torch.autograd.grad(total, logits, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            _unchecked(str(error).splitlines()[0])
            continue
        if second is not None and bool((second[~opened].nan_to_num() != 0).any()):
            raise InputError(
                "the module's loss mixes labels or cases (as a softmax does), so that OutsideSwap cannot leave a "
                "single truth out of it: pass loss=, a callable (logits, label) -> (B, L), or take keep='union'"
            )


def _unchecked(reason: str) -> None:
    rank_zero_warn(
        f"camtrain: whether the module's loss mixes labels cannot be checked ({reason}). OutsideSwap leaves single "
        "truths out of it; if it does mix them (as a softmax or a ranking does), pass loss="
    )
