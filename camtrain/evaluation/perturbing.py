"""Forwards of changed images: what the network says when it sees only what a map shows, or more and more of it.

All of it is asked for single (case, label) pairs, and only `chunk` changed images are made at a time, so that 80 labels
of a 400^3 volume need no more memory than one. The model is left as it was. Nothing here tells whether a fall of the
probability comes from the evidence that went or from an image unlike any that the network was trained on: hence the
baseline is always named, and numbers are comparable for one baseline only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.anatomy.baselines import Baseline, baseline_of
from camtrain.cam.enlarge import enlarge
from camtrain.cam.explaining import checked_image, checked_model
from camtrain.cam.logits import PickLogits
from camtrain.cam.score_cam import unit_masks
from camtrain.evaluation.predicting import probabilities_of

# A map whose values differ by no more than this many rounding steps is constant, as for the channels of Score-CAM.
_ROUNDING_STEPS = 2


@dataclass(frozen=True, eq=False)
class Curves:
    """Probabilities while voxels are revealed or replaced, the highest of the map first.

    Attributes:
        insertion: (B, L, T), from the baseline to the image.
        deletion: (B, L, T), from the image to the baseline.
        share: (B, L, T), of the voxels that are revealed or replaced, from 0 to 1.
    """

    insertion: Tensor
    deletion: Tensor
    share: Tensor


def masked_probabilities(
    model: nn.Module,
    image: Tensor,
    maps: Tensor,
    pairs: Tensor,
    baseline: Baseline,
    logits: PickLogits | None = None,
    chunk: int = 4,
    *,
    positive: bool = True,
    columns: Sequence[int] | None = None,
) -> Tensor:
    """Probability of each label when the image shows only what the label's map shows: o of average drop and increase.

    The image becomes b + m (x - b): m is the map, enlarged to the image linearly and then stretched to 0..1 by its own
    minimum and maximum (Grad-CAM++, Score-CAM), b the baseline. One forward per pair.

    Args:
        model: Any module whose output contains logits (B, outputs).
        image: (B, C, *S).
        maps: (B, L, *S') signed.
        pairs: (B, L) bool: which to ask for.
        baseline: `"air"`, `"mean"`, `"blur"` or an intensity (`make_baseline`), or an image (B, C, *S).
        logits: Callable that picks the logits from the model's output.
        chunk: Images in one forward.
        positive: Clip the map at 0 first, as Grad-CAM's last ReLU does, so that a cell without evidence shows nothing.
            False stretches the signed map, as Relevance-CAM does: its lowest cell shows nothing, and cells without
            evidence show as much as the strength of the evidence *against* decides, one strong negative cell being
            enough to light up the rest of the image.
        columns: Output that belongs to each of the L maps; None: the first map to the first output, and so on.

    Returns:
        (B, L) in the dtype of the maps (float32 at least). NaN where not asked, and where the map is constant (when
        positive, also where it has no positive cell) or not finite and so makes no mask: pass `pairs` as `asked=` to
        `AverageDrop`, which then counts these as undefined.

    Raises:
        InputError: Shapes do not fit, no logits, or a baseline that is none.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = nn.init.ones_(model[1].weight)
        >>> maps = torch.tensor([[[0.0, 1.0, 2.0, 0.0], [-1.0, -1.0, -1.0, -1.0]]])
        >>> after = masked_probabilities(model, torch.ones(1, 1, 4), maps, torch.ones(1, 2, dtype=torch.bool), "air")
        >>> after, torch.sigmoid(torch.tensor(0.5 + 1.0))
        (tensor([[0.8176,    nan]]), tensor(0.8176))
    """
    ask = _Asked.of(model, image, maps, pairs, baseline, columns, logits, chunk)
    usable = [pair for pair in ask.pairs if _ranks(_shown(ask.maps[pair], positive))]
    result = ask.blank()
    if usable:
        rows = ask.predict(_masked(ask, part, positive) for part in _split(usable, ask.chunk))
        for row, (sample, label) in zip(rows, usable, strict=True):
            result[sample, label] = row[ask.column(label)]
    return result


def perturbation_curves(
    model: nn.Module,
    image: Tensor,
    maps: Tensor,
    pairs: Tensor,
    baseline: Baseline,
    steps: int = 20,
    logits: PickLogits | None = None,
    chunk: int = 4,
    *,
    columns: Sequence[int] | None = None,
) -> Curves:
    """Insertion and deletion curves (Petsiuk et al., RISE, 2018) of single pairs.

    Voxels are ranked by the signed map, enlarged to the image linearly: evidence against a label comes last. At step t
    of T - 1 the highest t / (T - 1) of all voxels are replaced by the baseline (deletion) or are all that is shown on
    the baseline (insertion). Voxels of equal rank go together, so that nothing depends on their order: `share` is what
    was really replaced, and steps that ties make equal cost no forward. At most 2 (T - 2) forwards a pair, and two a
    case.

    Args:
        model: Any module whose output contains logits (B, outputs).
        image: (B, C, *S).
        maps: (B, L, *S') signed.
        pairs: (B, L) bool: which to ask for.
        baseline: `"air"`, `"mean"`, `"blur"` or an intensity (`make_baseline`), or an image (B, C, *S).
        steps: T - 1, at least 2.
        logits: Callable that picks the logits from the model's output.
        chunk: Images in one forward.
        columns: Output that belongs to each of the L maps; None: the first map to the first output, and so on.

    Returns:
        Curves in the dtype of the maps (float32 at least), NaN where not asked. A map that is constant or not finite
        ranks nothing: both ends of its curves are there, NaN lies in between, and `InsertionAUC` and `DeletionAUC`
        count the pair as undefined.

    Raises:
        InputError: Shapes do not fit, no logits, or a baseline that is none.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
        >>> _ = nn.init.ones_(model[1].weight)
        >>> maps = torch.tensor([[[4.0, 1.0, 1.0, 0.0]]])
        >>> curves = perturbation_curves(model, torch.ones(1, 1, 4), maps, maps[..., 0] > 0, "air", steps=4)
        >>> curves.share, curves.insertion.logit().round(decimals=3)
        (tensor([[[0.0000, 0.2500, 0.7500, 0.7500, 1.0000]]]), tensor([[[0., 1., 3., 3., 4.]]]))
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise InputError(f"steps= expects an integer of at least 2, got {steps!r}")
    ask = _Asked.of(model, image, maps, pairs, baseline, columns, logits, chunk)
    curves = Curves(*(ask.blank(steps + 1) for _ in range(3)))
    ends = _ends(ask)
    even = torch.linspace(0, 1, steps + 1, dtype=ask.maps.dtype, device=ask.maps.device)
    for pair in ask.pairs:
        whole, nothing = ends[pair[0]][:, ask.column(pair[1])]
        # Between the ends there is NaN until the model has been asked.
        curves.insertion[pair][0] = curves.deletion[pair][-1] = nothing
        curves.insertion[pair][-1] = curves.deletion[pair][0] = whole
        curves.share[pair] = even
        if _ranks(ask.maps[pair]):
            inner = _between(ask, pair, steps, whole, nothing)
            for curve, points in zip((curves.insertion, curves.deletion, curves.share), inner, strict=True):
                curve[pair][1:-1] = points.to(curve)
    return curves


@dataclass(frozen=True, eq=False)
class _Asked:
    """What is asked, checked.

    Attributes:
        maps: (B, L, *S') float32 or float64, on the image's device.
        pairs: The wanted (case, label) pairs, cases in order.
        size: S.
    """

    model: nn.Module
    image: Tensor
    baseline: Tensor
    maps: Tensor
    pairs: list[tuple[int, int]]
    columns: list[int] | None
    logits: PickLogits | None
    chunk: int

    @staticmethod
    def of(
        model: nn.Module,
        image: Tensor,
        maps: Tensor,
        pairs: Tensor,
        baseline: Baseline,
        columns: Sequence[int] | None,
        logits: PickLogits | None,
        chunk: int,
    ) -> _Asked:
        """Raises InputError where something does not fit."""
        image = checked_image(image, checked_model(model))
        _check(image, maps, pairs, columns, chunk)
        plain = maps.detach().as_subclass(Tensor).to(image.device)
        plain = plain if plain.dtype == torch.float64 else plain.float()
        wanted = [(int(b), int(k)) for b, k in pairs.nonzero().tolist()]
        named = None if columns is None else [int(c) for c in columns]
        return _Asked(model, image, baseline_of(image, baseline), plain, wanted, named, logits, chunk)

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.image.shape[2:])

    def column(self, label: int) -> int:
        """The model's output for one of the maps."""
        return label if self.columns is None else self.columns[label]

    def blank(self, *more: int) -> Tensor:
        """(B, L, *more) of NaN."""
        return self.maps.new_full((*self.maps.shape[:2], *more), torch.nan)

    def predict(self, batches: Iterator[Tensor]) -> Tensor:
        """(N, outputs) probabilities.

        Raises:
            InputError: The maps do not belong to these outputs.
        """
        rows = probabilities_of(self.model, batches, self.logits)
        outputs, labels = rows.shape[1], self.maps.shape[1]
        if self.columns is None and outputs != labels:
            raise InputError(
                f"expected maps of all {outputs} outputs of the model, got {labels}: pass columns=, the output of each"
            )
        if self.columns is not None and not all(0 <= c < outputs for c in self.columns):
            raise InputError(f"columns= expects outputs in 0..{outputs - 1}, got {self.columns}")
        return rows


def _check(image: Tensor, maps: Tensor, pairs: Tensor, columns: Sequence[int] | None, chunk: Any) -> None:
    if maps.ndim != image.ndim or len(maps) != len(image) or not maps.is_floating_point() or 0 in maps.shape[2:]:
        raise InputError(
            f"expected maps (B, L, *S') in floating point for the image {tuple(image.shape)}, got {tuple(maps.shape)} "
            f"in {maps.dtype}: pass what explain() returned for it"
        )
    if pairs.dtype != torch.bool or pairs.shape != maps.shape[:2]:
        raise InputError(
            f"expected pairs as bool (B, L) = {tuple(maps.shape[:2])}, got {tuple(pairs.shape)} in {pairs.dtype}: "
            "which labels of which cases to ask for, label == 1 for instance"
        )
    if columns is not None and len(columns) != maps.shape[1]:
        raise InputError(f"columns= expects the output of each of the {maps.shape[1]} maps, got {len(columns)} of them")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise InputError(f"chunk= expects how many images fit into one forward, 1 or more, got {chunk!r}")


def _split(pairs: list[tuple[int, int]], chunk: int) -> Iterator[list[tuple[int, int]]]:
    for start in range(0, len(pairs), chunk):
        yield pairs[start : start + chunk]


def _ranks(cells: Tensor) -> bool:
    """Does a map (*S') tell its cells apart?"""
    low, high = cells.min(), cells.max()
    # NaN and Inf fail the comparison or the test of finiteness.
    step = torch.finfo(cells.dtype).eps * torch.maximum(low.abs(), high.abs())
    return bool(torch.isfinite(high - low) & (high - low > _ROUNDING_STEPS * step))


def _shown(cells: Tensor, positive: bool) -> Tensor:
    return cells.relu() if positive else cells


def _masked(ask: _Asked, pairs: list[tuple[int, int]], positive: bool) -> Tensor:
    """(n, C, *S): each image under the map of its pair."""
    cases, labels = zip(*pairs, strict=True)
    wide = torch.promote_types(ask.image.dtype, torch.float32)
    masks = unit_masks(_shown(ask.maps[cases, labels], positive)[:, None], ask.size).to(wide)
    # lerp is exact at both ends, which b + m (x - b) is not.
    mixed = torch.lerp(ask.baseline[list(cases)].to(wide), ask.image[list(cases)].to(wide), masks)
    return mixed.to(ask.image.dtype)


def _ends(ask: _Asked) -> dict[int, Tensor]:
    """Case -> (2, outputs): probabilities of the image and of its baseline."""
    cases = sorted({sample for sample, _ in ask.pairs})
    if not cases:
        return {}
    both = [(source, case) for case in cases for source in (ask.image, ask.baseline)]
    return dict(zip(cases, ask.predict(_copied(ask, both)).reshape(len(cases), 2, -1), strict=True))


def _copied(ask: _Asked, images: list[tuple[Tensor, int]]) -> Iterator[Tensor]:
    for start in range(0, len(images), ask.chunk):
        part = images[start : start + ask.chunk]
        batch = ask.image.new_empty(len(part), *ask.image.shape[1:])
        for target, (source, case) in zip(batch, part, strict=True):
            target.copy_(source[case])
        yield batch


def _between(
    ask: _Asked, pair: tuple[int, int], steps: int, whole: Tensor, nothing: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Insertion, deletion and share (steps - 1,) each, between the ends of the curves of one pair."""
    rank, cuts, counts = _cuts(ask.maps[pair], ask.size, steps)
    # Equal cuts are asked once, and one that takes every voxel is the end of the curve.
    asked = {cut: n for cut, n in zip(cuts, counts, strict=True) if n < rank.numel()}
    shown, gone = dict.fromkeys(cuts, whole), dict.fromkeys(cuts, nothing)
    if asked:
        points = ask.predict(_perturbed(ask, pair[0], rank, list(asked)))[:, ask.column(pair[1])]
        gone |= zip(asked, points[0::2], strict=True)
        shown |= zip(asked, points[1::2], strict=True)
    share = torch.tensor([n / rank.numel() for n in counts], dtype=ask.maps.dtype)
    return torch.stack([shown[cut] for cut in cuts]), torch.stack([gone[cut] for cut in cuts]), share


def _cuts(cells: Tensor, size: tuple[int, ...], steps: int) -> tuple[Tensor, list[float], list[int]]:
    """Rank of every voxel, and where to cut.

    Returns:
        (*S) the enlarged map; for every step between the ends the value to cut at, and how many voxels are at or above.
    """
    rank = cells.cpu()
    if tuple(rank.shape) != size:
        # In float64 the two weights of an interpolation add up to 1 so well that equal cells give equal voxels once
        # rounded to float32, and not a ranking of rounding noise.
        rank = enlarge(rank.double()[None, None], size)[0, 0].to(cells.dtype)
    flat = rank.flatten().numpy()
    places = [flat.size - min(max(round(flat.size * t / steps), 1), flat.size) for t in range(1, steps)]
    # Order statistics without sorting.
    cuts = np.partition(flat, sorted(set(places)))[places].tolist()
    above = {cut: int(np.count_nonzero(flat >= cut)) for cut in set(cuts)}
    return rank.to(cells.device), cuts, [above[cut] for cut in cuts]


def _perturbed(ask: _Asked, sample: int, rank: Tensor, cuts: list[float]) -> Iterator[Tensor]:
    """For every cut the image with the voxels above it replaced, then the baseline with them revealed."""
    image, nothing = ask.image[sample], ask.baseline[sample]
    jobs = [(cut, *pair) for cut in cuts for pair in ((nothing, image), (image, nothing))]
    # One buffer for all batches: `logits_of` hands a copy of each to the model.
    batch = image.new_empty(min(len(jobs), ask.chunk), *image.shape)
    for start in range(0, len(jobs), ask.chunk):
        part = jobs[start : start + ask.chunk]
        for target, (cut, above, below) in zip(batch[: len(part)], part, strict=True):
            torch.where(rank >= cut, above, below, out=target)
        yield batch[: len(part)]
