"""`explain`: maps of a model for a batch, in one forward, without a trace."""

from __future__ import annotations

import inspect
import operator
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
        InputError: Unknown layer, method or option, a layer without spatial axes, no logits, NaN or Inf in the image,
            an empty batch, a model that takes more than the image, a scripted model.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> explain(model, torch.rand(2, 1, 6, 9)).shape
        torch.Size([2, 3, 4, 7])
    """
    image = checked_image(image, checked_model(model))
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


def checked_model(model: nn.Module) -> nn.Module:
    """The model, if it is one.

    Raises:
        InputError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a model (torch.nn.Module), got {type(model).__name__}: pass the network itself")
    return model


def checked_image(image: Tensor, model: nn.Module | None = None) -> Tensor:
    """The image as a plain tensor.

    Args:
        image: (B, C, *S).
        model: Whether it can be run on this image is checked too, as far as can be told before it is.

    Raises:
        InputError: Not (B, C, *S) floats, empty, or not finite; the model takes more than the image, or one
            of the two is float64 and the other is not.
    """
    if not isinstance(image, Tensor) or image.ndim < 3 or not image.is_floating_point():
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"expected a floating image tensor of shape (B, C, *S), got {what}")
    if not image.numel():
        empty = "batch is empty" if not len(image) else "image has no voxels"
        raise InputError(f"the {empty}, shape {tuple(image.shape)}: give at least one image (B, C, *S)")
    plain = image.detach().as_subclass(Tensor)
    # A sum is finite only if all its terms are; finite ones may overflow, so then they are looked at one by one.
    if not bool(plain.sum().isfinite()) and not bool(plain.isfinite().all()):
        raise InputError("the image has NaN or Inf voxels: replace them (for a CT by air) before the network sees them")
    if model is not None:
        _check_double(plain, model)
        _check_arguments(plain, model)
    return plain


def _check_double(image: Tensor, model: nn.Module) -> None:
    """float64 mixes with nothing; other precisions do, under autocast."""
    weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), image.dtype)
    if image.dtype != weights and torch.float64 in (image.dtype, weights):
        given, wanted = (str(dtype).removeprefix("torch.") for dtype in (image.dtype, weights))
        call = {"float64": "double", "float32": "float", "float16": "half"}.get(wanted, wanted)
        raise InputError(f"the image is {given}, the weights {wanted}: pass image.{call}()")


def _check_arguments(image: Tensor, model: nn.Module) -> None:
    """Can the model be called with the image alone? A hook or another `__call__` may add what is missing."""
    if model._forward_pre_hooks or type(model).__call__ is not nn.Module.__call__:
        return
    try:
        # A decorator may add arguments as well, so its own signature counts.
        signature = inspect.signature(model.forward, follow_wrapped=False)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(image)
    except TypeError as error:
        what = "needs more than the image" if "missing" in str(error) else "does not take the image by position"
        raise InputError(
            f"the model's forward {what} ({error}): wrap it in a module whose forward takes the image alone"
        ) from None


def _sizes(size: Size, image: Tensor) -> tuple[int, ...] | None:
    if size is None:
        return None
    if isinstance(size, str) or not isinstance(size, Iterable):
        if size != "image":
            raise InputError(f"size= expects None, 'image' or a tuple of {image.ndim - 2} sizes, got {size!r}")
        return tuple(image.shape[2:])
    try:
        return tuple(operator.index(s) for s in size)
    except TypeError:
        raise InputError(f"size= expects {image.ndim - 2} whole numbers of voxels, got {size!r}") from None
