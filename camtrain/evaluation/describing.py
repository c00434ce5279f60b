"""`describe`: what a model's logits are made of, in words, for single cases or averaged over a class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from camtrain._batch import Adapter, Batch
from camtrain._errors import InputError
from camtrain.cam.account import Account, account
from camtrain.cam.engine import Reshape
from camtrain.cam.logits import PickLogits
from camtrain.cam.question import Layer
from camtrain.cam.several import one_layer
from camtrain.evaluation._average import ClassAverage
from camtrain.evaluation._reading import batches_of, columns_of, image_for, is_batch, labels_of, unlabelled
from camtrain.evaluation.channel_names import ChannelNames
from camtrain.evaluation.concepts import Concepts, TableSource, Window
from camtrain.evaluation.description import ChannelPart, Description
from camtrain.evaluation.organ_account import sums_by

Wanted = Sequence[int | str] | Tensor | str | int | None


def describe(
    model: nn.Module,
    data: Any,
    table: TableSource | None = None,
    layer: Layer = None,
    *,
    labels: Wanted = None,
    names: Sequence[str] | None = None,
    channels: ChannelNames | None = None,
    window: Window | None = None,
    top: int = 5,
    keys: Mapping[str, str] | None = None,
    adapter: Adapter | None = None,
    logits: PickLogits | None = None,
    reshape: Reshape | None = None,
    progress: bool = True,
) -> list[Description]:
    """Say what logits are made of: cells by organ, bias, and the channels for and against.

    The account is exact where the network is piecewise linear behind the layer (`ct.account`), and says so where it is
    not. It is an account of cells: a cell may have seen more than the organ it lies in.

    Args:
        model: Any module whose output contains logits (B, L); it is left as it was.
        data: One batch: a description per case and label. An iterable of batches (a DataLoader) with `label`: one
            description per label, averaged over the cases in which it is present; cases without organs and unknown
            labels are left out and counted.
        table: `OrganTable` or what `OrganTable.load` takes: parts are its organs. None: parts are bands of HU.
        layer: Dotted name, module, or None for the last feature map.
        labels: Columns or names, one of them, or a bool for every label. None: for one batch the labels present in
            truth, or without truth those of probability 0.5 and more, and for a case with none of these its likeliest;
            for many batches all.
        names: Label names in the order of the outputs. None: the model's `labels`, or the table's, if the number fits.
        channels: Fitted `ChannelNames` of the same layer: adds the top channels by name.
        window: (low, high) in HU of an image in 0..1, or callable(image) -> HU; needed without a table.
        top: Channels told for and against each.
        keys: Contract word -> key in the batch.
        adapter: Callable that makes a dict with the contract's words of a batch.
        logits: Callable that picks (B, L) from the model's output.
        reshape: Callable that makes (B, K, *S') of the layer's output.
        progress: Show a bar on stderr for many batches.

    Returns:
        Descriptions that print as sentences.

    Raises:
        InputError: No organs in the batch with a table, neither table nor window, an unknown label, a number of names
            that is not that of the outputs, channel names of another layer, many batches without labels, an empty
            batch, several layers, or `top` below 0.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
        >>> batch = {"image": torch.rand(1, 1, 4), "organs": torch.tensor([[[0, 3, 3, 0]]])}
        >>> table = {"organs": {"heart": 3}, "labels": {"stent": ["heart"]}}
        >>> (found,) = describe(model, batch, table)
        >>> abs(sum(found.by_organ.values()) + found.bias - found.logit) < 1e-5, found.label
        (True, 'stent')
    """
    one_layer(layer)
    if not isinstance(top, int) or top < 0:
        raise InputError(f"top= expects how many channels to tell, 0 or more, got {top!r}")
    concepts = Concepts(table, window if table is None else None)
    teller = _Teller(model, concepts, layer, labels, names, channels, top, keys, logits, reshape)
    if is_batch(data, adapter):
        (words,) = batches_of(data, adapter, False, "")
        return list(teller.cases(words))
    return teller.classes(batches_of(data, adapter, progress, "describing"))


@dataclass
class _Teller:
    """The arguments of `describe`, and what is learned at the first batch."""

    model: nn.Module
    concepts: Concepts
    layer: Layer
    labels: Wanted
    names: Sequence[str] | None
    channels: ChannelNames | None
    top: int
    keys: Mapping[str, str] | None
    logits: PickLogits | None
    reshape: Reshape | None
    call: int | None = None

    def cases(self, words: Any) -> Iterator[Description]:
        """One description per case and wanted label of a batch."""
        batch = unlabelled(words, self.keys)

        chosen: list[Tensor] = []

        def choose(scores: Tensor) -> Tensor:
            self.names_for(scores.shape[1])  # a wrong number of names is said before the work
            chosen.append(self._wanted_of_each(scores, labels_of(words, self.keys, scores.shape[1])))
            return chosen[0]

        found, parts = self._account(batch, choose)
        names = self.names_for(found.logits.shape[1])
        for case, label in chosen[0].nonzero().tolist():
            told = self._told(found, case, label)
            known = bool(batch.has_organs[case]) or not self.concepts.by_organ
            yield Description(
                label=names[label],
                case=f"case {case}" if batch.ids is None else batch.ids[case],
                by_organ=_ordered(self.concepts.parts, parts[case, label])
                if known
                else {"a case without organs": float(parts[case, label].sum())},
                **told,
            )

    def classes(self, batches: Iterator[Any]) -> list[Description]:
        """One description per label, averaged over the cases in which it is present."""
        averages: ClassAverage | None = None
        for words in batches:
            batch = unlabelled(words, self.keys)
            truth: list[Tensor] = []

            def choose(scores: Tensor, words: Any = words, batch: Batch = batch, truth: list[Tensor] = truth) -> Tensor:
                self.names_for(scores.shape[1])
                label = labels_of(words, self.keys, scores.shape[1])
                if label is None:
                    raise InputError(
                        "an average is over the cases in which a label is present, and the batches have no label: add "
                        "it (keys= renames), or describe single batches"
                    )
                truth.append(label.to(scores.device))
                return ~truth[0].isnan() & self._columns(scores) & self._counted(batch, scores)[:, None]

            found, parts = self._account(batch, choose)
            if averages is None:
                averages = ClassAverage(found.logits.shape[1], len(self.concepts.parts), found.importance.shape[2])
            averages.add(found, parts, truth[0], self._counted(batch, found.logits))
        if averages is None:
            raise InputError("expected at least one batch to describe, got none")
        names = self.names_for(averages.outputs)
        columns = self._wanted_columns(averages.outputs)
        return [averages.description(c, names[c], self.concepts.parts, self._tops) for c in columns]

    def names_for(self, outputs: int) -> list[str]:
        """Label names: given, the model's, the table's, or numbers."""
        if self.names is not None:
            if len(self.names) != outputs:
                raise InputError(
                    f"names= has {len(self.names)} labels but the network gives {outputs} outputs: "
                    "name them all, in the order of the outputs"
                )
            return list(self.names)
        table = self.concepts.table
        for names in (getattr(self.model, "labels", None), None if table is None else table.labels):
            if isinstance(names, list | tuple) and len(names) == outputs:
                return [str(name) for name in names]
        return [f"label {i}" for i in range(outputs)]

    def _account(self, batch: Batch, choose: Callable[[Tensor], Tensor]) -> tuple[Account, Tensor]:
        """The account, and its cells by part (B, L, P)."""
        image = image_for(self.model, batch)
        if self.concepts.by_organ and batch.organs is None:
            self.concepts.part_shares(image, None, ())  # says what is missing
        found = account(
            self.model, image, self.layer, labels=choose, logits=self.logits, reshape=self.reshape, call=self.call
        )
        if self.layer is None:
            # Found once; a shared activation module counts by its last call.
            self.layer, self.call = found.layer, -1
        if self.channels is not None:
            self.channels.check(found.layer, found.importance.shape[2])
        return found, sums_by(found.cells, self.concepts.part_shares(image, batch.organs, tuple(found.cells.shape[2:])))

    def _wanted_columns(self, outputs: int) -> list[int]:
        if self.labels is None:
            return list(range(outputs))
        return columns_of(self.labels, self.names_for(outputs))

    def _columns(self, scores: Tensor) -> Tensor:
        """(L,) bool: the columns that the user asked for."""
        mask = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        mask[self._wanted_columns(scores.shape[1])] = True
        return mask

    def _wanted_of_each(self, scores: Tensor, label: Tensor | None) -> Tensor:
        """(B, L) bool: what to tell of each case."""
        if self.labels is not None:
            return self._columns(scores).expand(scores.shape)
        wanted = scores >= 0 if label is None else label.to(scores.device) == 1
        likeliest = torch.nn.functional.one_hot(scores.argmax(dim=1), scores.shape[1]).bool()
        return wanted | (likeliest & ~wanted.any(dim=1, keepdim=True))

    def _counted(self, batch: Batch, like: Tensor) -> Tensor:
        """(B,) bool: cases that an average counts."""
        known = batch.has_organs if self.concepts.by_organ else torch.ones_like(batch.has_organs)
        return known.to(like.device)

    def _told(self, found: Account, case: int, label: int) -> dict[str, Any]:
        """The fields of a single case's description that need no organs."""
        exact = bool(found.balanced[case, label])
        structural = tuple(found.obstacles)
        return {
            "logit": float(found.logits[case, label]),
            "probability": float(found.logits[case, label].sigmoid()),
            "bias": float(found.bias[case, label]),
            "residual": float(found.residual[case, label]),
            "layer": found.layer,
            "valid": exact and not structural,
            "why": structural or (() if exact else found.why),
            "importance": found.importance[case, label],
            "channels": self._tops(found.channels[case, label], found.importance[case, label], found.activations[case]),
        }

    def _tops(
        self, contribution: Tensor, importance: Tensor, activations: Tensor | None = None
    ) -> tuple[ChannelPart, ...]:
        """The channels that add most, then those that take most away."""
        if self.channels is None:
            return ()
        values, order = contribution.sort(descending=True)
        ranked = list(zip(order.tolist(), values.tolist(), strict=True))
        chosen = [r for r in ranked[: self.top] if r[1] > 0] + [r for r in ranked[::-1][: self.top] if r[1] < 0]
        return tuple(
            ChannelPart(
                index=index,
                name=self.channels.names[index],
                iou=self.channels.iou(index),
                importance=float(importance[index]),
                contribution=value,
                activation=None if activations is None else activations[index],
            )
            for index, value in chosen
        )


def _ordered(names: Sequence[str], values: Tensor) -> dict[str, float]:
    parts = zip(names, values.tolist(), strict=True)
    return dict(sorted(parts, key=lambda part: -abs(part[1])))
