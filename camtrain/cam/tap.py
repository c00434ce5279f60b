"""LayerTap: watch one layer of a model in a training loop of any kind."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.cam.capture import LayerCapture, eager, level, recomputing
from camtrain.cam.engine import Reshape, attention_maps, spatial
from camtrain.cam.layer_lookup import around, default_layer, find_layer, plain_name
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
        call: Which call of the layer counts, where one forward runs it several times (layer=None: the last one).

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
        self._open: list[nn.Module] = []
        self._probing = False
        self._level = 0
        if layer is not None:
            find_layer(model, layer)

    @property
    def name(self) -> str | None:
        """Dotted name of the tapped layer; with `layer=None` known from the first forward on."""
        return None if self._capture is None else self._capture.name

    @property
    def activations(self) -> Tensor:
        """What the layer returned in the last forward, with its graph."""
        return self._last()

    def __enter__(self) -> LayerTap:
        self._level = level()
        if self._layer is not None:
            self._attach(*find_layer(self.model, self._layer))
        elif self._capture is not None:
            self._attach(*find_layer(self.model, self._capture.name))
        else:
            self._bracket(self.model)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._open.clear()
        if self._capture is not None:
            self._capture.detach()

    def maps(self, y: Any, method: str = "hirescam", labels: Labels = None, create_graph: bool = True) -> Tensor:
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
        with torch.inference_mode(False), torch.enable_grad():
            batch = len(spatial(source, self._reshape))
            logits = pick_logits(y, self._pick, batch)
        return attention_maps(source, logits, method, labels, create_graph, self._reshape)

    def _attach(self, name: str, module: nn.Module) -> None:
        """Watch the layer, and every module around it: the user may call any of these to run a forward."""
        self._capture = LayerCapture(name)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        brackets = {id(m): m for m in (module, *(modules[n] for n in around(name)))}
        for bracket in brackets.values():
            if not (self._layer is None and bracket is self.model and self._handles):
                self._bracket(bracket)
        self._capture.attach(module)

    def _bracket(self, module: nn.Module) -> None:
        self._handles.append(module.register_forward_pre_hook(eager(self._enter), with_kwargs=True))
        self._handles.append(module.register_forward_hook(eager(self._leave), always_call=True))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The outermost call begins a forward: what an earlier one left is not mixed in, and its graph not kept."""
        if self._probing or recomputing() or level() != self._level:
            return
        if not self._open:
            if self._capture is None:
                self._probe(args, kwargs)
            else:
                self._capture.outputs.clear()
        self._open.append(module)

    def _leave(self, module: nn.Module, _: tuple[Any, ...], __: Any) -> None:
        if self._probing or recomputing() or level() != self._level or module not in self._open:
            return
        while self._open and self._open.pop() is not module:
            pass

    def _probe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._probing = True
        try:
            run = as_called(self.model, args, kwargs)
            self._attach(*default_layer(self.model, first_image(args, kwargs), run))
        finally:
            self._probing = False

    def _last(self) -> Tensor:
        outputs = self._capture.outputs if self._capture is not None else []
        call = -1 if self.call is None and self._layer is None else self.call
        return chosen_call(outputs, call, None if self.name is None else plain_name(self.name))


def chosen_call(outputs: list[Tensor], call: int | None, name: str | None) -> Tensor:
    """One of the outputs that a layer gave in one forward.

    Raises:
        InputError: None, or several and `call` does not say which.
    """
    if not outputs:
        which = "the tapped layer" if name is None else f"layer {name!r}"
        raise InputError(
            f"{which} has not run: call the model inside the with block before maps(), and under checkpointing with "
            "use_reentrant=False; a model compiled as a whole by torch.compile skips hooks (compile the part before "
            "the layer, leave the head eager)"
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


def find_image(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first argument of a forward that looks like an image (B, C, *S)."""
    images = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim >= 3)
    return next(images, None)


def first_image(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first argument of a forward that looks like an image (B, C, *S).

    Raises:
        InputError: There is none.
    """
    image = find_image(args, kwargs)
    if image is not None:
        return image
    raise InputError("layer=None needs a model that takes the image as a tensor (B, C, *S): name the layer with layer=")


def as_called(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], object]:
    """Call the model as the user did, with the image replaced by that of fewer samples."""
    image = first_image(args, kwargs)

    def run(first: Tensor) -> object:
        def swap(value: Any) -> Any:
            if value is image:
                return first
            return value[: len(first)] if isinstance(value, Tensor) and value.shape[:1] == image.shape[:1] else value

        return model(*(swap(a) for a in args), **{key: swap(value) for key, value in kwargs.items()})

    return run
