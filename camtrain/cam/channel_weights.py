"""`channel_weights`: how much each channel of a layer counts for a label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.cam import functional
from camtrain.cam.answering import read_options
from camtrain.cam.engine import Reshape, label_gradients, precise, require_pool_head, spatial
from camtrain.cam.explaining import checked_image, checked_model
from camtrain.cam.logits import PickLogits
from camtrain.cam.method_table import find_method
from camtrain.cam.question import Layer, Question, Target, WantedLayer, asking
from camtrain.cam.relevance import channel_relevance, default_contrast
from camtrain.cam.score_cam import ScoreCAMOptions, score_cam_weights
from camtrain.cam.selection import Labels

_WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradcam": functional.grad_cam_weights,
    "counterfactual": functional.counterfactual_weights,
    "cam": functional.cam_weights,
    "gradcam++": functional.grad_cam_pp_weights,
    "respondcam": functional.respond_cam_weights,
    "xgradcam": functional.respond_cam_weights,
}
WITH_WEIGHTS = (*_WEIGHTS, "relevancecam", "scorecam")


def channel_weights(
    model: nn.Module,
    image: Tensor,
    method: str = "gradcam",
    layer: Layer = None,
    labels: Labels = None,
    target: Target | None = None,
    logits: PickLogits | None = None,
    reshape: Reshape | None = None,
    *,
    call: int | None = None,
    **options: Any,
) -> Tensor:
    """Channel weights of a method: map = sum over channels of weight x activation.

    Grad-CAM's are the neuron importances of its paper, section 3.1. The model is left as it was, as by `explain`.

    Args:
        model: Any module whose output contains logits (B, L).
        image: (B, C, *S).
        method: A method that weighs channels as a whole: gradcam, counterfactual, cam, gradcam++, respondcam, xgradcam,
            relevancecam, scorecam.
        layer: Dotted name, module, or None for the last feature map.
        labels: As for `explain`.
        target: As for `explain`.
        logits: Callable that picks (B, L) from the model's output.
        reshape: Callable that makes (B, K, *S') of the layer's output.
        call: Which call of the layer counts.
        **options: Options of the method (`relevancecam`: rules, contrast, box, gates; `scorecam`: channels, chunk,
            background, progress).

    Returns:
        (B, n, K); (B, L, K) with NaN where a bool mask per sample left a label out.

    Raises:
        InputError: A method that has no such weights, and whatever `explain` refuses.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> weights = channel_weights(model, torch.rand(2, 1, 6, 9), "cam")
        >>> bool(torch.allclose(weights[0], model[4].weight))
        True
    """
    row = find_method(method)
    if method not in WITH_WEIGHTS:
        raise InputError(f"method {method!r} does not weigh channels as a whole: use one of {', '.join(WITH_WEIGHTS)}")
    if target is not None and labels is not None:
        raise InputError("give either labels= or target=, not both")
    image = checked_image(image, checked_model(model))
    read = read_options(row, options)
    with asking(model, image):
        question = Question(model, image, (WantedLayer.of(model, image, layer, call),), labels, target, logits, reshape)
        if method == "relevancecam":
            return channel_relevance(question, default_contrast(read, row, question))[0].detach()
        if method == "scorecam":
            return score_cam_weights(question, row, cast(ScoreCAMOptions, read))[0][1]
        return _of_gradients(question, method)


def _of_gradients(question: Question, method: str) -> Tensor:
    answer = question.forward()
    (source,), (reshape,) = answer.sources, question.reshapes()
    with torch.autocast(device_type=source.device.type, enabled=False):
        scores = question.scores(answer.output)
        if method == "cam":
            require_pool_head(scores, source, reshape)
        chosen = question.selection(scores)
        activations = precise(spatial(source, reshape)).detach()
        each = []
        for gradient in label_gradients(scores, source, chosen, create_graph=False):
            given = precise(spatial(gradient, reshape))
            each.append(_WEIGHTS[method](activations, given))
        stacked = torch.stack(each, dim=1) if each else activations.new_empty(len(activations), 0, activations.shape[1])
        return chosen.arrange(stacked)
