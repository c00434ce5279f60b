"""Watch a user's module from outside: what the layer gave, and the logits that came of it, in the user's own forward.

The callbacks use this on LightningModules they know nothing about. Hooks sit on the tapped layer and on every module
around it; the logits are the output of the smallest module around the layer that gives a tensor (B, L).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from camtrain._errors import InputError
from camtrain.cam.capture import LayerCapture, in_backward
from camtrain.cam.layer_lookup import find_layer, plain_name
from camtrain.cam.logits import PickLogits, find_logits, pick_logits
from camtrain.cam.tap import chosen_call

LogitsFrom = str | PickLogits | None


class ModuleWatch:
    """Hooks on one layer and the modules around it.

    Args:
        model: The outer module (a LightningModule).
        layer: Dotted name or module.
        logits: Callable that picks (B, L) from the output of the outermost module around the layer; or the dotted name of
            the module whose output they are (a head beside the backbone); None = found as described above.
        call: Which call of the layer counts, where one step runs it several times.
        cut: Validation: gradients exist only from the layer to the logits, whatever the grad mode around, and what the
            user's code gets back is detached. Off in training.

    Raises:
        InputError: No such layer.
    """

    def __init__(
        self, model: nn.Module, layer: str | nn.Module, logits: LogitsFrom = None, call: int | None = None, cut: bool = False
    ) -> None:
        self.model = model
        self.name, self._layer = find_layer(model, layer)
        self.call = call
        self.cut = cut
        self._pick = None if isinstance(logits, str) else logits
        modules = dict(model.named_modules())
        self._around = [modules[n] for n in _ancestors(self.name) if n in modules]
        self._head = find_layer(model, logits)[1] if isinstance(logits, str) else None
        self._capture = LayerCapture(self.name, cut=cut)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._outputs: list[tuple[nn.Module, Any]] = []
        self._open: list[nn.Module] = []
        self._modes: tuple[torch.inference_mode | None, bool] | None = None
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.entry: nn.Module | None = None

    def start(self) -> None:
        """Attach the hooks. Calling it twice is calling it once."""
        if self._handles:
            return
        self._capture.attach(self._layer)
        for module in [*self._around, *([self._head] if self._head is not None else [])]:
            if module is not self._layer:
                self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leave, always_call=True))

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

    def take(self, outputs: int | None = None) -> tuple[Tensor, Tensor]:
        """What the last step gave.

        Args:
            outputs: L, where it is known (the number of label names).

        Returns:
            The layer's output and the logits (B, L) that depend on it.

        Raises:
            InputError: The layer did not run or ran several times, or no module around it gives logits.
        """
        self._restore()
        source = chosen_call(self._capture.outputs, self.call, plain_name(self.name))
        # Views made under no_grad or inference mode would lose the graph.
        with torch.inference_mode(False), torch.enable_grad():
            return source, self._logits(source, outputs)

    def _logits(self, source: Tensor, outputs: int | None) -> Tensor:
        batch = len(source)
        calls = len(self._capture.outputs)
        index = (self.call or 0) % calls
        if self._head is not None:
            given = [out for module, out in self._outputs if module is self._head]
        elif self._pick is not None:
            outer = [out for module, out in self._outputs if module is self._outermost()]
            given = [pick_logits(outer[index if len(outer) == calls else -1], self._pick, batch)] if outer else []
        else:
            given = []
            for module in self._around:
                own = [out for m, out in self._outputs if m is module]
                if own and find_logits(own[index if len(own) == calls else -1], batch) is not None:
                    given = own
                    break
        if not given:
            raise InputError(self._no_logits())
        found = pick_logits(given[index if len(given) == calls else -1], None, batch)
        if outputs is not None and found.shape[1] != outputs:
            raise InputError(
                f"there are {outputs} labels, but the smallest module around {plain_name(self.name)!r} gives {tuple(found.shape)}: "
                "set the network's number of outputs to the number of labels, or say where the logits are with logits= (a "
                "module's name such as 'head', or a callable)"
            )
        return found

    def _outermost(self) -> nn.Module | None:
        ran = {id(module) for module, _ in self._outputs}
        return next((module for module in reversed(self._around) if id(module) in ran), None)

    def _no_logits(self) -> str:
        return (
            f"no module around layer {plain_name(self.name)!r} gives logits (B, L): if they are made in the step itself or by a "
            "module beside the backbone, say so with logits='name.of.the.head' or logits=callable"
        )

    # What the hooks do ------------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if in_backward():
            return None
        first = not self._open
        self._open.append(module)
        if first and module is not self._head:
            self.entry, self.inputs = module, (args, kwargs)
        if not (self.cut and first):
            return None
        if self._modes is None:
            self._leave_inference()
        return tree_map(_normal, args), tree_map(_normal, kwargs)

    def _leave_inference(self) -> None:
        """Trainer.validate and Trainer.test run under inference mode, where no gradient can ever be taken."""
        before = torch.is_grad_enabled()
        context = None
        if torch.is_inference_mode_enabled():
            context = torch.inference_mode(False)
            context.__enter__()
        self._modes = (context, before)
        torch.set_grad_enabled(False)

    def _leave(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        if in_backward() or module not in self._open:
            return None
        while self._open and self._open.pop() is not module:
            pass
        self._outputs.append((module, output))
        if not self.cut or self._open or (self._head is not None and module is not self._head):
            return None
        self._restore()
        return tree_map(_detached, output)

    def _restore(self) -> None:
        if self._modes is None:
            return
        context, grad_enabled = self._modes
        self._modes = None
        if context is not None:
            context.__exit__(None, None, None)
        torch.set_grad_enabled(grad_enabled)


def _ancestors(name: str) -> list[str]:
    """Names of the modules around a layer, from the smallest to the model itself.

    Example:
        >>> _ancestors("net.layer4.1")
        ['net.layer4', 'net', '']
    """
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)]


def _normal(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


Run = Callable[[Tensor], object]
