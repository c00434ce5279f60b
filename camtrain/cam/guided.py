"""Guided backprop and Guided Grad-CAM: fine texture on the image's grid, for display.

Guided backprop follows the score back to the image and lets only positive gradients pass at every ReLU (Springenberg et
al. 2015); Guided Grad-CAM is its product with the enlarged positive part of Grad-CAM (Selvaraju et al. 2017, section
3.2). Both change little when the weights of the network are randomised (Adebayo et al. 2018, arXiv:1810.03292): they
show what edges there are, not what the network has learnt, so they must not serve as a score.

Where the gradient is gated is read off the autograd graph (`camtrain.cam.guided_gates`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.cam.engine import attention_maps, gradients_on, label_gradients, precise
from camtrain.cam.enlarge import enlarge
from camtrain.cam.guided_gates import Gate, find_gates, guiding
from camtrain.cam.method_table import Method
from camtrain.cam.question import Question


@dataclass(frozen=True)
class GuidedOptions:
    """Options of `guided_backprop` and `guided_gradcam`.

    Attributes:
        approximate: Guided backprop is defined on ReLU. With True, smooth relatives (SiLU or Swish, GELU, Mish,
            Hardswish, Softplus, ELU, SELU, CELU, LeakyReLU, PReLU, RReLU; as modules or functions) are gated by the
            signs of their input and of the gradient: act'(x) [x > 0] [g > 0] g. With False, networks that have any of
            them are refused.

    Raises:
        InputError: Neither True nor False.
    """

    approximate: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.approximate, bool):
            raise InputError(f"approximate= expects True or False, got {self.approximate!r}")


def guided_maps(question: Question, method: Method, options: GuidedOptions) -> list[Tensor]:
    """Maps of every wanted layer: one forward; per label one backward pass to the image, guided.

    Args:
        question: What is asked.
        method: `guided_backprop` (the same for every layer) or `guided_gradcam` (one more backward pass per label, to
            the layer, through the same graph).
        options: What to do on networks without ReLU.

    Returns:
        Per layer (B, n, *S): on the image's grid, signed, channels of the image summed.

    Raises:
        InputError: A network that guided backprop is not defined on, or no gradient reaches the image.
    """
    with_layers = method.name == "guided_gradcam"
    answer = (question if with_layers else replace(question, layers=())).forward(to_image=True, precise=True)
    scores = question.scores(answer.output)
    with gradients_on(scores.device):
        gates = find_gates(scores, answer.image)
        _check(gates, options)
        labels = None if question.target is not None else question.labels
        # The plain gradients first: the gates are in the graph that both share.
        coarse = [
            attention_maps(source, scores, "gradcam", labels, False, question.reshape) for source in answer.sources
        ]
        with guiding(gates):
            fine = _guided_gradients(question, scores, answer.image)
        if not with_layers:
            return [fine, *(fine.clone() for _ in question.layers[1:])]
        return [fine * enlarge(maps.clamp(min=0), tuple(fine.shape[2:])) for maps in coarse]


def _guided_gradients(question: Question, scores: Tensor, image: Tensor) -> Tensor:
    chosen = question.selection(scores)
    each = [precise(g).sum(dim=1) for g in label_gradients(scores, image, chosen, create_graph=False)]
    empty = precise(image.detach())[:, :0]
    return chosen.arrange(torch.stack(each, dim=1) if each else empty)


def _check(gates: list[Gate], options: GuidedOptions) -> None:
    instead = "use hirescam, layercam or lrp with layer='input' instead"
    smooth = sorted({gate.name for gate in gates if not gate.exact})
    if smooth and not options.approximate:
        raise InputError(
            f"guided backprop is defined on ReLU networks only, and this one has {', '.join(smooth)}: {instead}, or "
            "pass approximate=True, which gates smooth activations by the sign of their input"
        )
    if not gates:
        raise InputError(
            "guided backprop is defined on ReLU networks, and there is no ReLU between the image and the scores: "
            f"{instead}"
        )
