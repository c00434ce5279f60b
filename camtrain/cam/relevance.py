"""LRP maps and Relevance-CAM: where the relevance of a label's logit lies, at any layers, in one pass.

The rules sit in `lrp_rules` and are woven into one forward by `lrp_hooks`; here are the start vectors (with or without
contrast to the other labels) and what becomes of the relevance R = A * gradient that arrives at a layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from camtrain._errors import InputError, nearest
from camtrain.cam.engine import NO_LINK, precise, spatial
from camtrain.cam.functional import weighted
from camtrain.cam.lrp import Rules, find_rules, lrp_hooks
from camtrain.cam.lrp_rules import safe
from camtrain.cam.method_table import Method
from camtrain.cam.question import Answer, Question
from camtrain.cam.selection import Selection

CONTRASTS = ("none", "paper", "official-code", "others")
Contrast = str | Tensor | Sequence[int]
_Make = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RelevanceOptions:
    """Options of `lrp` and `relevancecam`.

    Attributes:
        rules: Preset name (`camtrain.cam.lrp.PRESETS`) or `Rules`.
        contrast: Where relevance starts, see `start_vector`. None: `"none"` for `lrp`, so that maps add up to the
            logit, and `"others"` for `relevancecam`, whose sign then does not depend on that of the logit.
        box: (low, high) of the image's intensities (the window, not the image's own minimum and maximum): the first
            layer then follows the zB rule.
        gates: More modules whose output only gates others: dotted names, or callable(name, module) -> bool.
    """

    rules: str | Rules = "zplus"
    contrast: Contrast | None = None
    box: tuple[float, float] | None = None
    gates: Iterable[str] | Callable[[str, nn.Module], bool] | None = None


def relevance_maps(question: Question, method: Method, options: RelevanceOptions) -> list[Tensor]:
    """Maps of every wanted layer: one forward, and one backward pass per selected label for all layers together.

    Args:
        question: What is asked.
        method: `lrp` (relevance summed over channels) or `relevancecam`.
        options: Rules and contrast.

    Returns:
        Per layer (B, n, *S').

    Raises:
        InputError: Unknown rules or contrast, a module without a rule, or relevance that overflows.
    """
    make = _relevance_cam if method.name == "relevancecam" else _summed
    return _propagated(question, default_contrast(options, method, question), make)


def default_contrast(options: RelevanceOptions, method: Method, question: Question) -> RelevanceOptions:
    """The options with the method's own contrast where none is given."""
    if options.contrast is not None:
        return options
    contrasted = method.name == "relevancecam" and question.target is None
    return replace(options, contrast="others" if contrasted else "none")


def channel_relevance(question: Question, options: RelevanceOptions) -> list[Tensor]:
    """The channel weights of Relevance-CAM: <R_k> at every wanted layer.

    Args:
        question: What is asked.
        options: Rules and contrast (None: `"none"`).

    Returns:
        Per layer (B, n, K).
    """
    return _propagated(question, options, _weights)


def _propagated(question: Question, options: RelevanceOptions, make: _Make) -> list[Tensor]:
    """One forward under the rules; then per selected label what `make` makes of relevance and activations."""
    contrast = "none" if options.contrast is None else options.contrast
    if question.target is not None and not (isinstance(contrast, str) and contrast == "none"):
        raise InputError("contrast= sets a label against other labels: with target= put the contrast into the target")
    with ExitStack() as stack:
        # The rules stay in place for the backward pass too: a checkpointed part runs its forward again there.
        hooks = stack.enter_context(
            lrp_hooks(question.model, find_rules(options.rules, options.box), options.gates, question.image)
        )
        answer = question.forward(precise=True)
        stack.enter_context(torch.autocast(device_type=question.image.device.type, enabled=False))
        scores = question.scores(answer.output)
        if scores.grad_fn is None:
            raise InputError(NO_LINK)
        made = list(_each(question, answer, scores, contrast, make))
    if hooks.unruled:
        warnings.warn(
            f"no LRP rule for {', '.join(sorted(set(hooks.unruled)))}: their plain gradient is used, and relevance may "
            "not be conserved there",
            stacklevel=6,
        )
    return made


def _each(question: Question, answer: Answer, scores: Tensor, contrast: Contrast, make: _Make) -> Iterator[Tensor]:
    """What is made of the relevance at every layer, for all selected labels."""
    chosen, shapes = question.selection(scores), question.reshapes()
    activations = [precise(spatial(s, r)).detach() for s, r in zip(answer.sources, shapes, strict=True)]
    # No label at all: nothing.
    empty = [make(a, a)[:, None][:, :0] for a in activations]
    each: list[list[Tensor]] = [[] for _ in activations]
    for seed in _seeds(question, scores, chosen, contrast):
        relevances = _relevance(scores, answer.sources, seed)
        for made, shape, active, relevance in zip(each, shapes, activations, relevances, strict=True):
            made.append(make(precise(spatial(relevance, shape)), active))
    for made, none in zip(each, empty, strict=True):
        yield chosen.arrange(torch.stack(made, dim=1) if made else none)


def _seeds(question: Question, scores: Tensor, chosen: Selection, contrast: Contrast) -> Iterator[Tensor]:
    """Gradient to start with, per pass: relevance over value."""
    values = scores.detach()
    negatives = None if isinstance(contrast, str) else _negatives(contrast, values)
    for j in range(chosen.picks.shape[1]):
        if question.target is not None:
            yield torch.ones_like(values)
            continue
        seed = start_vector(values, chosen.picks[:, j], contrast, negatives) / safe(values)
        yield seed if chosen.valid is None else seed * chosen.valid[:, j : j + 1]


def _relevance(scores: Tensor, sources: list[Tensor], seed: Tensor) -> list[Tensor]:
    gradients = torch.autograd.grad(scores, sources, seed.to(scores.dtype), retain_graph=True, allow_unused=True)
    found = []
    for gradient, source in zip(gradients, sources, strict=True):
        if gradient is None:
            raise InputError(NO_LINK)
        relevance = safe(source.detach().as_subclass(Tensor)) * gradient
        if not bool(torch.isfinite(relevance).all()):
            raise InputError(
                "the relevance overflowed: with biases in the denominators sums can come near zero layer by layer; "
                "use rules='zplus' or 'epsilon-plus'"
            )
        found.append(relevance)
    return found


def _weights(relevance: Tensor, activations: Tensor) -> Tensor:
    return relevance.flatten(2).sum(dim=2)


def _relevance_cam(relevance: Tensor, activations: Tensor) -> Tensor:
    """Channel weight = sum of the channel's relevance (Lee et al. 2021); no ReLU."""
    return weighted(_weights(relevance, activations), activations)


def _summed(relevance: Tensor, activations: Tensor) -> Tensor:
    return relevance.sum(dim=1)


def start_vector(logits: Tensor, picks: Tensor, contrast: Contrast, negatives: Tensor | None = None) -> Tensor:
    """Relevance that the logits start with.

    With t the explained label, z its logit and N the number of labels:

    - `"none"`: z at t. Relevances add up to the logit; a negative logit turns the sign of the whole map.
    - `"paper"`: z at t, -z / (N - 1) elsewhere; sums to 0 (Lee et al. 2021; after Gu et al. 2018).
    - `"official-code"`: 1 at t, -1 / N elsewhere, whatever the logit; sums to 1 / N (what the authors' code does). With
      a thousand labels that is as good as 0; with few, the 1 / N that is left is the map without contrast, and drowns
      the rest.
    - `"others"`: 1 at t, -1 / (N - 1) elsewhere, whatever the logit; sums to 0.
    - `negatives`: 1 at t, and -1 shared by the other labels that are marked: those known to be absent, where labels do
      not exclude each other.

    With no other label to set against (N = 1, or no negatives) there is no contrast.

    Args:
        logits: (B, L).
        picks: (B,) explained label of every sample.
        contrast: One of `CONTRASTS`; ignored where `negatives` is given.
        negatives: (B, L) bool.

    Returns:
        (B, L).

    Raises:
        InputError: Unknown contrast.

    Example:
        >>> start_vector(torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([0]), "paper")
        tensor([[ 2., -1., -1.]])
    """
    target = torch.zeros_like(logits).scatter(1, picks[:, None], 1.0)
    if negatives is not None:
        others = negatives.to(logits) * (1 - target)
        return target - others / others.sum(dim=1, keepdim=True).clamp(min=1)
    own = (logits * target).sum(dim=1, keepdim=True)
    labels = logits.shape[1]
    if contrast == "none":
        return target * own
    if contrast == "paper":
        return own * (target - (1 - target) / max(labels - 1, 1))
    if contrast == "official-code":
        return target - (1 - target) / labels
    if contrast == "others":
        return target - (1 - target) / max(labels - 1, 1)
    raise InputError(
        f"contrast= expects {', '.join(CONTRASTS)} or the labels known to be absent, got {contrast!r}"
        f"{nearest(str(contrast), CONTRASTS)}"
    )


def _negatives(contrast: Any, scores: Tensor) -> Tensor:
    """(B, L) bool of what the user gave as labels known to be absent."""
    given = torch.as_tensor(contrast, device=scores.device)
    batch, labels = scores.shape
    if given.dtype == torch.bool:
        if tuple(given.shape) in ((labels,), (batch, labels)):
            return given.expand(batch, labels)
        raise InputError(
            f"a bool contrast= marks the absent labels, shape ({labels},) or ({batch}, {labels}); "
            f"got {tuple(given.shape)}"
        )
    if given.is_floating_point() or given.ndim != 1:
        raise InputError(
            "contrast= expects a name, a list of columns, or a bool mask of the labels known to be absent "
            f"(label == 0), got {given.dtype} {tuple(given.shape)}"
        )
    if given.numel() and (int(given.min()) < 0 or int(given.max()) >= labels):
        raise InputError(f"contrast= names columns outside 0..{labels - 1}: {given.tolist()}")
    return (
        torch.zeros(labels, dtype=torch.bool, device=scores.device).index_fill(0, given.long(), True).expand(batch, -1)
    )
