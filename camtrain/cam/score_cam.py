"""Score-CAM: what a channel is worth is asked of the model itself, by masking the image with it.

For every channel k of the layer (Wang et al. 2020, arXiv:1910.01279, definitions 2 and 3, and algorithm 1):

    H_k = norm01(enlarge(A_k))                      mask in 0..1, per sample and channel, on the image's grid
    masked_k = background + H_k * (image - background)
    w = softmax over k of (logit(masked_k) - logit(background everywhere))
    map = sum over k of w_k A_k                     signed: the paper's last ReLU is left to whoever shows the map

The logit of the empty image is the same for all channels, so it cancels in the softmax: no forward is spent on it. One
masked forward gives the logits of all labels, so the price is K forwards whatever the number of labels.

A channel that is constant over space says nothing about where: it makes no mask, takes part in no softmax, and has
weight 0. If all channels are constant, the map is 0.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from camtrain._errors import InputError
from camtrain.cam.engine import NO_LINK, precise, spatial
from camtrain.cam.enlarge import enlarge
from camtrain.cam.method_table import Method
from camtrain.cam.question import Answer, Question, image_only
from camtrain.cam.several import unreached

# From so many forwards on, somebody who waits wants to see how far it is.
_MANY_FORWARDS = 64
# A channel whose values differ by no more than this many rounding steps is constant: enlarged to 0..1 they would be
# a mask of noise.
_ROUNDING_STEPS = 2


@dataclass(frozen=True)
class ScoreCAMOptions:
    """Options of `scorecam`.

    Attributes:
        channels: Ask only so many channels, in every sample those with the largest standard deviation over space; None
            or more than there are: all. A channel contributes w_k A_k, so what is left out can have moved the map by
            w_k x std(A_k) at most. The softmax then runs over the chosen ones.
        chunk: Images in one forward at most; bounds the memory. With `target=` (which may tell samples of a batch
            apart), or where the model takes more than the image, whole batches are run, one channel at a time: then
            never fewer than B.
        background: What the network sees where the mask is 0, in the units of the image: 0.0 is air for a CT that is
            windowed to 0..1, -1.0 for one windowed to -1..1, the mean where images are standardised.
        progress: Show a bar on stderr when there are more than 64 forwards and stderr is a terminal.

    Raises:
        InputError: A number that is none, or too small.
    """

    channels: int | None = None
    chunk: int = 8
    background: float = 0.0
    progress: bool = True

    def __post_init__(self) -> None:
        # Whole numbers of NumPy become Python's.
        if self.channels is not None:
            object.__setattr__(self, "channels", _count("channels", self.channels, "how many channels to ask"))
        object.__setattr__(self, "chunk", _count("chunk", self.chunk, "how many images fit into one forward"))
        number = isinstance(self.background, int | float) and not isinstance(self.background, bool)
        if not number or not math.isfinite(self.background):
            raise InputError(
                f"background= expects one finite intensity in the units of the image, got {self.background!r}"
            )
        if not isinstance(self.progress, bool):
            raise InputError(f"progress= expects True or False, got {self.progress!r}")


def _count(name: str, number: Any, what: str) -> int:
    try:
        count = 0 if isinstance(number, bool) else operator.index(number)
    except TypeError:
        count = 0
    if count < 1:
        or_none = ", or None" if name == "channels" else ""
        raise InputError(f"{name}= expects {what}, 1 or more{or_none}, got {number!r}")
    return count


def score_cam_maps(question: Question, method: Method, options: ScoreCAMOptions) -> list[Tensor]:
    """Maps of every wanted layer: one forward for the activations, and at most B x K masked images per layer.

    Args:
        question: What is asked.
        method: The row `scorecam`.
        options: How many channels, how many images at a time, which background.

    Returns:
        Per layer (B, n, *S').

    Raises:
        InputError: As `score_cam_weights`.
    """
    maps = []
    for active, weights in score_cam_weights(question, method, options):
        with torch.autocast(device_type=question.image.device.type, enabled=False):
            flat = torch.einsum("bnk,bks->bns", weights, active.flatten(2))
        maps.append(flat.reshape(*flat.shape[:2], *active.shape[2:]))
    return maps


def score_cam_weights(question: Question, method: Method, options: ScoreCAMOptions) -> list[tuple[Tensor, Tensor]]:
    """What each channel of every wanted layer counts for each label.

    Args:
        question: What is asked.
        method: The row `scorecam`.
        options: How many channels, how many images at a time, which background.

    Returns:
        Per layer the activations (B, K, *S') and the weights (B, n, K): NaN where a mask per sample leaves a label out.

    Raises:
        InputError: The layer is the image itself, the scores do not depend on it, its grid does not fit the image, or
            something is NaN or Inf.
    """
    if any(layer.module is None for layer in question.layers):
        raise InputError(
            f"method {method.name!r} masks the image with the channels of a layer, so layer='input' would mask the "
            "image by itself: name a layer, or use lrp or guided_backprop for maps on the image's grid"
        )
    answer = question.forward()
    linked = question.scores(answer.output)
    scores = _finite(precise(linked.detach()), "the model's output for the unmasked image")
    chosen = question.selection(scores)
    choices = [_choice(source, question, options) for source in answer.sources]
    _refuse_dead_ends(question, answer, linked)
    del answer, linked  # their graph is not needed, and memory is
    # Where no label is wanted, nothing has to be asked.
    plans = [_plan(c, question, options.chunk) if chosen.picks.shape[1] else [] for c in choices]
    with torch.no_grad(), _bar(sum(map(len, plans)), options.progress) as tick:
        weights = [
            _channel_weights(choice, plan, question, options.background, scores.shape[1], tick)
            for choice, plan in zip(choices, plans, strict=True)
        ]
    return [
        (choice.activations, chosen.take(weight.to(choice.activations).transpose(1, 2)))
        for choice, weight in zip(choices, weights, strict=True)
    ]


def _refuse_dead_ends(question: Question, answer: Answer, scores: Tensor) -> None:
    """Masks of a layer in another branch would give a map that looks like any other.

    Raises:
        InputError: There is such a layer.
    """
    # A target need not be differentiable here; then what it was made of tells.
    outputs = [x for x in tree_leaves(answer.output) if isinstance(x, Tensor)]
    results = outputs if scores.grad_fn is None else [scores]
    sources = {w.key: source for w, source in zip(question.layers, answer.sources, strict=True)}
    for key in unreached(sources, results):
        raise InputError(f"layer {key!r}: {NO_LINK}")


@dataclass(frozen=True)
class _Choice:
    """Channels of one layer that the model is asked about.

    Attributes:
        activations: (B, K, *S').
        channels: (B, m) which channels, per sample.
        valid: (B, m) False where that channel is constant.
    """

    activations: Tensor
    channels: Tensor
    valid: Tensor


def _choice(source: Tensor, question: Question, options: ScoreCAMOptions) -> _Choice:
    active = _finite(precise(spatial(source.detach(), question.reshape)), "the tapped layer's output")
    if len(active) != len(question.image):
        raise InputError(
            f"the tapped layer gives {tuple(active.shape)} for {len(question.image)} images: if it works on slices or "
            "patches, bring them back to (B, K, *S) with reshape="
        )
    flat = active.flatten(2)
    low, high = flat.amin(dim=2), flat.amax(dim=2)
    step = torch.finfo(source.dtype).eps * torch.maximum(low.abs(), high.abs())
    varies = high - low > _ROUNDING_STEPS * step
    # A constant channel must not take the place of one that varies, however large its rounding noise is.
    spread = torch.where(varies, flat.std(dim=2, correction=0), -torch.ones_like(low))
    order = spread.argsort(dim=1, descending=True, stable=True)[:, : options.channels]
    return _Choice(active, order, varies.gather(1, order))


_Plan = list[tuple[Tensor, Tensor]]


def _plan(choice: _Choice, question: Question, chunk: int) -> _Plan:
    """(samples, places among the chosen channels) of every forward."""
    valid = choice.valid
    if question.target is None and question.arguments is image_only:
        samples, places = valid.nonzero(as_tuple=True)
        if not len(samples):
            return []
        return list(zip(torch.split(samples, chunk), torch.split(places, chunk), strict=True))
    everybody = torch.arange(len(valid), device=valid.device)
    some = valid.any(dim=0).nonzero()[:, 0].tolist()
    return [(everybody, torch.full_like(everybody, place)) for place in some]


def _channel_weights(
    choice: _Choice, plan: _Plan, question: Question, background: float, labels: int, tick: Callable[[], None]
) -> Tensor:
    """(B, K, L): softmax over the chosen channels of the logits of the masked images; 0 for all others."""
    active, channels, valid = choice.activations, choice.channels, choice.valid
    scores = active.new_full((*valid.shape, labels), -torch.inf)
    for samples, places in plan:
        masks = unit_masks(active[samples, channels[samples, places]][:, None], tuple(question.image.shape[2:]))
        images = masked(question.image[samples], masks, background)
        asked = replace(question, image=images)
        scores[samples, places] = precise(asked.scores(asked.run(images))).to(scores)
        tick()
    # A whole batch is run also where a channel is constant in some of its samples only.
    scores = scores.masked_fill(~valid[..., None], -torch.inf)
    if plan:
        _finite(scores[valid], "the model's output for a masked image")
    # Without any channel the softmax would be 0 / 0.
    some = valid.any(dim=1)[:, None, None] if plan else torch.zeros_like(valid[:, :1, None])
    weights = torch.where(some, scores.softmax(dim=1), torch.zeros_like(scores))
    full = active.new_zeros(*active.shape[:2], labels)
    return full.scatter(1, channels[..., None].expand_as(weights), weights)


def unit_masks(channels: Tensor, size: tuple[int, ...]) -> Tensor:
    """Channels, enlarged to the image and then stretched to 0..1, each by itself.

    Args:
        channels: (N, K, *S').
        size: S.

    Returns:
        (N, K, *S); 0 where a channel is constant.

    Example:
        >>> unit_masks(torch.tensor([[[2.0, 4.0], [7.0, 7.0]]]), (2,))
        tensor([[[0., 1.],
                 [0., 0.]]])
    """
    large = enlarge(channels, size)
    space = tuple(range(2, large.ndim))
    low = large.amin(dim=space, keepdim=True)
    span = large.amax(dim=space, keepdim=True) - low
    return (large - low) / torch.where(span > 0, span, torch.ones_like(span))


def masked(image: Tensor, masks: Tensor, background: float) -> Tensor:
    """The image where the mask is 1, the background where it is 0; in the image's dtype.

    Args:
        image: (N, C, *S).
        masks: (N, 1, *S), in 0..1.
        background: Intensity.

    Returns:
        (N, C, *S).
    """
    return (background + masks * (image.to(masks) - background)).to(image)


def _finite(tensor: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(
            f"{what} holds NaN or Inf, so channels cannot be compared: check the precision (float16 overflows, "
            "bfloat16 or float32 does not) and background="
        )
    return tensor


@contextmanager
def _bar(forwards: int, wanted: bool) -> Iterator[Callable[[], None]]:
    """Yields what is to be called after every forward."""
    if not wanted or forwards <= _MANY_FORWARDS:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    hidden = not (console.is_terminal or console.is_jupyter)
    with Progress(console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("Score-CAM", total=forwards)
        yield lambda: progress.advance(task)
