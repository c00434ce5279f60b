"""`explain`: maps of a model for a batch, in one forward, without a trace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.cam.answering import answer
from camtrain.cam.engine import Reshape
from camtrain.cam.fusing import fused, resized
from camtrain.cam.logits import PickLogits
from camtrain.cam.method_table import find_method
from camtrain.cam.question import Layer, Question, Target, WantedLayer, asking
from camtrain.cam.selection import Labels
from camtrain.cam.several import Layers, listed, refuse_repeats

Size = Literal["image"] | Sequence[int] | None


# fmt: off
@overload
def explain(
    model: nn.Module, image: Tensor, method: str = ..., layer: Layer = ..., labels: Labels = ..., size: Size = ...,
    target: Target | None = ..., logits: PickLogits | None = ..., reshape: Reshape | None = ..., *,
    fuse: Literal["mean"] | None = ..., call: int | None = ..., **options: Any,
) -> Tensor: ...
@overload
def explain(
    model: nn.Module, image: Tensor, method: str = ..., *, layer: Layers, labels: Labels = ..., size: Size = ...,
    target: Target | None = ..., logits: PickLogits | None = ..., reshape: Reshape | None = ...,
    fuse: Literal["mean"], call: int | None = ..., **options: Any,
) -> Tensor: ...
@overload
def explain(
    model: nn.Module, image: Tensor, method: str = ..., *, layer: Layers, labels: Labels = ..., size: Size = ...,
    target: Target | None = ..., logits: PickLogits | None = ..., reshape: Reshape | None = ...,
    fuse: None = ..., call: int | None = ..., **options: Any,
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
    **options: Any,
) -> Tensor | dict[str, Tensor]:
    """Attention maps of a model for a batch, by any method of `ct.methods()`.

    The model runs in eval mode and is left as it was: parameter gradients, train/eval modes, BatchNorm statistics,
    hooks, in-place flags, RNG and grad mode. It may be called anywhere, also inside `torch.no_grad`, inference mode
    or a training step.

    Args:
        model: Any module whose output contains logits (B, L).
        image: (B, C, *S).
        method: A name of `ct.methods()`.
        layer: Dotted name, module, "input" for the image itself, or None for the last feature map; a list gives
            {name as you wrote it: maps}.
        labels: None = all | ints: those columns, in that order | LongTensor (B, n): per sample | bool (L,): those
            columns | bool (B, L): result (B, L, *S') with NaN where not selected.
        size: None = grid of the layer | "image" | spatial sizes; enlarged linearly (sums are kept only with None).
        target: Instead of labels: callable(output) -> (B,) score, for any concept; result (B, 1, *S').
        logits: Callable that picks (B, L) from the model's output.
        reshape: Callable that makes (B, K, *S') of the layer's output.
        fuse: "mean" turns the maps of several layers into one on the finest grid.
        call: Which call of the layer counts, where one forward runs it several times (layer=None: the last one).
        **options: Options of the method: `lrp` and `relevancecam` take `rules= contrast= box= gates=`
            (`camtrain.cam.relevance.RelevanceOptions`), `scorecam` takes `channels= chunk= background= progress=`
            (`camtrain.cam.score_cam.ScoreCAMOptions`), `guided_backprop` and `guided_gradcam` take `approximate=`.

    Returns:
        (B, n, *S') detached, signed, on the image's device.

    Raises:
        InputError: Unknown layer, method or option, a layer without spatial axes, no logits, NaN or Inf in the image, a
            scripted model.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> explain(model, torch.rand(2, 1, 6, 9)).shape
        torch.Size([2, 3, 4, 7])
    """
    image = checked_image(image)
    if target is not None and labels is not None:
        raise InputError("give either labels= or target=, not both")
    wanted = listed(layer)
    sizes = _sizes(size, image)
    row = find_method(method)
    with asking(model, image):
        found = tuple(WantedLayer.of(model, image, w, call) for w in wanted)
        refuse_repeats((w.name, model if w.module is None else w.module) for w in found)
        question = Question(model, image, found, labels, target, logits, reshape)
        each = [resized(maps, sizes) for maps in answer(question, row, options)]
    if fuse is not None:
        return fused(each, fuse)
    return {w.key: maps for w, maps in zip(found, each, strict=True)} if isinstance(layer, list | tuple) else each[0]


def checked_image(image: Tensor) -> Tensor:
    """The image as a plain tensor.

    Raises:
        InputError: Not (B, C, *S) floats, or not finite.
    """
    if not isinstance(image, Tensor) or image.ndim < 3 or not image.is_floating_point():
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"expected a floating image tensor of shape (B, C, *S), got {what}")
    plain = image.detach().as_subclass(Tensor)
    if not bool(torch.isfinite(plain).all()):
        raise InputError("the image has NaN or Inf voxels: replace them (for a CT by air) before the network sees them")
    return plain


def _sizes(size: Size, image: Tensor) -> tuple[int, ...] | None:
    if size is None:
        return None
    if isinstance(size, str) or not isinstance(size, Iterable):
        if size != "image":
            raise InputError(f"size= expects None, 'image' or a tuple of {image.ndim - 2} sizes, got {size!r}")
        return tuple(image.shape[2:])
    return tuple(int(s) for s in size)
