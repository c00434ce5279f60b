"""One question to a model, answered by any method of the table."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from camtrain._errors import InputError, nearest
from camtrain.cam.engine import attention_maps, spatial
from camtrain.cam.guided import GuidedOptions, guided_maps
from camtrain.cam.method_table import Method
from camtrain.cam.question import Question
from camtrain.cam.relevance import RelevanceOptions, relevance_maps
from camtrain.cam.score_cam import ScoreCAMOptions, score_cam_maps
from camtrain.cam.validity import between, respond_warnings

# Family -> its options (None: it has none) and the function that answers.
_OPTIONS: dict[str, type[Any] | None] = {
    "gradient": None,
    "relevance": RelevanceOptions,
    "perturbation": ScoreCAMOptions,
    "guided": GuidedOptions,
}


def answer(question: Question, method: Method, options: Mapping[str, Any] | None = None) -> list[Tensor]:
    """Maps of every wanted layer.

    Args:
        question: What is asked, inside `asking(model, image)`.
        method: A row of the method table.
        options: Options of that method by name.

    Returns:
        Per layer (B, n, *S'), detached.

    Raises:
        InputError: An option that the method does not have, or what the method itself refuses.
    """
    read = read_options(method, options or {})
    if method.family == "gradient":
        return _gradient_maps(question, method)
    if method.family == "relevance":
        return relevance_maps(question, method, read)
    if method.family == "perturbation":
        return score_cam_maps(question, method, read)
    return guided_maps(question, method, read)


def read_options(method: Method, given: Mapping[str, Any]) -> Any:
    """The options of a method as its own dataclass; None where it has none.

    Raises:
        InputError: Unknown option.
    """
    kind = _OPTIONS[method.family]
    known = () if kind is None else tuple(f.name for f in fields(kind))
    for name in given:
        if name not in known:
            has = f"has the options {', '.join(known)}" if known else "has no options"
            raise InputError(f"method {method.name!r} {has}, got {name}={nearest(name, known)}")
    return None if kind is None else kind(**given)


def _gradient_maps(question: Question, method: Method) -> list[Tensor]:
    found = question.forward()
    scores = question.scores(found.output)
    labels = None if question.target is not None else question.labels
    if method.formula in ("respond_cam", "xgrad_cam"):
        _warn(question, found.sources, scores)
    return [
        attention_maps(source, scores, method.name, labels, False, reshape)
        for source, reshape in zip(found.sources, question.reshapes(), strict=True)
    ]


def _warn(question: Question, sources: list[Tensor], scores: Tensor) -> None:
    """Respond-CAM divides by the sum of a channel, and adds up to the logit, only on some layers."""
    for layer, source, reshape in zip(question.layers, sources, question.reshapes(), strict=True):
        activations = spatial(source.detach(), reshape)
        for sentence in respond_warnings(activations, between(scores, source).norms, layer.key):
            warnings.warn(sentence, stacklevel=5)
