"""Maps beyond those that are scored: of absent labels, of single layers, and Grad-CAM for counterfactuals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.cam.call import Call
from camtrain.cam.engine import Reshape
from camtrain.cam.fusing import fused
from camtrain.cam.layer_lookup import find_layer
from camtrain.cam.layer_table import seen_share
from camtrain.cam.several import maps_of_layers
from camtrain.cam.watch import ModuleWatch

GRADCAM = "gradcam"


@dataclass(frozen=True)
class SideMaps:
    """What one step of the user's module can still be asked for, without another forward.

    Attributes:
        watch: What has seen the step.
        sources: What it took of the layers.
        logits: (B, L), with a graph down to the sources.
        methods: Methods of the gradient family; Grad-CAM comes in addition.
        reshape: Makes (B, K, *S') of a layer's output.
    """

    watch: ModuleWatch
    sources: Mapping[str, Tensor]
    logits: Tensor
    methods: tuple[str, ...]
    reshape: Reshape | None

    def maps(self, wanted: Tensor) -> Iterator[tuple[str, str, Tensor]]:
        """Method, layer and maps; the layer is empty for what is scored: of several layers their mean.

        Single layers are given of the first method, where there are several.

        Args:
            wanted: (B, L) bool.

        Yields:
            Maps (B, L, *S'), NaN where not wanted.
        """
        for method in dict.fromkeys([*self.methods, GRADCAM]):
            each = maps_of_layers(self.sources, self.logits, method, wanted, False, self.reshape)
            yield method, "", fused(list(each.values()))
            if len(each) > 1 and method == self.methods[0]:
                for layer, maps in each.items():
                    yield method, layer, maps

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
