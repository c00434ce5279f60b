"""Where relevance starts: at which tensors, and with how much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from camtrain._errors import InputError, nearest
from camtrain.cam.engine import NO_LINK
from camtrain.cam.lrp_rules import safe
from camtrain.cam.question import Question
from camtrain.cam.selection import Selection

CONTRASTS = ("none", "paper", "official-code", "others")
Contrast = str | Tensor | Sequence[int]


@dataclass(frozen=True)
class Start:
    """Where relevance starts, for every selected label.

    Attributes:
        ends: Tensors that it starts at.
        seeds: Per pass, a gradient for each of them: relevance over value.
        chosen: How to lay the results out.
    """

    ends: list[Tensor]
    seeds: Iterator[list[Tensor]]
    chosen: Selection


def start_of(question: Question, output: Any, contrast: Contrast, unit: bool) -> Start:
    """Start vectors for what a model gave.

    Args:
        question: Labels or target.
        output: What the model returned under the rules.
        contrast: See `start_vector`; with a target only `"none"`.
        unit: With a target: start with d target / d output, whatever the sign of the output, and not with that times
            the output. The target is then its own contrast: `y[:, 0] - y[:, 1]` sets label 0 against label 1.

    Raises:
        InputError: The output does not depend on the layers, or a contrast beside a target.
    """
    scores = question.scores(output)
    if scores.grad_fn is None:
        raise InputError(NO_LINK)
    chosen = question.selection(scores)
    if question.target is None:
        return Start([scores], _label_seeds(scores.detach(), chosen, contrast), chosen)
    if contrast != "none":
        raise InputError("contrast= sets a label against other labels: with target= put the contrast into the target")
    ends, slopes = _slopes(question, output)
    if not ends:
        # An output of the user's own making, which cannot be taken apart: relevance starts at the target itself.
        return Start([scores], iter([[torch.ones_like(scores)]]), chosen)
    seeds = [s / safe(e.detach()) if unit else s for s, e in zip(slopes, ends, strict=True)]
    return Start(ends, iter([seeds]), chosen)


def _slopes(question: Question, output: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of the output that the target reads, and d target / d each."""
    copies: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.grad_fn is not None):
            return value
        return copies.setdefault(id(value), value.detach().requires_grad_())

    score = question.scores(tree_map(copy, output))
    tensors = {id(t): t for t in tree_flatten(output)[0] if id(t) in copies}
    if score.grad_fn is None or not tensors:
        return [], []
    slopes = torch.autograd.grad(score.sum(), [copies[i] for i in tensors], allow_unused=True)
    read = [(t, s) for t, s in zip(tensors.values(), slopes, strict=True) if s is not None]
    return [t for t, _ in read], [s for _, s in read]


def _label_seeds(values: Tensor, chosen: Selection, contrast: Contrast) -> Iterator[list[Tensor]]:
    negatives = None if isinstance(contrast, str) else _negatives(contrast, values)
    for j in range(chosen.picks.shape[1]):
        yield [start_vector(values, chosen.picks[:, j], contrast, negatives) / safe(values)]


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
    raise InputError(_unknown(contrast))


def check_contrast(contrast: Any) -> None:
    """Is this a contrast, as far as can be told without logits?

    Raises:
        InputError: It is not.
    """
    if contrast is None or isinstance(contrast, Tensor):
        return
    named = isinstance(contrast, str) and contrast in CONTRASTS
    columns = isinstance(contrast, list | tuple) and len(contrast) > 0 and all(isinstance(c, int) for c in contrast)
    if not (named or columns):
        raise InputError(_unknown(contrast))


def _unknown(contrast: Any) -> str:
    return (
        f"contrast= expects {', '.join(CONTRASTS)}, a list of the columns known to be absent, or a bool mask of them; "
        f"got {contrast!r}{nearest(str(contrast), CONTRASTS)}"
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
