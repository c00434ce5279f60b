"""Watch a user's module from outside: what the layer gave, and the logits that came of it, in the user's own forward.

The callbacks use this on LightningModules they know nothing about. Hooks sit on the tapped layer and on every module
around it; the logits are the output of the smallest module around the layer that gives a tensor (B, L).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from camtrain._errors import InputError
from camtrain.cam.capture import LayerCapture, eager, level, recomputing
from camtrain.cam.layer_lookup import around, find_layer, plain_name
from camtrain.cam.logits import PickLogits, find_logits, pick_logits
from camtrain.cam.tap import chosen_call, find_image

LogitsFrom = str | PickLogits | None


class ModuleWatch:
    """Hooks on one layer and the modules around it.

    Args:
        model: The outer module (a LightningModule).
        layer: Dotted name or module.
        logits: Callable that picks (B, L) from the output of the outermost module around the layer; or the dotted name
            of the module whose output they are (a head beside the backbone); None = found as described above.
        call: Which call of the layer counts, where one step runs it several times.
        cut: Validation: gradients exist only from the layer to the logits, and what the user's code gets back is
            detached. Where the user's code has switched gradients on by itself, they are left alone. Off in training.

    Raises:
        InputError: No such layer.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | nn.Module,
        logits: LogitsFrom = None,
        call: int | None = None,
        cut: bool = False,
    ) -> None:
        self.model = model
        self.name, self._layer = find_layer(model, layer)
        self.call = call
        self.cut = cut
        self._pick = None if isinstance(logits, str) else logits
        modules = dict(model.named_modules(remove_duplicate=False))
        self._around = list({id(modules[n]): modules[n] for n in around(self.name)}.values())
        self._head = find_layer(model, logits)[1] if isinstance(logits, str) else None
        self._capture = LayerCapture(self.name, cut=cut)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._outputs: list[tuple[nn.Module, Any]] = []
        self._open: list[nn.Module] = []
        self._holds_modes = False
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.entry: nn.Module | None = None

    def start(self) -> None:
        """Attach the hooks. Calling it twice is calling it once."""
        if self._handles:
            return
        self._capture.attach(self._layer)
        for module in {id(m): m for m in [*self._around, self._head] if m is not None}.values():
            if module is not self._layer:
                self._handles.append(module.register_forward_pre_hook(eager(self._enter), with_kwargs=True))
                self._handles.append(module.register_forward_hook(eager(self._leave), always_call=True))

    def stop(self) -> None:
        """Remove every hook and restore the grad mode, also after an exception in the middle of a forward."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._capture.detach()
        self._restore()
        self.forget()

    def forget(self) -> None:
        """Drop what the last step left (graphs are memory)."""
        self._capture.outputs.clear()
        self._outputs.clear()
        self._open.clear()
        self.inputs = None

    def take(self, outputs: int | None = None, prefer: int | None = None) -> tuple[Tensor, Tensor]:
        """What the last step gave.

        Args:
            outputs: L, where it is known (the number of label names).
            prefer: L that is expected but not sure: a module around the layer that gives so many is taken before a
                smaller one that gives another number (pooled features).

        Returns:
            The layer's output and the logits (B, L) that depend on it.

        Raises:
            InputError: The layer did not run or ran several times, or no module around it gives logits.
        """
        self._restore()
        source = chosen_call(self._capture.outputs, self.call, plain_name(self.name))
        # Views made under no_grad or inference mode would lose the graph.
        with torch.inference_mode(False), torch.enable_grad():
            return source, self._logits(source, outputs, prefer if outputs is None else outputs)

    def _logits(self, source: Tensor, outputs: int | None, wanted: int | None) -> Tensor:
        batch = self._batch(source)
        if self._head is not None or self._pick is not None:
            ran = self._head if self._head is not None else self._outermost()
            given = None if ran is None else self._given(ran)
            found = None if given is None else pick_logits(given, self._pick, batch)
        else:
            found = self._smallest(batch, wanted)
        if found is None:
            raise InputError(self._no_logits())
        if outputs is not None and found.shape[1] != outputs:
            raise InputError(
                f"there are {outputs} labels, but the logits found for layer {plain_name(self.name)!r} have the shape "
                f"{tuple(found.shape)}: set the network's number of outputs to the number of labels, or say where the "
                "logits are with logits= (a module's name such as 'head', or a callable)"
            )
        return found

    def _smallest(self, batch: int, wanted: int | None) -> Tensor | None:
        """Logits of the smallest module around the layer that gives (B, L); of the wanted width, if one does."""
        each = [find_logits(self._given(module), batch) for module in self._around]
        found = [logits for logits in each if logits is not None]
        fitting = [logits for logits in found if logits.shape[1] == wanted]
        return next(iter(fitting or found), None)

    def _batch(self, source: Tensor) -> int:
        """B: the layer itself may work on slices, (B * N, K, *S)."""
        image = None if self.inputs is None or len(self._capture.outputs) > 1 else find_image(*self.inputs)
        return len(source if image is None else image)

    def _given(self, module: nn.Module) -> Any:
        """What a module gave in the run that counts; None if it did not run."""
        own = [out for m, out in self._outputs if m is module]
        calls = len(self._capture.outputs)
        return own[(self.call or 0) % calls if len(own) == calls else -1] if own else None

    def _outermost(self) -> nn.Module | None:
        ran = {id(module) for module, _ in self._outputs}
        return next((module for module in reversed(self._around) if id(module) in ran), None)

    def _no_logits(self) -> str:
        if self._head is not None:
            return "the module that logits= names did not run in this step: name the module that gives the logits"
        return (
            f"no module around layer {plain_name(self.name)!r} gives logits (B, L): if they are made in the step "
            "itself or by a module beside the backbone, say so with logits='name.of.the.head' or logits=callable"
        )

    # What the hooks do ------------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if recomputing() or level():
            return None
        first = not self._open
        self._open.append(module)
        if first and module is not self._head:
            self.entry, self.inputs = module, (args, kwargs)
        if not (self.cut and first):
            return None
        if not self._holds_modes and (torch.is_inference_mode_enabled() or not torch.is_grad_enabled()):
            self._holds_modes = True
            _MODES.leave()
        return tree_map(_normal, args), tree_map(_normal, kwargs)

    def _leave(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        if recomputing() or level() or module not in self._open:
            return None
        while self._open and self._open.pop() is not module:
            pass
        self._outputs.append((module, output))
        if self._open:
            return None
        # What the user does to the logits in place (a sigmoid) must not reach those that were watched.
        if not self._holds_modes:
            return tree_map(_copied, output)
        if self._head is not None and module is not self._head and self._head not in set(module.modules()):
            return None  # The head is yet to come; gradients must last until then.
        # Another watch of the same forward has yet to see the output with its graph; the last one detaches.
        return tree_map(_detached, output) if self._restore() else None

    def _restore(self) -> bool:
        if not self._holds_modes:
            return False
        self._holds_modes = False
        return _MODES.give_back()


class _UserModes:
    """Inference and grad mode of the user's forward: the first watch that enters leaves them, the last restores them.

    Trainer.validate and Trainer.test run under inference mode, where no gradient can ever be taken.
    """

    def __init__(self) -> None:
        self._holders = 0
        self._context: torch.inference_mode | None = None
        self._grad_enabled = False

    def leave(self) -> None:
        self._holders += 1
        if self._holders > 1:
            return
        self._grad_enabled = torch.is_grad_enabled()
        if torch.is_inference_mode_enabled():
            self._context = torch.inference_mode(False)
            self._context.__enter__()
        torch.set_grad_enabled(False)

    def give_back(self) -> bool:
        """Was this the last holder?"""
        self._holders -= 1
        if self._holders:
            return False
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None
        torch.set_grad_enabled(self._grad_enabled)
        return True


_MODES = _UserModes()


def _normal(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.ndim <= 2 else value


def _detached(value: Any) -> Any:
    return _copied(value).detach() if isinstance(value, Tensor) else value
