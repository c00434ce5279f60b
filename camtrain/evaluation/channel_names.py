"""Names for the channels of a layer, fitted on a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from camtrain._batch import Adapter
from camtrain._errors import InputError
from camtrain.cam.engine import Reshape, precise, spatial
from camtrain.cam.layer_lookup import plain_name
from camtrain.cam.question import Layer, Question, WantedLayer, asking
from camtrain.evaluation._reading import batches_of, image_for, unlabelled
from camtrain.evaluation.concepts import Concepts, TableSource, Window
from camtrain.metrics.channel_concepts import LEAST_IOU, TOP, ChannelConcepts, ConceptTable


@dataclass(frozen=True, eq=False)
class ChannelNames:
    """What each channel of a layer responds to.

    Attributes:
        layer: Dotted name of the layer.
        names: K names; None where no concept overlaps enough.
        concepts: O names that were tried: organs, then bands of HU.
        table: Overlap with every concept, threshold and coverage of each channel.
    """

    layer: str
    names: tuple[str | None, ...]
    concepts: tuple[str, ...]
    table: ConceptTable

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        data: Any,
        table: TableSource | None = None,
        layer: Layer = None,
        *,
        window: Window | None = None,
        bands: Mapping[str, tuple[float, float]] | None = None,
        top: float = TOP,
        least: float = LEAST_IOU,
        keys: Mapping[str, str] | None = None,
        adapter: Adapter | None = None,
        reshape: Reshape | None = None,
        progress: bool = True,
    ) -> ChannelNames:
        """Name channels in one pass over a data set, without labels (`ChannelConcepts` has the definitions).

        Args:
            model: The model; it is left as it was.
            data: A batch, or batches (a DataLoader), with `image` and, for a table, `organs`.
            table: `OrganTable` or what `OrganTable.load` takes: its organs are concepts.
            layer: Dotted name, module, or None for the last feature map.
            window: (low, high) in HU of an image in 0..1, or callable(image) -> HU: bands of HU are concepts too.
            bands: Other bands of HU, name -> (low, high).
            top: Share of the cells that are lit in each channel.
            least: Overlap from which on a channel gets a name.
            keys: Contract word -> key in the batches.
            adapter: Callable that makes a dict with the contract's words of a batch.
            reshape: Callable that makes (B, K, *S') of the layer's output.
            progress: Show a bar on stderr.

        Raises:
            InputError: Nothing to name after, no case with organs, or batches that break the contract.

        Example:
            >>> model = nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU())
            >>> _ = model[0].weight.data.copy_(torch.tensor([[[1.0]], [[-1.0]]])), model[0].bias.data.zero_()
            >>> batch = {"image": torch.tensor([[[0.0, 1.0, 1.0, 0.0]]])}
            >>> ChannelNames.fit(model, batch, layer="1", window=lambda image: 400 * image).names
            ('bone', None)
        """
        concepts = Concepts(table, window, bands)
        metric: ChannelConcepts | None = None
        wanted: WantedLayer | None = None
        for words in batches_of(data, adapter, progress, "naming channels"):
            batch = unlabelled(words, keys)
            image = image_for(model, batch)
            if wanted is None:
                with asking(model, image):
                    wanted = WantedLayer.of(model, image, layer)
            activations = _activations(model, image, wanted, reshape)
            if metric is None:
                metric = ChannelConcepts(activations.shape[1], len(concepts.names), top).to(activations.device)
            known = batch.has_organs if concepts.by_organ else torch.ones_like(batch.has_organs)
            shares = concepts.shares(image, batch.organs, tuple(activations.shape[2:]))
            metric.update(activations, shares, known.to(activations.device))
        if metric is None or wanted is None or not int(metric.cells):
            raise InputError(
                "no case to name channels with: pass at least one batch, with organs (and has_organs not all False)"
            )
        found = metric.table()
        return cls(plain_name(wanted.name), tuple(found.names(concepts.names, least)), concepts.names, found)

    def __repr__(self) -> str:
        named = sum(name is not None for name in self.names)
        return f"ChannelNames(layer {self.layer!r}, {named} of {len(self.names)} channels named)"

    def check(self, layer: str, channels: int) -> None:
        """Do these names belong to that layer?

        Raises:
            InputError: Another layer, or another number of channels.
        """
        if layer != self.layer or channels != len(self.names):
            raise InputError(
                f"channels= was fitted on layer {self.layer!r} with {len(self.names)} channels, but the account is of "
                f"layer {layer!r} with {channels}: fit ChannelNames on the same layer"
            )

    def iou(self, channel: int) -> float:
        """Overlap of a channel with the concept that fits it best."""
        return float(self.table.iou.reshape(len(self.names), -1)[channel].max())


def _activations(model: nn.Module, image: Tensor, wanted: WantedLayer, reshape: Reshape | None) -> Tensor:
    with asking(model, image):
        answer = Question(model, image, (wanted,), reshape=reshape).forward(precise=True)
        return precise(spatial(answer.sources[0], reshape)).detach()
