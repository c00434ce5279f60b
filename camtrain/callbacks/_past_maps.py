"""The panel's maps of earlier epochs, one plane of each: so that a picture shows all epochs on one colour scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from camtrain.callbacks._fine_maps import Floats, coarse
from camtrain.callbacks._panel import PanelEntry
from camtrain.reporting.case_picture import COLUMNS

CELLS = 1 << 10  # of a plane: it is drawn about a hundred pixels wide


_Key = tuple[str, str, str, str]  # split, case, label, method


class PastMaps:
    """Of each pair and method the plane that rests, in up to `COLUMNS` epochs spread over the run.

    Grows to 32 KB for a pair and method, whatever the length of the run.

    Example:
        >>> PastMaps().state()
        {'epochs': {}, 'planes': []}
    """

    def __init__(self) -> None:
        self._epochs: dict[str, list[int]] = {}
        self._planes: dict[_Key, dict[int, Floats]] = {}

    def add(self, split: str, entries: Sequence[PanelEntry], epoch: int) -> list[dict[str, dict[str, Floats]]]:
        """Take the maps of a pass of a fit.

        Epochs that come later are those of a run that this one has left; planes on another grid are of another layer.

        Args:
            split: `val`, `test`, or a split's own name.
            entries: Its pairs.
            epoch: Epoch of the Trainer.

        Returns:
            Of each pair: method -> name of the epoch -> plane, this epoch's as the last. A map that was not computed
            has no plane.
        """
        drawn = self._epochs[split] = [e for e in self._epochs.get(split, []) if e < epoch] + [epoch]
        columns, shown = spread(drawn), []
        for entry in entries:
            own = {}
            for key, plane in _planes(split, entry):
                self._planes[key] = self._before(key, plane, columns[:-1]) | {epoch: plane}
                own[key[-1]] = _named(self._planes[key])
            shown.append(own)
        return shown

    def beside(self, split: str, entries: Sequence[PanelEntry]) -> list[dict[str, dict[str, Floats]]]:
        """The maps of a pass outside a fit, as `now` beside the epochs of the fit; nothing of them is kept."""
        drawn = self._epochs.get(split, [])
        columns, shown = spread(drawn, COLUMNS - 1) if drawn else [], []
        for entry in entries:
            own = {}
            for key, plane in _planes(split, entry):
                if before := self._before(key, plane, columns):
                    own[key[-1]] = _named(before) | {"now": plane}
            shown.append(own)
        return shown

    def _before(self, key: _Key, plane: Floats, epochs: Sequence[int]) -> dict[int, Floats]:
        """What is kept of these epochs, on the grid of this plane."""
        kept = self._planes.get(key, {})
        return {e: kept[e] for e in epochs if e in kept and kept[e].shape == plane.shape}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain lists, words, numbers and tensors."""
        planes = [
            [*key, {e: torch.from_numpy(plane.copy()) for e, plane in planes.items()}]
            for key, planes in self._planes.items()
        ]
        return {"epochs": {split: list(drawn) for split, drawn in self._epochs.items()}, "planes": planes}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the planes of an earlier run."""
        self._epochs = {split: list(drawn) for split, drawn in state["epochs"].items()}
        self._planes = {
            (split, case, label, method): {int(e): plane.numpy().copy() for e, plane in planes.items()}
            for split, case, label, method, planes in state["planes"]
        }


def _planes(split: str, entry: PanelEntry) -> Iterator[tuple[_Key, Floats]]:
    for method, plane in entry.resting_planes().items():
        yield (split, entry.case, entry.label, method), coarse(plane, CELLS)


def _named(planes: Mapping[int, Floats]) -> dict[str, Floats]:
    return {f"epoch {epoch}": plane for epoch, plane in planes.items()}


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
