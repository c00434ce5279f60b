"""A layer in the middle of a network: deep enough to know findings, early enough to know where they lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.cam.capture import eager
from camtrain.cam.layer_lookup import find_layer, is_map, plain_name, untouched
from camtrain.cam.layer_table import SEEN_SHARE_LIMIT, listed_layers, seen_share
from camtrain.cam.question import WantedLayer
from camtrain.cam.rerun import Rerun


def mid_layer(rerun: Rerun, name: str | None = None, limit: float = SEEN_SHARE_LIMIT) -> WantedLayer:
    """The deepest layer before the tapped one whose central cell has seen at most a share of the image.

    Found by halving, since cells see more and more on the way: about six forwards and backward passes of one image
    for a ResNet. Layers that run more than once in a forward (a shared activation) are passed over.

    Args:
        rerun: The network; the first of its images is used.
        name: A layer that was chosen beforehand, which is only looked up.
        limit: Largest seen share.

    Raises:
        InputError: No such layer, none before the tapped one has seen so little, or the tapped one has itself (then
            its maps say where the evidence lies, and there is nothing to compare them with).
    """
    call, entry = rerun.call, rerun.call.entry
    if name is not None:
        full, module = find_layer(entry, name)
        return WantedLayer(plain_name(full), plain_name(full), module, None)
    image = call.image[:1]

    def seen(module: nn.Module) -> float:
        return seen_share(entry, image, module, call)

    tapped = rerun.layers[0]
    if tapped.module is not None and tapped.call is None and seen(tapped.module) <= limit:
        raise InputError(
            f"a cell of {tapped.name!r} sees at most {limit:.0%} of the image, so its own maps say where evidence lies"
        )
    candidates = _before(rerun, image)
    low, high = 0, len(candidates)  # all before `low` have seen little, all from `high` on much
    while low < high:
        middle = (low + high) // 2
        if seen(candidates[middle][1]) <= limit:
            low = middle + 1
        else:
            high = middle
    if not low:
        raise InputError(f"no layer before {tapped.name!r} has cells that see at most {limit:.0%} of the image")
    found, module = candidates[low - 1]
    return WantedLayer(plain_name(found), plain_name(found), module, None)


def _before(rerun: Rerun, image: Tensor) -> list[tuple[str, nn.Module]]:
    """Modules that give maps and finish before the first tapped layer, each of which runs once, in that order."""
    order: list[str] = []

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if is_map(output, image):
                order.append(name)

        return hook

    # Inside a block branches run beside each other; what a whole block gives has all of them.
    named = {n: m for n, m in listed_layers(rerun.call.entry, 2) if type(m).__module__ != _PADDING}
    handles = [module.register_forward_hook(eager(record(name))) for name, module in named.items()]
    try:
        with untouched(rerun.call.entry, {image.device}), torch.no_grad():
            rerun.call(image.clone())
    finally:
        for handle in handles:
            handle.remove()
    tapped = {id(layer.module) for layer in rerun.layers}
    inside = {id(m) for layer in rerun.layers if layer.module is not None for m in layer.module.modules()}
    end = next((at for at, name in enumerate(order) if id(named[name]) in tapped | inside), len(order))
    once = {name for name, times in Counter(order).items() if times == 1}
    return [(name, named[name]) for name in order[:end] if name in once]


_PADDING = "torch.nn.modules.padding"
