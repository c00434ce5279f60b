"""`explain`: maps of a model for a batch, in one forward, without a trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.cam.capture import LayerCapture
from camtrain.cam.engine import Reshape, attention_maps, score_map
from camtrain.cam.layer_lookup import default_layer, find_layer, plain_name, untouched
from camtrain.cam.logits import PickLogits, pick_logits
from camtrain.cam.selection import Labels
from camtrain.cam.tap import chosen_call

Layer = str | nn.Module | None
Layers = list[str] | list[nn.Module] | list[str | nn.Module] | tuple[str | nn.Module, ...]
Target = Callable[[Any], Tensor]
Size = Literal["image"] | Sequence[int] | None


# fmt: off
@overload
def explain(
    model: nn.Module, image: Tensor, method: str = ..., layer: Layer = ..., labels: Labels = ..., size: Size = ...,
    target: Target | None = ..., logits: PickLogits | None = ..., reshape: Reshape | None = ..., *,
    fuse: Literal["mean"] | None = ..., call: int | None = ...,
) -> Tensor: ...
@overload
def explain(
    model: nn.Module, image: Tensor, method: str = ..., *, layer: Layers, labels: Labels = ..., size: Size = ...,
    target: Target | None = ..., logits: PickLogits | None = ..., reshape: Reshape | None = ...,
    fuse: Literal["mean"], call: int | None = ...,
) -> Tensor: ...
@overload
def explain(
    model: nn.Module, image: Tensor, method: str = ..., *, layer: Layers, labels: Labels = ..., size: Size = ...,
    target: Target | None = ..., logits: PickLogits | None = ..., reshape: Reshape | None = ...,
    fuse: None = ..., call: int | None = ...,
) -> dict[str, Tensor]: ...
# fmt: on
def explain(
    model: nn.Module,
    image: Tensor,
    method: str = "hirescam",
    layer: Layer | Layers = None,
    labels: Labels = None,
    size: Size = None,
    target: Target | None = None,
    logits: PickLogits | None = None,
    reshape: Reshape | None = None,
    *,
    fuse: Literal["mean"] | None = None,
    call: int | None = None,
) -> Tensor | dict[str, Tensor]:
    """Attention maps of a model for a batch: one forward, gradients only from the logits down to the layer.

    The model runs in eval mode and is left as it was: parameter gradients, train/eval modes, BatchNorm statistics,
    hooks, in-place flags, RNG and grad mode. It may be called anywhere, also inside `torch.no_grad`, inference mode
    or a training step.

    Args:
        model: Any module whose output contains logits (B, L).
        image: (B, C, *S).
        method: A name of `ct.methods()`.
        layer: Dotted name, module, or None for the last feature map; a list gives {name as you wrote it: maps}.
        labels: None = all | ints: those columns, in that order | LongTensor (B, n): per sample | bool (L,): those
            columns | bool (B, L): result (B, L, *S') with NaN where not selected.
        size: None = grid of the layer | "image" | spatial sizes; enlarged linearly (sums are kept only with None).
        target: Instead of labels: callable(output) -> (B,) score, for any concept; result (B, 1, *S').
        logits: Callable that picks (B, L) from the model's output.
        reshape: Callable that makes (B, K, *S') of the layer's output.
        fuse: "mean" turns the maps of several layers into one on the finest grid.
        call: Which call of the layer counts, where one forward runs it several times (layer=None: the last one).

    Returns:
        (B, n, *S') detached, signed, on the image's device.

    Raises:
        InputError: Unknown layer or method, a layer without spatial axes, no logits, NaN or Inf in the image.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> explain(model, torch.rand(2, 1, 6, 9)).shape
        torch.Size([2, 3, 4, 7])
    """
    image = _checked_image(image)
    if target is not None and labels is not None:
        raise InputError("give either labels= or target=, not both")
    wanted: list[Layer] = list(layer) if isinstance(layer, list | tuple) else [layer]
    if not wanted:
        raise InputError("layer= is an empty list: name at least one layer")
    sizes = _sizes(size, image)
    with untouched(model, {image.device}), torch.enable_grad():
        found = [_Wanted.of(model, image, w, call) for w in wanted]
        sources, output = _forward(model, image.clone(), found)
        each = []
        for source in sources:
            if target is not None:
                maps = score_map(source, target(output), method, False, reshape)
            else:
                picked = pick_logits(output, logits, len(image))
                maps = attention_maps(source, picked, method, labels, False, reshape)
            each.append(_resized(maps, sizes))
    if fuse is not None:
        return _fused(each, fuse)
    return {w.key: maps for w, maps in zip(found, each, strict=True)} if isinstance(layer, list | tuple) else each[0]


@dataclass(frozen=True)
class _Wanted:
    """One layer to look at: under which key it is handed out, and which of its calls counts."""

    key: str
    name: str
    module: nn.Module
    call: int | None

    @staticmethod
    def of(model: nn.Module, image: Tensor, layer: Layer, call: int | None) -> _Wanted:
        if layer is None:
            # A shared activation module runs several times; the last feature map is what its last call gave.
            name, module = default_layer(model, image)
            return _Wanted(plain_name(name), name, module, -1 if call is None else call)
        name, module = find_layer(model, layer)
        return _Wanted(layer if isinstance(layer, str) else plain_name(name), name, module, call)


def _checked_image(image: Tensor) -> Tensor:
    if not isinstance(image, Tensor) or image.ndim < 3 or not image.is_floating_point():
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"expected a floating image tensor of shape (B, C, *S), got {what}")
    plain = image.detach().as_subclass(Tensor)
    if not bool(torch.isfinite(plain).all()):
        raise InputError("the image has NaN or Inf voxels: replace them (for a CT by air) before the network sees them")
    return plain


def _forward(model: nn.Module, image: Tensor, layers: list[_Wanted]) -> tuple[list[Tensor], Any]:
    """One forward; the graph starts at the first of the layers to run, below it nothing is recorded."""
    captures = [LayerCapture(layer.name, cut=True) for layer in layers]
    with ExitStack() as stack:
        for capture, layer in zip(captures, layers, strict=True):
            capture.attach(layer.module)
            stack.callback(capture.detach)
        with torch.no_grad():
            output = model(image)
        sources = [
            chosen_call(list(c.outputs), layer.call, plain_name(c.name))
            for c, layer in zip(captures, layers, strict=True)
        ]
        return sources, output


def _sizes(size: Size, image: Tensor) -> tuple[int, ...] | None:
    if size is None:
        return None
    if isinstance(size, str) or not isinstance(size, Iterable):
        if size != "image":
            raise InputError(f"size= expects None, 'image' or a tuple of {image.ndim - 2} sizes, got {size!r}")
        return tuple(image.shape[2:])
    return tuple(int(s) for s in size)


def _resized(maps: Tensor, size: tuple[int, ...] | None) -> Tensor:
    """Linear enlargement to the wanted grid, centre-aligned."""
    if size is None or size == tuple(maps.shape[2:]):
        return maps
    if len(size) != maps.ndim - 2 or min(size) < 1:
        raise InputError(f"size= needs {maps.ndim - 2} positive sizes or 'image', got {size}")
    if maps.shape[1] == 0:
        return maps.new_empty(*maps.shape[:2], *size)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    return F.interpolate(maps, size=size, mode=mode, align_corners=False)


def _fused(maps: list[Tensor], how: str) -> Tensor:
    if how != "mean":
        raise InputError(f"fuse= knows 'mean', got {how!r}")
    finest = max((tuple(m.shape[2:]) for m in maps), key=math.prod)
    return torch.stack([_resized(m, finest) for m in maps]).mean(dim=0)
