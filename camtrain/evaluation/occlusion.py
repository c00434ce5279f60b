"""Occlusion maps: how far a logit falls when a patch of the image is hidden, patch by patch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.anatomy.baselines import Baseline, baseline_of
from camtrain.cam.enlarge import enlarge
from camtrain.cam.explaining import checked_image, checked_model
from camtrain.cam.logits import PickLogits
from camtrain.evaluation.predicting import logits_of

Lengths = int | Sequence[int]
AT_ONCE = 2**28  # bytes of occluded images per forward: at 400^3 one image alone


def occlusion_map(
    model: nn.Module,
    image: Tensor,
    patch: Lengths,
    stride: Lengths | None = None,
    baseline: Baseline = "air",
    *,
    logits: PickLogits | None = None,
    chunk: int = 16,
) -> Tensor:
    """Fall of every logit when one patch of the image is replaced by the baseline (Zeiler & Fergus 2014).

    A slow map that needs no gradient, no layer and no assumption about the network: positive where hiding the patch
    takes evidence for the label away, negative where it takes evidence against it away. It says what the network does
    with an image that has a hole, which is not what it was trained on: hence the baseline is always named. One forward
    per patch serves all labels.

    Args:
        model: Any module whose output contains logits (B, L); it is left as it was.
        image: (B, C, *S).
        patch: Edge of the patch in voxels, one number or one per axis; at most the image.
        stride: Voxels between the starts of neighbouring patches; None: half of the patch. The last patch of an axis
            ends with the image, so that no voxel is left out and the last step may be shorter.
        baseline: `"air"`, `"mean"`, `"blur"` or an intensity (`make_baseline`), or an image (B, C, *S).
        logits: Callable that picks the logits from the model's output.
        chunk: Most images in one forward; fewer where that many would take more than 256 MiB.

    Returns:
        (B, L, *P) logit of the image less logit of the occluded image, P patches along each axis
        (`patch_starts`); float32 (float64 for float64 models).

    Raises:
        InputError: A patch larger than the image, a stride that leaves gaps, no logits, or a baseline that is none.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
        >>> _ = model[1].weight.data.copy_(torch.tensor([[0.0, 3.0, -1.0, 0.0]]))
        >>> occlusion_map(model, torch.ones(1, 1, 4), patch=2, stride=1, baseline="air")
        tensor([[[ 3.,  2., -1.]]])
    """
    image = checked_image(image, checked_model(model))
    starts = patch_starts(image.shape[2:], patch, stride)
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise InputError(f"chunk= expects how many images fit into one forward, 1 or more, got {chunk!r}")
    most = min(chunk, max(1, AT_ONCE // image[0].nbytes))
    edges = _lengths(patch, len(starts), "patch")
    nothing = baseline_of(image, baseline)
    whole = torch.cat([logits_of(model, part, logits) for part in torch.split(image, most)])
    grid = tuple(len(axis) for axis in starts)
    result = whole.new_empty(math.prod((len(image), *grid)), whole.shape[1])
    done = 0
    for batch in _occluded(image, nothing, starts, edges, most):
        result[done : done + len(batch)] = logits_of(model, batch, logits)
        done += len(batch)
    fallen = whole[:, None] - result.reshape(len(image), -1, whole.shape[1])
    return fallen.movedim(1, 2).reshape(len(image), whole.shape[1], *grid)


def pool_to_patches(maps: Tensor, size: Sequence[int], patch: Lengths, stride: Lengths | None = None) -> Tensor:
    """Mean of a map over each patch of an occlusion map, so that the two can be compared cell by cell.

    Args:
        maps: (B, L, *S') signed; enlarged linearly to the image where it is coarser.
        size: S of the image.
        patch: As for `occlusion_map`.
        stride: As for `occlusion_map`.

    Returns:
        (B, L, *P) float64 (float32 on Apple GPUs).

    Raises:
        InputError: Maps, size, patch and stride do not fit each other.

    Example:
        >>> pool_to_patches(torch.tensor([[[0.0, 2.0, 4.0, 6.0]]]), (4,), patch=2)
        tensor([[[1., 3., 5.]]], dtype=torch.float64)
    """
    starts = patch_starts(size, patch, stride)
    edges = _lengths(patch, len(starts), "patch")
    wide = torch.float32 if maps.device.type == "mps" else torch.float64
    pooled = enlarge(maps.detach().to(wide), tuple(size))
    for axis, (first, edge) in enumerate(zip(starts, edges, strict=True), start=2):
        # Sum of a window = difference of two running sums; windows overlap, so this beats taking each apart.
        running = torch.cat([torch.zeros_like(pooled.narrow(axis, 0, 1)), pooled.cumsum(dim=axis)], dim=axis)
        index = torch.tensor(first, device=maps.device)
        pooled = (running.index_select(axis, index + edge) - running.index_select(axis, index)) / edge
    return pooled


def patch_starts(size: Sequence[int], patch: Lengths, stride: Lengths | None = None) -> list[list[int]]:
    """First voxel of each patch along each axis.

    Args:
        size: S of the image.
        patch: Edge in voxels, one number or one per axis.
        stride: One number or one per axis; None: half of the patch.

    Returns:
        One list per axis.

    Raises:
        InputError: A patch larger than the image, or a stride that leaves gaps.

    Example:
        >>> patch_starts((10, 8), patch=4, stride=3)
        [[0, 3, 6], [0, 3, 4]]
    """
    edges = _lengths(patch, len(size), "patch")
    steps = [max(1, e // 2) for e in edges] if stride is None else _lengths(stride, len(size), "stride")
    if any(e > n for e, n in zip(edges, size, strict=True)):
        raise InputError(f"patch= must fit into the image {tuple(size)}, got {patch}: take a smaller one")
    if any(s > e for s, e in zip(steps, edges, strict=True)):
        raise InputError(f"stride= larger than the patch leaves voxels out: expected at most {edges}, got {stride}")
    return [
        [*range(0, n - edge, step), n - edge] for n, edge, step in zip(size, edges, steps, strict=True)
    ]  # a range never holds the last patch, which ends with the image


def _lengths(given: Lengths, axes: int, word: str) -> list[int]:
    values = list(given) if isinstance(given, Sequence) else [given] * axes
    if len(values) != axes or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise InputError(f"{word}= expects voxels, one whole number or one for each of {axes} axes, got {given!r}")
    return values


def _occluded(image: Tensor, nothing: Tensor, starts: list[list[int]], edges: list[int], most: int) -> Iterator[Tensor]:
    """Images with one patch hidden, case after case, patches in row-major order; one buffer for all batches."""
    jobs = itertools.product(range(len(image)), *starts)
    buffer = image.new_empty(most, *image.shape[1:])
    while part := list(itertools.islice(jobs, most)):
        for target, (case, *corner) in zip(buffer, part, strict=False):
            target.copy_(image[case])
            hole = (slice(None), *(slice(at, at + edge) for at, edge in zip(corner, edges, strict=True)))
            target[hole] = nothing[case][hole]
        yield buffer[: len(part)]
