"""What is asked of a model: which layers, which scores; and the forward that answers it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from camtrain._errors import InputError
from camtrain.cam.capture import LayerCapture, last_run, note_runs, run_eagerly
from camtrain.cam.engine import Reshape, column_of
from camtrain.cam.layer_lookup import INPUT, default_layer, find_layer, plain_name, untouched
from camtrain.cam.logits import PickLogits, pick_logits
from camtrain.cam.selection import Labels, Selection, select
from camtrain.cam.tap import chosen_call

Layer = str | nn.Module | None
Target = Callable[[Any], Tensor]
Arguments = Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class WantedLayer:
    """One layer to look at.

    Attributes:
        key: Under which name its maps are handed out.
        name: Dotted name.
        module: The layer; None stands for the image itself.
        call: Which of its calls counts.
    """

    key: str
    name: str
    module: nn.Module | None
    call: int | None

    @staticmethod
    def of(model: nn.Module, image: Tensor, layer: Layer, call: int | None = None) -> WantedLayer:
        """Find it; `layer=None` costs one forward of one sample.

        Raises:
            InputError: No such layer, or one inside a scripted model.
        """
        if layer == INPUT:
            return WantedLayer(INPUT, INPUT, None, None)
        if layer is None:
            # A shared activation module runs several times; the last feature map is what its last call gave.
            name, module = default_layer(model, image)
            return WantedLayer(plain_name(name), name, module, -1 if call is None else call)
        name, module = find_layer(model, layer)
        return WantedLayer(layer if isinstance(layer, str) else plain_name(name), name, module, call)


@dataclass(frozen=True)
class Answer:
    """What one forward gave.

    Attributes:
        sources: Output of every wanted layer, with the graph from there to `output`.
        output: What the model returned.
        image: The image that the graph begins at, where it does.
    """

    sources: list[Tensor]
    output: Any
    image: Tensor


def image_only(image: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How most models are called."""
    return (image,), {}


@dataclass(frozen=True)
class Question:
    """Which scores of which images, seen from which layers of which model.

    To be asked inside `asking(model, image)`, which leaves the model as it was.

    Attributes:
        model: Any module.
        image: (B, C, *S), plain.
        layers: Where maps are wanted.
        labels: Columns of the logits (`camtrain.cam.selection.select`).
        target: Instead of labels: callable(output) -> (B,).
        logits: Picks (B, L) from the model's output.
        reshape: Makes (B, K, *S') of a layer's output.
        arguments: Arguments of the model's forward for an image.
    """

    model: nn.Module
    image: Tensor
    layers: tuple[WantedLayer, ...]
    labels: Labels = None
    target: Target | None = None
    logits: PickLogits | None = None
    reshape: Reshape | None = None
    arguments: Arguments = image_only

    def reshapes(self) -> list[Reshape | None]:
        """What brings the output of each wanted layer into (B, K, *S'); the image already is."""
        return [None if layer.module is None else self.reshape for layer in self.layers]

    def run(self, image: Tensor) -> Any:
        """The model's output for an image."""
        args, kwargs = self.arguments(image)
        return self.model(*args, **kwargs)

    def forward(self, to_image: bool = False, precise: bool = False) -> Answer:
        """One forward.

        Args:
            to_image: Record the graph from the image on; without it the graph begins at the first wanted layer to run
                and nothing is recorded below.
            precise: In float32 at least, whatever autocast or the weights say.

        Raises:
            InputError: A wanted layer did not run, or several times.
        """
        to_image = to_image or any(layer.module is None for layer in self.layers)
        begin = [last_run(w.module) if w.call == -1 and not to_image else 0 for w in self.layers]
        try:
            return self._forward(to_image, precise, begin)
        except _FewerRunsError:
            return self._forward(to_image, precise, [0] * len(begin))

    def _forward(self, to_image: bool, precise: bool, begin: list[int]) -> Answer:
        leaf = self.image.clone() if to_image else self.image.detach()
        captures = [LayerCapture(w.name, not to_image, b) for w, b in zip(self.layers, begin, strict=True)]
        with ExitStack() as stack:
            for capture, wanted in zip(captures, self.layers, strict=True):
                if wanted.module is not None:
                    capture.attach(wanted.module)
                    stack.callback(capture.detach)
            if precise:
                stack.enter_context(torch.autocast(device_type=leaf.device.type, enabled=False))
                leaf = leaf if leaf.dtype == torch.float64 else leaf.float()
            leaf.requires_grad_(to_image)
            with torch.set_grad_enabled(to_image):
                # An in-place operation on the image must not reach the leaf.
                output = self._run_precise(leaf.clone()) if precise else self.run(leaf.clone())
            for capture, wanted in zip(captures, self.layers, strict=True):
                if wanted.module is not None:
                    note_runs(wanted.module, len(capture.outputs))
            if any(b and len(c.outputs) <= b for c, b in zip(captures, begin, strict=True)):
                raise _FewerRunsError
            sources = [
                leaf if w.module is None else chosen_call(list(c.outputs), w.call, plain_name(c.name))
                for c, w in zip(captures, self.layers, strict=True)
            ]
            for wanted, source in zip(self.layers, sources, strict=True):
                self._check_rank(wanted.key, source)
        return Answer(sources, output, leaf)

    def _check_rank(self, key: str, source: Tensor) -> None:
        if self.reshape is None and source.ndim != self.image.ndim:
            raise InputError(
                f"layer {key!r} gives {tuple(source.shape)} for an image of {tuple(self.image.shape)}: expected "
                "(B, K, *S) with the image's spatial axes; choose another layer (camtrain layers, or ct.layers, lists "
                "them), or bring tokens and slices into that form with reshape="
            )

    def _run_precise(self, image: Tensor) -> Any:
        half = {n: t for n, t in _tensors(self.model) if t.is_floating_point() and t.element_size() < 4}
        if not half:
            return self.run(image)
        args, kwargs = tree_map(_widened, self.arguments(image))
        return torch.func.functional_call(self.model, {n: t.float() for n, t in half.items()}, args, kwargs)

    def scores(self, output: Any) -> Tensor:
        """The scores to choose from: logits (B, L), or the target's as (B, 1).

        Raises:
            InputError: The output holds no logits, or the target gives something else than (B,).
        """
        if self.target is not None:
            return column_of(self.target(output), len(self.image))
        return pick_logits(output, self.logits, len(self.image))

    def selection(self, scores: Tensor) -> Selection:
        """Which columns of the scores are wanted."""
        return select(self.labels, scores.shape[0], scores.shape[1], scores.device)


class _FewerRunsError(Exception):
    """A layer ran less often than in the forward before: no graph begins at what was its last run."""


def _widened(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.is_floating_point() and value.element_size() < 4
    return value.float() if narrow else value


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@contextmanager
def asking(model: nn.Module, image: Tensor) -> Iterator[None]:
    """Eval mode, eager, gradients allowed; afterwards everything is as it was.

    Raises:
        InputError: The model is scripted or traced.
    """
    scripted = [n or type(m).__name__ for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise InputError(
            f"{scripted[0]!r} is scripted or traced by torch.jit, and hooks inside compiled TorchScript do not run: "
            "pass the eager model that it was made of"
        )
    with ExitStack() as stack:
        stack.enter_context(untouched(model, {image.device}))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(run_eagerly())
        yield
