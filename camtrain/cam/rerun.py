"""Run a user's network again, as the user's step ran it: for methods that need forwards of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.cam.answering import answer
from camtrain.cam.call import Call
from camtrain.cam.engine import Reshape
from camtrain.cam.logits import PickLogits, pick_logits
from camtrain.cam.method_table import Method
from camtrain.cam.question import Question, WantedLayer, asking, image_only


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

    def on(self, image: Tensor, layers: tuple[WantedLayer, ...] | None = None) -> Rerun:
        """The same network on other images, and if wanted at other layers.

        Args:
            image: (B, C, *S), as many as you like.
            layers: Where maps are wanted; None = at the same layers.

        Raises:
            InputError: The network takes more than the image, so that it cannot be told what goes with another one.
        """
        if not self.call.divisible:
            raise InputError(
                "the step calls the network with more than the image (another tensor or a list), so it cannot be run "
                "on images that were kept"
            )
        return replace(self, call=self.call.on(image), layers=self.layers if layers is None else layers)

    def logits(self) -> Tensor:
        """(B, L) in eval mode, detached, in float32 at least; the network is left as it was."""
        with asking(self.call.entry, self.call.image), torch.no_grad(), self._reading() as pick:
            found = pick(self.call(self.call.image.clone())).detach()
        return found if found.dtype == torch.float64 else found.float()

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
