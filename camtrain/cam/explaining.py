"""`explain`: maps of a model for a batch, in one forward, without a trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.cam.capture import LayerCapture
from camtrain.cam.engine import Reshape, attention_maps, score_map
from camtrain.cam.layer_lookup import default_layer, find_layer, untouched
from camtrain.cam.logits import PickLogits, pick_logits
from camtrain.cam.selection import Labels
from camtrain.cam.tap import chosen_call

Layer = str | nn.Module | None
Target = Callable[[Any], Tensor]
Size = Literal["image"] | Sequence[int] | None


@overload
def explain(
    model: nn.Module, image: Tensor, method: str = ..., layer: Layer = ..., labels: Labels = ..., size: Size = ...,
    target: Target | None = ..., logits: PickLogits | None = ..., reshape: Reshape | None = ..., *,
    fuse: Literal["mean"] | None = ..., call: int | None = ...,
) -> Tensor: ...
@overload
def explain(
    model: nn.Module, image: Tensor, method: str, layer: Sequence[str | nn.Module], labels: Labels = ..., size: Size = ...,
    target: Target | None = ..., logits: PickLogits | None = ..., reshape: Reshape | None = ..., *,
    fuse: None = ..., call: int | None = ...,
) -> dict[str, Tensor]: ...  # fmt: skip
def explain(
    model: nn.Module,
    image: Tensor,
    method: str = "hirescam",
    layer: Layer | Sequence[str | nn.Module] = None,
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
        layer: Dotted name, module, or None for the last feature map; a list gives {name: maps}.
        labels: None = all | ints: those columns, in that order | LongTensor (B, n): per sample | bool (L,): those columns |
            bool (B, L): result (B, L, *S') with NaN where not selected.
        size: None = grid of the layer | "image" | spatial sizes; enlarged linearly (sums are kept only with None).
        target: Instead of labels: callable(output) -> (B,) score, for any concept; result (B, 1, *S').
        logits: Callable that picks (B, L) from the model's output.
        reshape: Callable that makes (B, K, *S') of the layer's output.
        fuse: "mean" turns the maps of several layers into one on the finest grid.
        call: Which call of the layer counts, where one forward runs it several times.

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
    if isinstance(layer, str | nn.Module) or layer is None:
        wanted: list[Layer] = [layer]
    else:
        wanted = list(layer)
        if not wanted:
            raise InputError("layer= is an empty list: name at least one layer")
    with untouched(model, {image.device}):
        found = [default_layer(model, image) if w is None else find_layer(model, w) for w in wanted]
        sources, output = _forward(model, image.clone(), found, call)
        maps = {}
        for (name, _), source in zip(found, sources, strict=True):
            if target is not None:
                map_ = score_map(source, target(output), method, False, reshape)
            else:
                picked = pick_logits(output, logits, len(image))
                map_ = attention_maps(source, picked, method, labels, False, reshape)
            maps[name] = _resized(map_, image.shape[2:] if size == "image" else size)
    if fuse is not None:
        return _fused(list(maps.values()), fuse)
    return next(iter(maps.values())) if isinstance(layer, str | nn.Module) or layer is None else maps


def _checked_image(image: Tensor) -> Tensor:
    if not isinstance(image, Tensor) or image.ndim < 3 or not image.is_floating_point():
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"expected a floating image tensor of shape (B, C, *S), got {what}")
    plain = image.detach().as_subclass(Tensor)
    if not bool(torch.isfinite(plain).all()):
        raise InputError("the image has NaN or Inf voxels: replace them (for a CT by air) before the network sees them")
    return plain


def _forward(
    model: nn.Module, image: Tensor, layers: list[tuple[str, nn.Module]], call: int | None
) -> tuple[list[Tensor], Any]:
    """One forward; the graph starts at the first of the layers to run, below it nothing is recorded."""
    captures = [LayerCapture(name, cut=True) for name, _ in layers]
    with ExitStack() as stack:
        for capture, (_, module) in zip(captures, layers, strict=True):
            capture.attach(module)
            stack.callback(capture.detach)
        with torch.no_grad():
            output = model(image)
        return [chosen_call(list(c.outputs), call, c.name) for c in captures], output


def _resized(maps: Tensor, size: Sequence[int] | None) -> Tensor:
    """Linear enlargement to the wanted grid, centre-aligned."""
    if size is None or tuple(size) == tuple(maps.shape[2:]):
        return maps
    size = tuple(int(s) for s in size)
    if len(size) != maps.ndim - 2 or min(size) < 1:
        raise InputError(f"size= needs {maps.ndim - 2} positive sizes or 'image', got {size}")
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    return F.interpolate(maps, size=size, mode=mode, align_corners=False)


def _fused(maps: list[Tensor], how: str) -> Tensor:
    if how != "mean":
        raise InputError(f"fuse= knows 'mean', got {how!r}")
    finest = max((tuple(m.shape[2:]) for m in maps), key=math.prod)
    return torch.stack([_resized(m, finest) for m in maps]).mean(dim=0)
