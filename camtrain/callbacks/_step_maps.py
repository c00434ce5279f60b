"""The maps of one evaluation step: those that are scored, and what the panel shows besides, out of the same passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.cam.asked import Asked
from camtrain.cam.call import Call
from camtrain.cam.engine import Reshape
from camtrain.cam.fusing import fused
from camtrain.cam.layer_lookup import find_layer
from camtrain.cam.layer_table import seen_share
from camtrain.cam.several import maps_of_layers_by
from camtrain.cam.watch import ModuleWatch

GRADCAM = "gradcam"
"""The panel shows it besides, for counterfactuals."""


@dataclass(frozen=True)
class Made:
    """Maps of one step, (B, L, *S') each, NaN where a label was not asked for.

    Attributes:
        by_method: Those of the monitor's methods, of several layers their mean on the finest grid.
        besides: Method, layer and maps that only the panel shows: Grad-CAM, and the single layers of the first method
            where there are several.
    """

    by_method: Mapping[str, Tensor]
    besides: Sequence[tuple[str, str, Tensor]] = ()

    @property
    def shown(self) -> list[tuple[str, str, Tensor]]:
        """Method, layer (empty: what is scored) and maps of all of them."""
        return [*((method, "", maps) for method, maps in self.by_method.items()), *self.besides]


@dataclass(frozen=True)
class StepMaps:
    """What one step of the user's module can be asked for.

    Attributes:
        asked: The methods.
        watch: What has seen the step.
        sources: What it took of the layers.
        logits: (B, L), with a graph down to the sources.
        reshape: Makes (B, K, *S') of a layer's output.
    """

    asked: Sequence[Asked]
    watch: ModuleWatch
    sources: Mapping[str, Tensor]
    logits: Tensor
    reshape: Reshape | None

    def make(self, present: Tensor, shown: Tensor, recorded: bool = False, rows: slice | None = None) -> Made:
        """The maps; methods of the gradient family share one backward pass per label, and add no forward.

        Args:
            present: (b, L) bool: labels that paid methods are asked about.
            shown: (b, L) bool: the present labels, and others that pictures or the report show.
            recorded: Are there cases of the report among them?
            rows: The b samples of the batch that maps are wanted of; None = all.

        Raises:
            InputError: What a method refuses, and for paid ones a step that does not run the network as one.
        """
        free = [asked.name for asked in self.asked if not asked.paid]
        names = list(dict.fromkeys([*free, GRADCAM])) if recorded else free
        layers = maps_of_layers_by(self.sources, self.logits, names, shown, False, self.reshape, rows)
        mean = {name: fused([each[name] for each in layers.values()]) for name in names}
        maps = {}
        for asked in self.asked:
            if not asked.paid:
                maps[asked.name] = mean[asked.name]
            elif (own := self._rerun(asked, present, rows)) is not None:
                maps[asked.name] = fused(own)
        besides = [(name, "", mean[name]) for name in names if name not in maps]
        if recorded and len(layers) > 1:
            besides += [(free[0], layer, each[free[0]]) for layer, each in layers.items()]
        return Made(maps, besides)

    def free(self) -> StepMaps:
        """The same step, without methods that cost forwards of their own."""
        return replace(self, asked=[asked for asked in self.asked if not asked.paid])

    def _rerun(self, asked: Asked, present: Tensor, rows: slice | None) -> list[Tensor] | None:
        rerun = self.watch.rerun()
        # Rows alone, where they can be run alone: maps of a whole batch are what memory has just refused.
        if rows is not None and rerun.call.divisible and len(rerun.call.image) == len(self.logits):
            rerun = replace(rerun, call=rerun.call.rows(list(range(len(self.logits)))[rows]))
            return rerun.maps(asked.row, asked.options, present, self.reshape)
        whole = present
        if rows is not None:
            whole = torch.zeros(self.logits.shape, dtype=torch.bool, device=present.device)
            whole[rows] = present
        found = rerun.maps(asked.row, asked.options, whole, self.reshape)
        return found if found is None or rows is None else [maps[rows] for maps in found]

    def layers(self) -> list[str]:
        """The layers, as their maps are named."""
        return list(self.watch.keys)

    def seen(self) -> dict[str, float]:
        """Layer -> share of the image that a central cell depends on; empty where it cannot be told.

        This takes a forward and a backward of one case, in eval mode, and leaves no trace.
        """
        entry, inputs = self.watch.entry, self.watch.inputs
        call = None if entry is None or inputs is None else Call.of(entry, *inputs)
        if call is None:
            return {}
        with torch.inference_mode(False):
            one = call.rows([0])
            found = {}
            for key, name in zip(self.watch.keys, self.watch.names, strict=True):
                try:
                    share = seen_share(one.entry, one.image, find_layer(self.watch.model, name)[1], one)
                except InputError:  # a layer beside the way from the image to what the step called: unknown
                    continue
                found[key] = round(share, 4)
        return found


def first_only(present: Tensor) -> Tensor:
    """Of (B, L) bool all but the first True made False."""
    return present & (present.flatten().cumsum(0).view_as(present) == 1)


def only(maps: Mapping[str, Tensor], present: Tensor, asked: Tensor) -> dict[str, Tensor]:
    """The maps with NaN for what was asked for besides the present labels.

    Args:
        maps: Method -> (B, L, *S').
        present: (B, L) bool.
        asked: (B, L) bool: which maps were made.
    """
    if not bool((asked & ~present).any()):
        return dict(maps)
    return {m: torch.where(present[(..., *[None] * (each.ndim - 2))], each, torch.nan) for m, each in maps.items()}
