"""`localise`: do maps lie on regions that no training loss has seen: lesions, eroded organs, organs voxel by voxel?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.cam.explaining import Size, explain
from camtrain.evaluation._reading import Keys, image_for, labels_of, unlabelled
from camtrain.metrics import energy_inside

Region = str | Callable[[Mapping[str, Any]], Tensor]
"""Key of a batch, or a callable that makes (B, L, *S) bool of a batch."""
_SCORES = ("energy", "hits", "chance")


@dataclass(frozen=True)
class Location:
    """How well the maps of one method lie on one region.

    Attributes:
        method: Name of the method.
        region: Name of the region.
        label: A label's name, `macro` (mean over labels) or `micro` (mean over pairs).
        energy: Mean share of the positive part of the map that lies on the region; NaN where no pair has one.
        hits: Pointing game: share of maps whose highest voxel lies on the region. Of several that tie (a linear
            enlargement is flat beyond the centres of the outermost cells) the share that lies there counts.
        chance: Mean share of the volume that the region takes: what an even or random map would score in both.
        pairs: Counted pairs: label present, region not empty.
        undefined: Share of them whose map has no positive voxel: not in `energy`, a miss in `hits`.
    """

    method: str
    region: str
    label: str
    energy: float
    hits: float
    chance: float
    pairs: int
    undefined: float


def localise(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    regions: Mapping[str, Region],
    methods: Sequence[str] = ("hirescam",),
    layer: Any = None,
    *,
    names: Sequence[str] | None = None,
    size: Size = "image",
    keys: Keys = None,
) -> list[Location]:
    """Score maps of present labels against any regions, beside the level of chance.

    Organs are what a mask loss is trained on and what OrganIoU is read from, at the resolution of a layer; whether the
    maps got better is said by regions that played no part: lesions, organs without their rim, the organ's own voxels.

    Memory is that of (B, L, *S) floats: for large volumes and many labels use batches of one.

    Args:
        model: Any module whose output contains logits (B, L).
        batches: Dict batches with `image`, `label` and whatever the regions are made of.
        regions: Name -> key of the batch, or callable from the batch to (B, L, *S) bool, at the resolution of `size`.
        methods: Names of `ct.methods()`.
        layer: As for `ct.explain`.
        names: Names of the labels; None: the model's `labels`, else their numbers.
        size: Resolution of the maps: `"image"` (enlarged linearly), None = grid of the layer, or spatial sizes.
        keys: Contract word -> key in the batch.

    Returns:
        For every method and region one row per label, then `macro` and `micro`.

    Raises:
        InputError: No batches or labels, a region of another kind or shape, or a number of names that does not fit.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
        >>> batch = {"image": torch.rand(3, 1, 4), "label": torch.ones(3, 1)}
        >>> batch["lesions"] = torch.tensor([[[False, True, False, False]]] * 3)
        >>> rows = localise(model, [batch], {"lesions": "lesions"}, names=["nodule"])
        >>> [(row.label, row.chance, row.pairs) for row in rows]
        [('nodule', 0.25, 3), ('macro', 0.25, 3), ('micro', 0.25, 3)]
    """
    found: dict[tuple[str, str], list[dict[str, Tensor]]] = {(m, r): [] for m in methods for r in regions}
    for words in batches:
        image = image_for(model, unlabelled(words, keys))
        present = _present(model, words, keys, image)
        truths = {name: _region(name, region, words, present) for name, region in regions.items()}
        for method in methods:
            maps = explain(model, image, method, layer, labels=present, size=size)
            for name, truth in truths.items():
                found[method, name].append(_scores(maps, truth.to(maps.device), present))
    if not found or not all(found.values()):
        raise InputError("expected at least one batch, one method and one region, got none: a loader can be read once")
    labels = _names(names, model, next(iter(found.values()))[0]["energy"].shape[1])
    return [row for (method, name), parts in found.items() for row in _rows(method, name, labels, parts)]


def erode(region: Tensor, voxels: int = 1) -> Tensor:
    """Take the rim off a region: what is left has `voxels` more of the region on every side, along every axis.

    Neighbours share a face; the border of the volume takes nothing away.

    Args:
        region: (B, L, *S) bool.
        voxels: How often one layer is taken off.

    Returns:
        (B, L, *S) bool, a subset.

    Raises:
        InputError: Not a bool tensor, or a negative number of voxels.

    Example:
        >>> erode(torch.tensor([[[True, True, False, True, True, True]]])).int().tolist()
        [[[1, 0, 0, 0, 1, 1]]]
    """
    if region.dtype != torch.bool or voxels < 0:
        raise InputError(f"expected a bool region and 0 voxels or more, got {region.dtype} and {voxels}")
    for _ in range(voxels):
        left = region.clone()
        for axis in range(2, region.ndim):
            low, high = region.narrow(axis, 0, region.shape[axis] - 1), region.narrow(axis, 1, region.shape[axis] - 1)
            left.narrow(axis, 1, region.shape[axis] - 1).logical_and_(low)
            left.narrow(axis, 0, region.shape[axis] - 1).logical_and_(high)
        region = left
    return region


def _present(model: nn.Module, words: Mapping[str, Any], keys: Keys, image: Tensor) -> Tensor:
    """(B, L) bool on the model's device."""
    given = words.get((keys or {}).get("label", "label"))
    if not isinstance(given, Tensor) or given.ndim != 2:
        raise InputError("expected batches with label (B, L): the regions of present labels are what maps are read on")
    label = labels_of(words, keys, given.shape[1])
    return (given if label is None else label).eq(1).to(image.device)


