"""`layer=` of the callbacks: one layer or several, by name, module or None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.callbacks._context import tell_once
from camtrain.cam.layer_lookup import INPUT, LayerSpec, default_layer, find_layer, plain_name
from camtrain.cam.several import Layers, find_layers, listed
from camtrain.cam.watch import LogitsFrom, ModuleWatch


def check_layers(pl_module: nn.Module, layer: LayerSpec | Layers, logits: LogitsFrom) -> None:
    """What can be known of them before anything is computed.

    Raises:
        InputError: No such layer, one listed twice, the input, or no module that `logits` names.
    """
    wanted = listed(layer)
    if INPUT in wanted:
        raise InputError(
            "layer='input' is not for callbacks, which watch layers inside the network: open "
            "ct.LayerTap(model, 'input') in the training step, or use ct.explain(..., layer='input')"
        )
    if wanted.count(None) > 1:
        raise InputError("layer= lists None twice: name every layer once")
    find_layers(pl_module, wanted)
    if isinstance(logits, str):
        find_layer(pl_module, logits)


def needs_image(layer: LayerSpec | Layers) -> bool:
    """Has a layer to be found by a forward of its own?"""
    return None in listed(layer)


def layer_names(layer: LayerSpec | Layers) -> list[str]:
    """The layers in words.

    Example:
        >>> layer_names(["layer3", None])
        ['layer3', 'last feature map']
    """
    named = ["last feature map" if one is None else one for one in listed(layer)]
    return [one if isinstance(one, str) else type(one).__name__ for one in named]


def resolve_layers(
    trainer: Any, pl_module: nn.Module, layer: LayerSpec | Layers, image: Tensor | None
) -> list[LayerSpec]:
    """The layers as they were given; for None the last feature map of the module's own forward.

    Raises:
        InputError: None without an image or a forward.
    """
    return [_last_map(trainer, pl_module, image) if one is None else one for one in listed(layer)]


def unnamed(layer: LayerSpec | Layers) -> list[bool]:
    """For each layer, is it one to be found?

    Example:
        >>> unnamed(["layer3", None])
        [False, True]
    """
    return [one is None for one in listed(layer)]


def new_watch(
    trainer: Any,
    pl_module: nn.Module,
    layer: LayerSpec | Layers,
    image: Callable[[], Tensor | None],
    logits: LogitsFrom,
    call: int | None,
) -> ModuleWatch:
    """The watch of an evaluation.

    Args:
        trainer: The Trainer.
        pl_module: The user's module.
        layer: As given.
        image: Gives the batch's image, where a layer has to be found.
        logits: As given.
        call: As given.

    Raises:
        InputError: As `resolve_layers`.
    """
    layers = resolve_layers(trainer, pl_module, layer, image() if needs_image(layer) else None)
    return ModuleWatch(pl_module, layers, logits, call, cut=True, found=unnamed(layer))


def _last_map(trainer: Any, pl_module: nn.Module, image: Tensor | None) -> str:
    if image is None:
        raise InputError("layer=None needs the key 'image' in the batch: name the layer with layer=")
    try:
        name, _ = default_layer(pl_module, image)
    except NotImplementedError as error:
        raise InputError(
            f"layer=None needs a forward(image) in {type(pl_module).__name__}, which has none: "
            "name the layer with layer="
        ) from error
    tell_once(trainer, f"camtrain: layer=None takes {plain_name(name)!r}")
    return name
