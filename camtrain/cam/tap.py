"""LayerTap: watch one layer of a model in a training loop of any kind."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.cam.capture import LayerCapture, in_backward
from camtrain.cam.engine import Reshape, attention_maps
from camtrain.cam.layer_lookup import default_layer, find_layer
from camtrain.cam.logits import PickLogits, pick_logits
from camtrain.cam.selection import Labels


class LayerTap:
    """Watch a layer while a model runs, and ask for maps that a loss can be trained through.

    Args:
        model: Any module. The tap adds hooks while the `with` block lasts, and nothing else.
        layer: Dotted name, module, or None for the last feature map (found at the first forward, with one extra
            forward of one sample).
        logits: Callable that picks (B, L) from what `maps` is given, where that is no tensor (B, L) itself.
        reshape: Linear callable that makes (B, K, *S') of the layer's output (tokens of a transformer).
        call: Which call of the layer counts, where one forward runs it several times.

    Raises:
        InputError: No such layer.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6, 3))
        >>> with LayerTap(model, "1") as tap:
        ...     y = model(torch.rand(2, 1, 8))
        ...     maps = tap.maps(y, method="hirescam")
        >>> maps.shape, bool(torch.allclose(maps.sum(-1) + model[3].bias, y))
        (torch.Size([2, 3, 6]), True)
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | nn.Module | None,
        logits: PickLogits | None = None,
        reshape: Reshape | None = None,
        *,
        call: int | None = None,
    ) -> None:
        self.model = model
        self.call = call
        self._layer = layer
        self._pick = logits
        self._reshape = reshape
        self._capture: LayerCapture | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._probing = False
        if layer is not None:
            find_layer(model, layer)

    @property
    def name(self) -> str | None:
        """Dotted name of the tapped layer; None before the first forward of a tap with `layer=None`."""
        return None if self._capture is None else self._capture.name

    @property
    def activations(self) -> Tensor:
        """What the layer returned in the last forward, with its graph."""
        return self._last()

    def __enter__(self) -> LayerTap:
        if self._layer is not None:
            self._attach(*find_layer(self.model, self._layer))
        self._handles.append(self.model.register_forward_pre_hook(self._start, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._capture is not None:
            self._capture.detach()

    def maps(
        self, y: Any, method: str = "hirescam", labels: Labels = None, create_graph: bool = True
    ) -> Tensor:
        """Maps of the last forward.

        Args:
            y: What the model returned in that forward.
            method: A name of `ct.methods()`.
            labels: None = all; ints = those columns in that order; LongTensor (B, n) = per sample; bool (L,) = those
                columns; bool (B, L) = per sample, NaN where not selected.
            create_graph: Keep the graph, so that a loss on the maps trains the network.

        Returns:
            (B, n, *S'), signed, on the layer's grid.

        Raises:
            InputError: The layer did not run, ran several times, or the logits do not come from it.
        """
        source = self._last()
        return attention_maps(
            source, pick_logits(y, self._pick, len(source)), method, labels, create_graph, self._reshape
        )

    def _attach(self, name: str, module: nn.Module) -> None:
        self._capture = LayerCapture(name)
        self._capture.attach(module)

    def _start(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Each forward of the model begins anew: what an earlier one left is not mixed in."""
        if self._probing or in_backward():
            return
        if self._capture is None:
            self._probing = True
            try:
                self._attach(*default_layer(model, first_image(args, kwargs), as_called(model, args, kwargs)))
            finally:
                self._probing = False
        assert self._capture is not None  # noqa: S101 - for the type checker
        self._capture.outputs.clear()

    def _last(self) -> Tensor:
        outputs = self._capture.outputs if self._capture is not None else []
        return chosen_call(outputs, self.call, self.name)


def chosen_call(outputs: list[Tensor], call: int | None, name: str | None) -> Tensor:
    """One of the outputs that a layer gave in one forward.

    Raises:
        InputError: None, or several and `call` does not say which.
    """
    if not outputs:
        raise InputError(
            f"the tapped layer {name or ''!r} has not run: call the model inside the with block before maps(); a model compiled "
            "as a whole by torch.compile skips hooks (compile the part before the layer, leave the head eager)"
        )
    if call is None and len(outputs) > 1:
        raise InputError(
            f"layer {name!r} ran {len(outputs)} times in one forward: say which run counts with call=0 ... "
            f"call={len(outputs) - 1}, or -1 for the last"
        )
    try:
        return outputs[call or 0]
    except IndexError:
        raise InputError(f"call={call} but layer {name!r} ran {len(outputs)} time(s) in this forward") from None


def first_image(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim >= 3:
            return value
    raise InputError("layer=None needs a model that takes the image as a tensor (B, C, *S): name the layer with layer=")


def as_called(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], object]:
    """Call the model as the user did, with the image replaced."""
    image = first_image(args, kwargs)

    def run(first: Tensor) -> object:
        def swap(value: Any) -> Any:
            return first if value is image else value

        return model(*(swap(a) for a in args), **{key: swap(value) for key, value in kwargs.items()})

    return run
