"""Decide pair by pair which logits of a user's step the loss may teach, without a word to the module or its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from camtrain._errors import InputError
from camtrain.cam.capture import eager, level, recomputing
from camtrain.cam.layer_lookup import find_layer
from camtrain.cam.logits import find_logits, pick_logits
from camtrain.cam.watch import LogitsFrom


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
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
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
            own: list[torch.utils.hooks.RemovableHandle] = []
            hook = eager(lambda _module, _args, output: self._leave(own[0], output))
            own.append(module.register_forward_hook(hook, always_call=True))
            self._handles.append(own[0])
        else:
            self._open -= 1

    def _leave(self, handle: torch.utils.hooks.RemovableHandle, output: Any) -> Any:
        handle.remove()
        self._open = 0
        factor = self._factor
        if factor is None or output is None:
            return None
        found = pick_logits(output, self._pick) if self._pick is not None else find_logits(output)
        if found is None or found.shape != factor.shape:
            return None
        holder = next((t for t in _tensors(output) if t is found or t.data_ptr() == found.data_ptr()), None)
        if holder is None or holder.numel() != found.numel():
            raise InputError(
                "OutsideSwap must hand on other logits than the network gave, but logits= makes new ones: let it pick "
                "a tensor of the output as it is, or name the module that gives them"
            )
        gated = _scaled(found, factor)
        self.raw.append(found)
        self.gated.append(gated)
        return tree_map(lambda value: gated.view_as(holder) if value is holder else value, output)


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

    The gradient of the open pairs must not change with the closed logits.

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
    for gradient, logits in used:
        if not gradient.requires_grad:
            continue
        (second,) = torch.autograd.grad(gradient[opened].sum(), logits, retain_graph=True, allow_unused=True)
        if second is not None and bool((second[~opened] != 0).any()):
            raise InputError(
                "the module's loss mixes labels or cases (as a softmax does), so that OutsideSwap cannot leave a "
                "single truth out of it: pass loss=, a callable (logits, label) -> (B, L), or take keep='union'"
            )