def _region(name: str, region: Region, words: Mapping[str, Any], present: Tensor) -> Tensor:
    if isinstance(region, str) and region not in words:
        raise InputError(f"region {name!r}: the batch has no key {region!r}; it has {', '.join(map(str, words))}")
    truth = words[region] if isinstance(region, str) else region(words)
    if not isinstance(truth, Tensor) or truth.dtype != torch.bool or truth.shape[:2] != present.shape:
        what = f"{tuple(truth.shape)} {truth.dtype}" if isinstance(truth, Tensor) else type(truth).__name__
        raise InputError(f"region {name!r} expects (B, L, *S) bool with (B, L) = {tuple(present.shape)}, got {what}")
    return truth


def _scores(maps: Tensor, truth: Tensor, present: Tensor) -> dict[str, Tensor]:
    """`energy`, `hits`, `chance`, each (B, L), NaN where undefined or not counted."""
    there = present & truth.flatten(2).any(dim=2)
    flat, inside = maps.flatten(2), truth.flatten(2)
    if flat.shape != inside.shape:
        raise InputError(f"a region of {tuple(truth.shape)} does not lie on maps of {tuple(maps.shape)}: set size=")
    top = flat.amax(dim=2, keepdim=True)
    tied = (flat == top) & (top > 0)
    hits = (tied & inside).sum(dim=2) / tied.sum(dim=2).clamp(min=1)
    scores = {"hits": hits.double(), "chance": inside.double().mean(dim=2)}
    scores = {key: value.masked_fill(~there, torch.nan).cpu() for key, value in scores.items()}
    return scores | {"energy": energy_inside(maps, truth, present.float()).double().cpu()}


def _rows(method: str, region: str, labels: Sequence[str], parts: list[dict[str, Tensor]]) -> list[Location]:
    scores = {key: torch.cat([part[key] for part in parts]) for key in _SCORES}
    counted = ~scores["chance"].isnan()
    lost = counted & scores["energy"].isnan()

    def row(label: str, means: Mapping[str, Tensor], at: slice) -> Location:
        pairs = int(counted[:, at].sum())
        energy, hits, chance = (float(means[key]) for key in _SCORES)
        undefined = int(lost[:, at].sum()) / pairs if pairs else float("nan")
        return Location(method, region, label, energy, hits, chance, pairs, undefined)

    everywhere = slice(None)
    each = {key: value.nanmean(dim=0) for key, value in scores.items()}
    rows = [row(n, {k: v[i] for k, v in each.items()}, slice(i, i + 1)) for i, n in enumerate(labels)]
    rows.append(row("macro", {key: value.nanmean() for key, value in each.items()}, everywhere))
    return [*rows, row("micro", {key: value.nanmean() for key, value in scores.items()}, everywhere)]


def _names(names: Sequence[str] | None, model: nn.Module, number: int) -> list[str]:
    given = getattr(model, "labels", None) if names is None else names
    labels = [str(i) for i in range(number)] if given is None else [str(name) for name in given]
    if len(labels) != number:
        raise InputError(f"expected {number} names, one per output, got {len(labels)}: {', '.join(labels[:4])}")
    return labels
