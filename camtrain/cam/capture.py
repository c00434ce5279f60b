"""One forward hook that keeps what a layer returned, safe from whatever happens to it later."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.cam.call import Call

_reading = threading.local()


@contextmanager
def reading_graph() -> Iterator[None]:
    """While the graph is read: a saved tensor of a checkpointed head is recomputed when it is looked at."""
    before = getattr(_reading, "now", False)
    _reading.now = True
    try:
        yield
    finally:
        _reading.now = before


@contextmanager
def own_forward() -> Iterator[None]:
    """A forward that camtrain runs by itself: taps and watches of the user's forward must not see it."""
    _reading.level = level() + 1
    try:
        yield
    finally:
        _reading.level -= 1


def level() -> int:
    """How deep in forwards of camtrain's own we are; 0 in the user's."""
    return getattr(_reading, "level", 0)


def recomputing() -> bool:
    """Does a forward that runs now only repeat an earlier one (gradient checkpointing)?"""
    return getattr(_reading, "now", False) or torch._C._current_graph_task_id() != -1


@contextmanager
def run_eagerly() -> Iterator[None]:
    """Run compiled modules as if they were not: their backward can neither be asked twice nor be differentiated."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def eager(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile out of a hook: compiled code cannot be differentiated twice.

    The compiler is asked only where it is loaded; loading it costs more than a training step.
    """
    if "torch._dynamo" not in sys.modules:
        return hook
    if not isinstance(hook, MethodType):
        return _disabled(hook)
    if hook.__func__ not in _methods:  # wrapping takes the compiler its time, and hooks come and go in every step
        _methods[hook.__func__] = _disabled(hook.__func__)
    return MethodType(_methods[hook.__func__], hook.__self__)


_methods: dict[Callable[..., Any], Callable[..., Any]] = {}
"""Of our own classes, so they are few."""


def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    found: Callable[..., Any] = torch._dynamo.disable(function)  # type: ignore[no-untyped-call]
    return found


# Layer -> how often it ran in the latest forward of camtrain's own. Only how fast maps are depends on it.
_ran: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def note_runs(layer: nn.Module, runs: int) -> None:
    """A forward is over, in which the layer ran so often."""
    _ran[layer] = runs


def last_run(layer: nn.Module | None) -> int:
    """Which run of a layer will be its last, as far as earlier forwards tell; 0 where none does."""
    return max(0, _ran.get(layer, 1) - 1) if layer is not None else 0


class LayerCapture:
    """Hook for the tapped layer.

    The network goes on with a clone: an in-place ReLU behind the layer would otherwise rewrite the captured tensor.

    Args:
        name: Dotted name, for messages.
        cut: The graph starts here: the captured tensor becomes a leaf and gradients are switched on, so that only the
            way from the layer to the logits is recorded (explain and validation). Off in training.
        begin: Of a cut layer the run at which it starts, where only the last counts. Of runs before it nothing is kept
            but that they were: EfficientNet's shared activation runs behind the stem, too, and a graph from there
            costs a third of the forward.
    """

    def __init__(self, name: str, cut: bool = False, begin: int = 0) -> None:
        self.name = name
        self.cut = cut
        self.begin = begin
        self.outputs: list[Tensor] = []
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        self.level = 0
        self._idle = False

    def attach(self, module: nn.Module, idle: bool = False) -> None:
        """Put the hook on the layer.

        Args:
            module: The layer.
            idle: Of what it gives keep nothing but that it ran, and begin no graph.
        """
        self.level, self._idle = level(), idle
        self._handle = module.register_forward_hook(eager(self._hook))

    def detach(self) -> None:
        """Take the hook off and forget what was captured."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self.outputs.clear()

    def _hook(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        if level() != self.level:
            return None
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise InputError(
                f"layer {self.name!r} returns a {type(output).__name__}, expected one floating tensor (B, K, *S): "
                "choose a layer inside it"
            )
        repeated = recomputing()
        if self._idle or (self.cut and not repeated and len(self.outputs) < self.begin):
            if not repeated:
                self.outputs.append(output.new_empty(len(output), 0))
            return None
        if self.cut and not repeated:
            # From here to the logits gradients are needed, under no_grad as under Lightning's validation.
            torch.set_grad_enabled(True)
        with torch.enable_grad():
            # Without a graph (a frozen backbone, or cut) the way from this layer up is all that a map needs. With
            # several tapped layers the graph starts at the first of them.
            kept = output if output.requires_grad else output.detach().clone().requires_grad_()
            if not repeated:
                self.outputs.append(kept)
            # A recomputation takes the same steps, or checkpointing would find other saved tensors than before.
            return kept.clone()


class InputCapture:
    """Hook for the image itself: what the model is called with becomes the start of the graph.

    The network goes on with a clone: an in-place operation on the image must not reach the leaf.
    """

    name = "input"

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        self._level = 0

    def attach(self, model: nn.Module) -> None:
        """Put the hook on the model."""
        self._level = level()
        self._handle = model.register_forward_pre_hook(eager(self._hook), with_kwargs=True)

    def detach(self) -> None:
        """Take the hook off and forget what was captured."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self.outputs.clear()

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if level() != self._level:
            return None
        call = Call.of(module, args, kwargs)
        if call is None or not call.direct:
            raise InputError(
                f"layer='input' needs a model that takes the image as a floating tensor (B, C, *S), and "
                f"{type(module).__name__} was called without one: name a layer instead"
            )
        repeated = recomputing()
        with torch.enable_grad():
            given = call.given
            kept = given if given.requires_grad else given.detach().clone().requires_grad_()
            if not repeated:
                self.outputs.append(kept)
            return call.arguments(kept.clone())
