"""`compile_backbone`: torch.compile where maps allow it, before the tapped layer."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.cam.capture import eager
from camtrain.cam.layer_lookup import default_layer, find_layer, untouched


def compile_backbone(
    model: nn.Module, image: Tensor, layer: str | nn.Module | None = None, **options: Any
) -> nn.Module:
    """Compile what runs before a layer, and leave the layer and all behind it eager.

    Maps need the layer's own output, which a compiled whole does not give, and a loss on maps is differentiated twice
    through what lies behind the layer, which compiled code cannot be. What lies before it is differentiated once.
    The modules are compiled in place: their class, names, parameters and the keys of a checkpoint stay as they are.

    Args:
        model: The network or a LightningModule around it; call it before `fit`, or in `configure_model`.
        image: (B, C, *S) as the network gets them; the first is run once, without a trace, to see what runs when.
        layer: The tapped layer; None = the one that the callbacks take.
        options: Passed to `torch.nn.Module.compile`, such as `mode=` or `dynamic=`.

    Returns:
        The same model.

    Raises:
        InputError: No such layer, it does not run on this image, or no module with parameters runs before it.

    Example:
        >>> net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Conv1d(2, 2, 3), nn.Flatten(), nn.Linear(8, 1))
        >>> compile_backbone(net, torch.zeros(1, 1, 8), layer="1", backend="eager") is net
        True
    """
    name, found = default_layer(model, image) if layer is None else find_layer(model, layer)
    ends = _ends(model, image)
    if id(found) not in ends:
        raise InputError(
            f"layer {name!r} does not run when {type(model).__name__} is called on an image: name one that does "
            "(camtrain layers, or ct.layers, lists them)"
        )
    first = min(ends[id(found)])
    chosen = _before(model, found, ends, first)
    if not chosen:
        raise InputError(f"nothing with parameters runs before layer {name!r}, so there is nothing to compile")
    for module in chosen:
        module.compile(**options)
    return model


def _ends(model: nn.Module, image: Tensor) -> dict[int, list[int]]:
    """At which place in one forward each module ends, by id; once for each call."""
    ends: dict[int, list[int]] = {}
    clock = itertools.count()

    def note(module: nn.Module, *_: object) -> None:
        ends.setdefault(id(module), []).append(next(clock))

    handles = [m.register_forward_hook(eager(note)) for m in model.modules()]
    try:
        with untouched(model, {image.device}), torch.no_grad():
            model(image[:1].clone())
    finally:
        for handle in handles:
            handle.remove()
    return ends


def _before(module: nn.Module, layer: nn.Module, ends: dict[int, list[int]], first: int) -> list[nn.Module]:
    """The largest modules with parameters of which every call ends before the layer's output is there."""
    chosen: list[nn.Module] = []
    for child in module.children():
        runs = ends.get(id(child), [])
        if runs and max(runs) < first and child is not layer:
            if any(True for _ in child.parameters()):
                chosen.append(child)
        else:
            chosen += _before(child, layer, ends, first)
    return chosen
