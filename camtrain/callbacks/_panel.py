"""The fixed panel: a few cases of each split that are drawn the same way every time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from camtrain._batch import Batch
from camtrain.callbacks._choice import Choice
from camtrain.callbacks._fine_maps import Floats, Measured, coarse, is_fine, on_host
from camtrain.reporting import CasePicture, geometry, window_of
from camtrain.reporting.case_picture import SEPARATOR, case_scenes, draw_case
from camtrain.reporting.epoch_strip import Past
from camtrain.reporting.scene import Scene


@dataclass(frozen=True)
class PanelEntry:
    """One case and one label of the panel, copied off the device.

    Attributes:
        case: Name of the case.
        label: Name of the label.
        present: The truth.
        probability: What the network says.
        shape: (*S) of the image.
        scenes: The planes that are drawn, of image and allowed region; the volumes themselves are not kept.
        maps: Method -> (*S').
        affine: (4, 4) voxel to world in mm, or None.
        kind: Why it was chosen: `positive`, `hard` or `negative`.
        cells: Method -> (*S') allowed cells, as the scores see them; not of maps that are `measured` already.
        measured: Method -> scores of a map that is too fine to be kept.
        scan: Shape and affine of the scan before the transforms, where the batch tells them.
        organ_iou: Method -> score of this very map at `threshold`, undefined ones left out.
        energy_inside: Method -> score of this very map, undefined ones left out.
        threshold: Method -> the label's threshold of OrganIoU.
    """

    case: str
    label: str
    present: bool
    probability: float
    shape: tuple[int, ...]
    scenes: dict[str, Scene]
    maps: dict[str, npt.NDArray[np.float32]]
    affine: npt.NDArray[np.float64] | None
    kind: str = "positive"
    cells: dict[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    measured: dict[str, Measured] = field(default_factory=dict)
    scan: tuple[tuple[int, ...], npt.NDArray[np.float64]] | None = None
    organ_iou: dict[str, float] = field(default_factory=dict)
    energy_inside: dict[str, float] = field(default_factory=dict)
    threshold: dict[str, float] = field(default_factory=dict)

    @property
    def caption(self) -> str:
        """Case, label, truth, what the network says, and the scores of these very maps."""
        truth = "present" if self.present else "absent"
        scores = []
        for method in self.maps:
            found = []
            if method in self.organ_iou:
                found.append(f"OrganIoU {self.organ_iou[method]:.2f} (above {self.threshold[method]:.2g})")
            if method in self.energy_inside:
                found.append(f"energy inside {self.energy_inside[method]:.2f}")
            if found:
                scores.append(", ".join(found) + (f" ({method})" if len(self.maps) > 1 else ""))
        return SEPARATOR.join([f"{self.case}", f"{self.label}: {truth}, p = {self.probability:.2f}", *scores])

    @property
    def brief(self) -> str:
        """Short lines for the overview, which shows the map of the first method."""
        share = self.energy_inside.get(next(iter(self.maps), ""))
        inside = "" if share is None else f", inside {share:.2f}"
        truth = "present" if self.present else "absent"
        return f"{self.label}\n{truth}, p {self.probability:.2f}{inside}\n{self.case}"

    def draw(self, scale: Mapping[str, float], masked: bool = True, past: Past | None = None) -> CasePicture:
        """The picture, with one colour scale per method, and with masks where somebody takes them.

        Args:
            scale: Method -> end of the colours.
            masked: Does somebody take masks?
            past: Method -> name of the epoch -> map, for the strip over the epochs.
        """
        return draw_case(self.scenes, self.maps, caption=self.caption, scale=scale, masked=masked, past=past)


class Panel:
    """Lets the first pass over a split choose (see `Choice`), then collects the same pairs every time.

    Cases are known by their `id`, or by their place where the batch has no ids.

    Args:
        cases: Cases at most.
        labels_per_case: Labels drawn of each case at most.
        always: Cases that are shown besides.
        whole: So many of the first cases, and those of `always`, keep maps of any size as they are: for NIfTI.
    """

    def __init__(self, cases: int, labels_per_case: int, always: Collection[str] = (), whole: int = 0) -> None:
        self.choice = Choice(cases, labels_per_case, always)
        self._always, self._whole = frozenset(always), whole
        self._kept: dict[tuple[str, int], PanelEntry] = {}
        self._drawn: set[str] = set()

    @property
    def complete(self) -> bool:
        """Is the choice made?"""
        return self.choice.fixed

    @property
    def entries(self) -> list[PanelEntry]:
        """What this pass has collected, in the order of the choice, whatever the order of the split."""
        pairs = [(case, index, kind) for case, kinds in self.choice.pairs.items() for index, kind in kinds.items()]
        return [replace(self._kept[case, i], kind=kind) for case, i, kind in pairs if (case, i) in self._kept]

    def begin(self) -> None:
        """A new pass over the split."""
        self._kept.clear()
        self._drawn.clear()

    def end(self) -> None:
        """The pass is over; what it chose stays."""
        self.choice.fix()
        self.begin()

    def wanted(
        self, cases: Sequence[str], label: Tensor, segmented: Tensor, probability: Tensor
    ) -> dict[int, list[int]]:
        """Rows of this batch to draw, with their labels; the first pass chooses them.

        Args:
            cases: B names.
            label: (B, L), NaN = unknown.
            segmented: (B,) bool.
            probability: (B, L).
        """
        if not self.complete:
            shown = zip(cases, label.tolist(), probability.tolist(), segmented.tolist(), strict=True)
            for case, truth, found, known in shown:
                self.choice.see(case, truth, found, known)
        pairs, rows = self.choice.candidates, {}
        for row, case in enumerate(cases):
            # Patches of one scan share its id: the first one stands for it.
            if case in pairs and case not in self._drawn:
                self._drawn.add(case)
                rows[row] = [index for index in pairs[case] if index < label.shape[1]]
        return rows

    def may_draw(self, cases: Sequence[str]) -> bool:
        """May one of these cases be drawn? Before the first pass is over, any may."""
        if not self.complete:
            return bool(self.choice.cases or self._always)
        return any(case in self.choice.pairs and case not in self._drawn for case in cases)

    def collect(
        self,
        rows: Mapping[int, Sequence[int]],
        cases: Sequence[str],
        batch: Batch,
        maps: Mapping[str, Tensor],
        logits: Tensor,
        names: Sequence[str],
        region: Callable[[int, Sequence[int]], Tensor | None],
        cells: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Copy the wanted rows to the host.

        Args:
            rows: Row -> labels, from `wanted`.
            cases: B names.
            batch: The batch.
            maps: Method -> (B, L, *S').
            logits: (B, L).
            names: L names.
            region: `region(row, labels)` gives (labels, *S) bool at the image's resolution, or None.
            cells: Method -> (B, L, *S') bool.
        """
        whole = self._always | set(list(self.choice.candidates)[: self._whole])
        for row, labels in rows.items():
            if batch.image is None:
                return
            if not labels:
                continue
            image = batch.image[row].float().cpu().numpy()  # one copy for all labels of the case
            colours = image.ndim == 3 and len(image) == 3
            window, allowed = window_of(image if colours else image[0]), region(row, labels)
            affine = None if batch.affine is None else np.array(batch.affine[row].double().cpu())
            for place, index in enumerate(labels):
                shown = {m: each[row, index] for m, each in maps.items()}
                # Methods that cost forwards are not asked about absent labels.
                shown = {m: one for m, one in shown.items() if not bool(one.isnan().all())} or shown
                own = {} if cells is None else {m: each[row, index] for m, each in cells.items()}
                made = {m: on_host(one) for m, one in shown.items()}
                here = None if allowed is None else np.array(allowed[place].cpu())
                self._kept[cases[row], index] = PanelEntry(
                    case=cases[row],
                    label=names[index],
                    present=batch.label is not None and bool(batch.label[row, index] == 1),
                    probability=float(torch.sigmoid(logits[row, index].float())),
                    shape=image.shape[1:],
                    scenes=_scenes(image, made, here, affine, window),
                    affine=affine,
                    scan=_scan(batch, row),
                    **_kept(made, shown, own, cases[row] in whole),
                )
        # What was among the hardest for a while and is no more, and what is not needed any more to fill up.
        pairs = self.choice.candidates
        for case, index in [key for key in self._kept if key[1] not in pairs.get(key[0], {})]:
            del self._kept[case, index]

    def state(self) -> list[Any]:
        """What a checkpoint keeps: plain lists, numbers and words."""
        return self.choice.state()

    def load(self, state: Sequence[Any]) -> None:
        """Take the choice of an earlier run."""
        self.choice.load(state)


def asked_too(rows: Mapping[int, Sequence[int]], present: Tensor) -> Tensor:
    """(B, L) bool: the present labels, and the labels of the panel that are absent.

    Example:
        >>> asked_too({0: [1]}, torch.tensor([[True, False], [False, False]]))
        tensor([[ True,  True],
                [False, False]])
    """
    asked = present.clone()
    for row, labels in rows.items():
        asked[row, list(labels)] = True
    return asked


def _kept(
    made: Mapping[str, Floats], shown: Mapping[str, Tensor], cells: Mapping[str, Tensor], whole: bool
) -> dict[str, Any]:
    """Maps, and what their scores need: the allowed cells, or of too fine maps the scores themselves."""
    fine = [m for m, one in shown.items() if is_fine(one) and not whole]
    return {
        "maps": {m: coarse(one) if m in fine else one for m, one in made.items()},
        "cells": {m: np.array(each.cpu()) for m, each in cells.items() if m not in fine},
        "measured": {m: Measured.of(shown[m].float(), cells[m]) for m in fine if m in cells},
    }


def _scenes(
    image: Floats,
    maps: Mapping[str, Floats],
    allowed: npt.NDArray[np.bool_] | None,
    affine: npt.NDArray[np.float64] | None,
    window: tuple[float, float],
) -> dict[str, Scene]:
    """Planes through organ and peak; at 400^3 a volume is 256 MB, and a panel has a dozen pairs."""
    axes, spacing = (None, None) if affine is None else geometry(affine)
    made = case_scenes(image, maps, allowed, spacing=spacing, axes=axes, window=window)
    thin = {id(scene): scene.thin() for scene in made.values()}  # the organ's may stand twice
    return {title: thin[id(scene)] for title, scene in made.items()}


def _scan(batch: Batch, row: int) -> tuple[tuple[int, ...], npt.NDArray[np.float64]] | None:
    if batch.original_shape is None or batch.original_affine is None:
        return None
    shape = tuple(int(n) for n in batch.original_shape[row])
    return shape, np.array(batch.original_affine[row].double().cpu())
