"""One forward hook that keeps what a layer returned, safe from whatever happens to it later."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from camtrain._errors import InputError


def in_backward() -> bool:
    """Is a backward pass running on this thread? Then a forward hook fires for a recomputation (checkpointing)."""
    return torch._C._current_graph_task_id() != -1


class LayerCapture:
    """Hook for the tapped layer.

    The network goes on with a clone: an in-place ReLU behind the layer would otherwise rewrite the captured tensor.

    Args:
        name: Dotted name, for messages.
        cut: The graph starts here: the captured tensor becomes a leaf and gradients are switched on, so that only the
            way from the layer to the logits is recorded (explain and validation). Off in training.
    """

    def __init__(self, name: str, cut: bool = False) -> None:
        self.name = name
        self.cut = cut
        self.outputs: list[Tensor] = []
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def attach(self, module: nn.Module) -> None:
        """Put the hook on the layer."""
        self._handle = module.register_forward_hook(self._hook)

    def detach(self) -> None:
        """Take the hook off and forget what was captured."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self.outputs.clear()

    def _hook(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        if in_backward():
            return None
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise InputError(
                f"layer {self.name!r} returns a {type(output).__name__}, expected one floating tensor (B, K, *S): "
                "choose a layer inside it"
            )
        if self.cut:
            # From here to the logits gradients are needed, under no_grad as under Lightning's validation.
            torch.set_grad_enabled(True)
        with torch.enable_grad():
            # Without a graph (a frozen backbone, or cut) the way from this layer up is all that a map needs. With
            # several tapped layers the graph starts at the first of them.
            kept = output if output.requires_grad else output.detach().clone().requires_grad_()
            self.outputs.append(kept)
            return kept.clone()
