"""Run a user's network again, as the user's step ran it: for methods that need forwards of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from camtrain._errors import InputError
from camtrain.cam.answering import answer
from camtrain.cam.engine import Reshape
from camtrain.cam.logits import PickLogits, pick_logits
from camtrain.cam.method_table import Method
from camtrain.cam.question import Question, WantedLayer, asking, image_only


@dataclass(frozen=True)
class Call:
    """A module and what it was called with.

    Attributes:
        entry: The module.
        leaves: Its arguments, laid flat.
        spec: How they were nested.
        at: Which of them is the image.
    """

    entry: nn.Module
    leaves: tuple[Any, ...]
    spec: TreeSpec
    at: int

    @staticmethod
    def of(entry: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        """The image is the first floating tensor (B, C, *S), wherever it is nested; None where there is none.

        Example:
            >>> call = Call.of(nn.Identity(), ({"age": torch.ones(2), "image": torch.zeros(2, 1, 4)},), {})
            >>> call.image.shape, call.rows([1])(torch.ones(1, 1, 4))["age"]
            (torch.Size([2, 1, 4]), tensor([1.]))
        """
        leaves, spec = tree_flatten((args, dict(kwargs)))
        found = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.ndim >= 3 and x.is_floating_point()]
        return Call(entry, tuple(leaves), spec, found[0]) if found else None

    @property
    def image(self) -> Tensor:
        """(B, C, *S), plain, without a graph."""
        image: Tensor = self.leaves[self.at]
        return image.detach().as_subclass(Tensor)

    @property
    def image_alone(self) -> bool:
        """Is the image the only argument, by position?"""
        args, kwargs = tree_unflatten(list(self.leaves), self.spec)
        return len(args) == 1 and not kwargs and args[0] is self.leaves[self.at]

    @property
    def divisible(self) -> bool:
        """Can some samples be left out for sure? Of a tensor or a list beside the image it cannot be told."""
        others = (x for i, x in enumerate(self.leaves) if i != self.at)
        return all(x is None or isinstance(x, bool | int | float) for x in others)

    def rows(self, rows: Sequence[int]) -> Call:
        """The same call with these samples only."""
        leaves = tuple(x[list(rows)] if self._per_sample(x) else x for x in self.leaves)
        return replace(self, leaves=leaves)

    def arguments(self, image: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with another image of as many samples."""
        leaves = [image if i == self.at else x for i, x in enumerate(self.leaves)]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs

    def __call__(self, image: Tensor) -> Any:
        """Call the module with another image."""
        args, kwargs = self.arguments(image)
        return self.entry(*args, **kwargs)

    def _per_sample(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim > 0 and len(x) == len(self.leaves[self.at])


@dataclass(frozen=True)
class Rerun:
    """A network that can be run again.

    Attributes:
        call: How it was called.
        layers: Where maps are wanted.
        giver: The module whose output holds the logits.
        giver_call: Which of its runs counts.
        pick: Picks them from it, where the user gave a callable.
    """

    call: Call
    layers: tuple[WantedLayer, ...]
    giver: nn.Module
    giver_call: int
    pick: PickLogits | None

    def __post_init__(self) -> None:
        inside = set(self.call.entry.modules())
        if self.giver not in inside or any(layer.module not in inside for layer in self.layers):
            raise InputError(
                "the step calls the parts of the network one after another, so it cannot be run again as one, which "
                "scorecam, lrp, relevancecam and the guided methods need: give the module a forward that goes from the "
                "image to the logits, or leave these methods out"
            )

    def maps(
        self, method: Method, options: Mapping[str, Any], labels: Tensor, reshape: Reshape | None = None
    ) -> list[Tensor] | None:
        """Maps of some labels of some samples; samples without any are not run, where they can be left out.

        Args:
            method: A row of the method table.
            options: Its options by name.
            labels: (B, L) bool.
            reshape: Makes (B, K, *S') of a layer's output.

        Returns:
            Per layer (B, L, *S') detached, NaN where not selected; None where nothing is.

        Raises:
            InputError: Not one image per row of labels, or what the method refuses.
        """
        if len(self.call.image) != len(labels):
            raise InputError(
                f"the network was called with {len(self.call.image)} images for {len(labels)} rows of labels: "
                f"method {method.name!r} needs one image per row"
            )
        rows = labels.any(dim=1).nonzero()[:, 0].tolist()
        if not rows:
            return None
        if not self.call.divisible or len(rows) == len(labels):
            return self._ask(self.call, labels, method, options, reshape)
        some = self._ask(self.call.rows(rows), labels[rows], method, options, reshape)
        return [_laid_out(maps, rows, len(labels)) for maps in some]

    def _ask(
        self, call: Call, labels: Tensor, method: Method, options: Mapping[str, Any], reshape: Reshape | None
    ) -> list[Tensor]:
        arguments = image_only if call.image_alone else call.arguments
        with asking(call.entry, call.image), self._reading() as logits:
            # What was made under inference mode can be used, but never be part of a graph.
            image, labels = call.image.clone(), labels.clone()
            asked = Question(
                call.entry, image, self.layers, labels, logits=logits, reshape=reshape, arguments=arguments
            )
            return answer(asked, method, options)

    @contextmanager
    def _reading(self) -> Iterator[PickLogits]:
        """Yields the callable that gives the logits of the forward that ran last."""
        if self.giver is self.call.entry:
            yield lambda output: pick_logits(output, self.pick)
            return
        kept: list[Any] = []
        handles: list[torch.utils.hooks.RemovableHandle] = []

        def begin(*_: Any) -> None:
            # Anew in every forward, to be behind the hooks of LRP, which change what the module gives.
            kept.clear()
            for handle in handles[1:]:
                handle.remove()
            handles[1:] = [self.giver.register_forward_hook(_keeper(kept))]

        handles.append(self.call.entry.register_forward_pre_hook(begin))
        try:
            yield lambda _: pick_logits(kept[self.giver_call], self.pick)
        finally:
            for handle in handles:
                handle.remove()


def _keeper(kept: list[Any]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def keep(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        kept.append(output)

    return keep


def _laid_out(maps: Tensor, rows: list[int], batch: int) -> Tensor:
    full = maps.new_full((batch, *maps.shape[1:]), torch.nan)
    full[rows] = maps
    return full
