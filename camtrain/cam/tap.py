"""LayerTap: watch layers of a model in a training loop of any kind."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Generic, Literal, Self, cast, overload

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from camtrain._errors import InputError
from camtrain.cam.call import Call
from camtrain.cam.capture import InputCapture, LayerCapture, eager, level, recomputing
from camtrain.cam.engine import Reshape, gradients_on, spatial
from camtrain.cam.fusing import fused
from camtrain.cam.layer_lookup import INPUT, LayerSpec, around, default_layer, find_layer, plain_name
from camtrain.cam.logits import PickLogits, pick_logits
from camtrain.cam.selection import Labels
from camtrain.cam.several import Layers, find_layers, key_of, listed, maps_of_layers, refuse_repeats

# What maps() gives: a tensor of one layer, a dict of several. With a default, a plain `tap: LayerTap` is a whole type.
Maps = TypeVar("Maps", Tensor, dict[str, Tensor], default=Tensor)


class LayerTap(Generic[Maps]):
    """Watch a layer while a model runs, or several, and ask for maps that a loss can be trained through.

    Args:
        model: Any module. The tap adds hooks while the `with` block lasts, and nothing else.
        layer: Dotted name, module, "input" for the image that the model is called with, or None for the last feature
            map (found at the first forward, with one extra forward of one sample). A list of them taps all in one
            forward.
        logits: Callable that picks (B, L) from what `maps` is given, where that is no tensor (B, L) itself.
        reshape: Linear callable that makes (B, K, *S') of a layer's output (tokens of a transformer).
        call: Which call of the layers counts, where one forward runs them several times (layer=None: the last one).

    Raises:
        InputError: No such layer, or one listed twice.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6, 3))
        >>> with LayerTap(model, "1") as tap:
        ...     y = model(torch.rand(2, 1, 8))
        ...     maps = tap.maps(y, method="hirescam")
        >>> maps.shape, bool(torch.allclose(maps.sum(-1) + model[3].bias, y))
        (torch.Size([2, 3, 6]), True)
        >>> with LayerTap(model, ["input", "1"]) as tap:
        ...     y = model(torch.rand(2, 1, 8))
        ...     {name: tuple(maps.shape) for name, maps in tap.maps(y).items()}, tap.maps(y, fuse="mean").shape
        ({'input': (2, 3, 8), '1': (2, 3, 6)}, torch.Size([2, 3, 8]))
    """

    # fmt: off
    @overload
    def __init__(
        self: LayerTap[Tensor], model: nn.Module, layer: LayerSpec, logits: PickLogits | None = ...,
        reshape: Reshape | None = ..., *, call: int | None = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: LayerTap[dict[str, Tensor]], model: nn.Module, layer: Layers, logits: PickLogits | None = ...,
        reshape: Reshape | None = ..., *, call: int | None = ...,
    ) -> None: ...
    # fmt: on
    def __init__(
        self,
        model: nn.Module,
        layer: LayerSpec | Layers,
        logits: PickLogits | None = None,
        reshape: Reshape | None = None,
        *,
        call: int | None = None,
    ) -> None:
        self.model = model
        self.call = call
        self._wanted = listed(layer)
        self._several = isinstance(layer, list | tuple)
        self._pick = logits
        self._reshape = reshape
        self._captures: list[LayerCapture | InputCapture | None] = [None] * len(self._wanted)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._bracketed: set[int] = set()
        self._open: list[nn.Module] = []
        self._probing = False
        self._level = 0
        find_layers(model, self._wanted)
        for word in (INPUT, None):
            if sum(one is word or one == word for one in self._wanted) > 1:
                raise InputError(f"layer= lists {word!r} twice: name every layer once")

    @property
    def name(self) -> str | None:
        """Dotted name of the tapped layer; with `layer=None` known from the first forward on.

        Of several layers the names, joined by commas, once all are known.
        """
        names = [capture.name for capture in self._captures if capture is not None]
        return ", ".join(names) if len(names) == len(self._captures) else None

    @property
    def activations(self) -> Maps:
        """What the layer returned in the last forward, with its graph; of several layers {name: tensor}."""
        return self._as_asked(self._sources())

    def __enter__(self) -> Self:
        self._level = level()
        for place, wanted in enumerate(self._wanted):
            known = self._captures[place]
            if wanted == INPUT:
                self._bracket(self.model)
                capture = self._captures[place] = InputCapture()
                capture.attach(self.model)
            elif wanted is not None:
                self._attach(place, *find_layer(self.model, wanted))
            elif known is not None:
                self._attach(place, *find_layer(self.model, known.name))
            else:
                self._bracket(self.model)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._bracketed.clear()
        self._open.clear()
        for capture in self._captures:
            if capture is not None:
                capture.detach()

    # fmt: off
    @overload
    def maps(
        self, y: Any, method: str = ..., labels: Labels = ..., create_graph: bool = ..., *, fuse: None = ...,
    ) -> Maps: ...
    @overload
    def maps(
        self, y: Any, method: str = ..., labels: Labels = ..., create_graph: bool = ..., *, fuse: Literal["mean"],
    ) -> Tensor: ...
    # fmt: on
    def maps(
        self,
        y: Any,
        method: str = "hirescam",
        labels: Labels = None,
        create_graph: bool = True,
        *,
        fuse: Literal["mean"] | None = None,
    ) -> Maps | Tensor:
        """Maps of the last forward.

        Args:
            y: What the model returned in that forward.
            method: A name of `ct.methods()`.
            labels: None = all; ints = those columns in that order; LongTensor (B, n) = per sample; bool (L,) = those
                columns; bool (B, L) = per sample, NaN where not selected.
            create_graph: Keep the graph, so that a loss on the maps trains the network.
            fuse: "mean" turns the maps of several layers into one on the finest grid.

        Returns:
            (B, n, *S'), signed, on the layer's grid; of several layers {name as you wrote it: maps}, without `fuse`.

        Raises:
            InputError: A layer did not run, ran several times, or the logits do not come from it.
        """
        sources = self._sources()
        with torch.inference_mode(False), torch.enable_grad():
            key, first = next(iter(sources.items()))
            batch = len(spatial(first, None if key == INPUT else self._reshape))
            logits = pick_logits(y, self._pick, batch)
        maps = maps_of_layers(sources, logits, method, labels, create_graph, self._reshape)
        if fuse is None:
            return self._as_asked(maps)
        with gradients_on(logits.device):
            return fused(list(maps.values()), fuse)

    def _as_asked(self, each: dict[str, Tensor]) -> Maps:
        found: Any = each if self._several else next(iter(each.values()))
        return cast(Maps, found)

    def _sources(self) -> dict[str, Tensor]:
        found = {}
        for wanted, capture in zip(self._wanted, self._captures, strict=True):
            name = None if capture is None else plain_name(capture.name)
            call = self.call
            if wanted == INPUT:
                call = None
            elif wanted is None and call is None:
                # A shared activation module runs several times; the last feature map is what its last call gave.
                call = -1
            source = chosen_call([] if capture is None else list(capture.outputs), call, name)
            found[key_of(wanted, name or "")] = source
        return found

    def _attach(self, place: int, name: str, module: nn.Module) -> None:
        """Watch a layer, and every module around it: the user may call any of these to run a forward."""
        modules: dict[str, nn.Module] = dict(self.model.named_modules(remove_duplicate=False))
        for bracket in (module, *(modules[n] for n in around(name))):
            self._bracket(bracket)
        capture = self._captures[place] = LayerCapture(name)
        capture.attach(module)

    def _bracket(self, module: nn.Module) -> None:
        if id(module) in self._bracketed:
            return
        self._bracketed.add(id(module))
        self._handles.append(module.register_forward_pre_hook(eager(self._enter), with_kwargs=True))
        self._handles.append(module.register_forward_hook(eager(self._leave), always_call=True))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The outermost call begins a forward: what an earlier one left is not mixed in, and its graph not kept."""
        if self._probing or recomputing() or level() != self._level:
            return
        if not self._open:
            for capture in self._captures:
                if capture is not None:
                    capture.outputs.clear()
            if None in self._captures and module is self.model:
                self._probe(args, kwargs)
        self._open.append(module)

    def _leave(self, module: nn.Module, _: tuple[Any, ...], __: Any) -> None:
        if self._probing or recomputing() or level() != self._level or module not in self._open:
            return
        while self._open and self._open.pop() is not module:
            pass

    def _probe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the layer that None stands for; only a call of the model itself shows it."""
        self._probing = True
        try:
            call = Call.of(self.model, args, kwargs, integer=True)
            if call is None:
                raise InputError(
                    "layer=None needs a model that takes the image as a tensor (B, C, *S): name the layer with layer="
                )
            one = call.rows([0])
            name, module = default_layer(self.model, one.given, one)
            refuse_repeats([*find_layers(self.model, self._wanted), (name, module)])
            self._attach(self._captures.index(None), name, module)
        finally:
            self._probing = False


def chosen_call(outputs: list[Tensor], call: int | None, name: str | None) -> Tensor:
    """One of the outputs that a layer gave in one forward.

    Raises:
        InputError: None, or several and `call` does not say which.
    """
    if not outputs:
        which = "the tapped layer" if name is None else f"layer {name!r}"
        raise InputError(
            f"{which} has not run: call the model inside the with block before maps() (LayerTap), or name a layer that "
            "the model's forward runs in eval mode (explain); checkpoint with use_reentrant=False; a model compiled as "
            "a whole by torch.compile skips hooks (compile the part before the layer, leave the head eager)"
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
