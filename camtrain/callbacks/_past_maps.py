"""The panel's maps of earlier epochs, coarse: so that a picture shows all epochs on one colour scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from camtrain.callbacks._fine_maps import Floats, coarse
from camtrain.callbacks._panel import PanelEntry
from camtrain.reporting.epoch_strip import COLUMNS

CELLS = 1 << 12  # of a map: 16 along an axis of a cube, drawn some sixty pixels wide

_Key = tuple[str, str, str, str]  # split, case, label, method


class PastMaps:
    """Of each pair and method the map, of at most `CELLS` cells, in up to `COLUMNS` epochs spread over the run.

    Grows to 96 KB for a pair and method, whatever the length of the run.

    Example:
        >>> PastMaps().state()
        {'epochs': {}, 'maps': []}
    """

    def __init__(self) -> None:
        self._epochs: dict[str, list[int]] = {}
        self._maps: dict[_Key, dict[int, Floats]] = {}

    def add(self, split: str, entries: Sequence[PanelEntry], epoch: int) -> list[dict[str, dict[str, Floats]]]:
        """Take the maps of a pass of a fit.

        Epochs that come later are those of a run that this one has left; maps on another grid are of another layer.

        Args:
            split: `val`, `test`, or a split's own name.
            entries: Its pairs.
            epoch: Epoch of the Trainer.

        Returns:
            Of each pair: method -> name of the epoch -> map (*S'), this epoch's as the last. One that was not computed
            is not among them.
        """
        drawn = self._epochs[split] = [e for e in self._epochs.get(split, []) if e < epoch] + [epoch]
        columns, shown = spread(drawn), []
        for entry in entries:
            own = {}
            for key, values in _maps_of(split, entry):
                self._maps[key] = self._before(key, values, columns[:-1]) | {epoch: values}
                own[key[-1]] = _named(self._maps[key])
            shown.append(own)
        return shown

    def beside(self, split: str, entries: Sequence[PanelEntry]) -> list[dict[str, dict[str, Floats]]]:
        """The maps of a pass outside a fit, as `now` beside the epochs of the fit; nothing of them is kept."""
        drawn = self._epochs.get(split, [])
        columns, shown = spread(drawn, COLUMNS - 1) if drawn else [], []
        for entry in entries:
            own = {}
            for key, values in _maps_of(split, entry):
                if before := self._before(key, values, columns):
                    own[key[-1]] = _named(before) | {"now": values}
            shown.append(own)
        return shown

    def _before(self, key: _Key, values: Floats, epochs: Sequence[int]) -> dict[int, Floats]:
        """What is kept of these epochs, on the grid of this map."""
        kept = self._maps.get(key, {})
        return {e: kept[e] for e in epochs if e in kept and kept[e].shape == values.shape}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain lists, words, numbers and tensors."""
        maps = [
            [*key, {e: torch.from_numpy(values.copy()) for e, values in kept.items()}]
            for key, kept in self._maps.items()
        ]
        return {"epochs": {split: list(drawn) for split, drawn in self._epochs.items()}, "maps": maps}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the maps of an earlier run."""
        self._epochs = {split: list(drawn) for split, drawn in state["epochs"].items()}
        self._maps = {
            (split, case, label, method): {int(e): values.numpy().copy() for e, values in kept.items()}
            # Checkpoints of development versions have single planes, under another name: their runs begin anew here.
            for split, case, label, method, kept in state.get("maps", ())
        }


def _maps_of(split: str, entry: PanelEntry) -> Iterator[tuple[_Key, Floats]]:
    for method, values in entry.maps.items():
        if np.isfinite(values).any():
            # Undefined cells are drawn as zero, and must not spread to their neighbours where these are averaged.
            yield (split, entry.case, entry.label, method), coarse(np.nan_to_num(values, nan=0.0), CELLS)


def _named(maps: Mapping[int, Floats]) -> dict[str, Floats]:
    return {f"epoch {epoch}": values for epoch, values in maps.items()}


def spread(drawn: Sequence[int], most: int = COLUMNS) -> list[int]:
    """At most so many of the epochs that were drawn: every one, every second, every fourth ..., and the last.

    Example:
        >>> spread([0, 1, 2, 3], most=4), spread([0, 1, 2, 3, 4], most=4), spread([0, 2, 4, 6, 8, 9], most=4)
        ([0, 1, 2, 3], [0, 2, 4], [0, 4, 8, 9])
    """
    every = 1
    while len(kept := list(dict.fromkeys([*drawn[::every], drawn[-1]]))) > max(2, most):
        every *= 2
    return kept
