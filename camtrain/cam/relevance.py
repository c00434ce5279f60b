"""LRP maps and Relevance-CAM: where the relevance of a label's logit lies, at any layers, in one pass.

The rules sit in `lrp_rules` and are woven into one forward by `lrp_hooks`; here are the start vectors (with or without
contrast to the other labels) and what becomes of the relevance R = A * gradient that arrives at a layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.cam.engine import NO_LINK, explained, precise, spatial
from camtrain.cam.functional import weighted
from camtrain.cam.lrp import Rules, find_rules, lrp_hooks
from camtrain.cam.lrp_graph import graph_rules
from camtrain.cam.lrp_rules import safe
from camtrain.cam.method_table import Method
from camtrain.cam.question import Answer, Question
from camtrain.cam.relevance_start import Contrast, Start, check_contrast, start_of

_Make = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RelevanceOptions:
    """Options of `lrp` and `relevancecam`.

    Attributes:
        rules: Preset name (`camtrain.cam.lrp.PRESETS`) or `Rules`.
        contrast: Where relevance starts, see `camtrain.cam.relevance_start.start_vector`. None: `"none"` for `lrp`, so
            that maps add up to the logit, and `"others"` for `relevancecam`, whose sign then does not depend on that
            of the logit.
        box: (low, high) of the image's intensities (the window, not the image's own minimum and maximum): the first
            layer then follows the zB rule.
        gates: More modules whose output only gates others: dotted names, or callable(name, module) -> bool.
    """

    rules: str | Rules = "zplus"
    contrast: Contrast | None = None
    box: tuple[float, float] | None = None
    gates: Iterable[str] | Callable[[str, nn.Module], bool] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            InputError: Unknown rules or contrast, bounds out of order.
        """
        find_rules(self.rules, self.box)
        check_contrast(self.contrast)
        named = isinstance(self.gates, Iterable) and all(isinstance(gate, str) for gate in self.gates)
        if not (self.gates is None or callable(self.gates) or named):
            raise InputError(f"gates= expects dotted names or a callable(name, module) -> bool, got {self.gates!r}")


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
    if method.name == "relevancecam":
        # A target is its own contrast: None stands for a start that is not weighted with the output's sign.
        return options if question.target is not None else replace(options, contrast="others")
    return replace(options, contrast="none")


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
    rules = find_rules(options.rules, options.box)
    contrast = "none" if options.contrast is None else options.contrast
    with ExitStack() as stack:
        # The rules stay in place for the backward pass too: a checkpointed part runs its forward again there.
        hooks = stack.enter_context(lrp_hooks(question.model, rules, options.gates, question.image))
        answer = question.forward(precise=True)
        stack.enter_context(torch.autocast(device_type=question.image.device.type, enabled=False))
        start = start_of(question, answer.output, contrast, unit=options.contrast is None)
        written_out = stack.enter_context(graph_rules(start.ends, answer.sources, rules))
        made = list(_each(question, answer, start, make))
    if unruled := sorted({*hooks.unruled, *written_out}):
        warnings.warn(
            f"no LRP rule for {', '.join(unruled)}: the plain gradient is used there, and relevance may not be "
            "conserved; modules of torch (nn.SiLU, nn.BatchNorm3d, ...) have rules, and gates= names modules that only "
            "scale others",
            stacklevel=6,
        )
    return made


def _each(question: Question, answer: Answer, start: Start, make: _Make) -> Iterator[Tensor]:
    """What is made of the relevance at every layer, for all selected labels."""
    shapes = question.reshapes()
    activations = [precise(spatial(s, r)).detach() for s, r in zip(answer.sources, shapes, strict=True)]
    # No label at all: nothing.
    empty = [make(a, a)[:, None][:, :0] for a in activations]
    each: list[list[Tensor]] = [[] for _ in activations]
    for seeds in start.seeds:
        relevances = _relevance(start.ends, answer.sources, seeds)
        for made, shape, active, relevance in zip(each, shapes, activations, relevances, strict=True):
            made.append(make(precise(spatial(relevance, shape)), active))
    for made, none in zip(each, empty, strict=True):
        yield start.chosen.arrange(torch.stack(made, dim=1) if made else none)


def _relevance(ends: list[Tensor], sources: list[Tensor], seeds: list[Tensor]) -> list[Tensor]:
    seeds = [seed.to(end.dtype) for seed, end in zip(seeds, ends, strict=True)]
    try:
        gradients = torch.autograd.grad(ends, sources, seeds, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise (explained(error) or error) from None
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
