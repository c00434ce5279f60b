"""ChannelConcepts: which concept, an organ or a band of HU, each channel's strongest responses fall on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from camtrain._errors import InputError
from camtrain.metrics._pair_metric import sum_dtype, synced

# Network Dissection's choices: a unit's strongest 0.5 % of positions, and the overlap from which on it gets a name.
TOP, LEAST_IOU = 0.005, 0.04
# What float16 can hold; responses beyond fall into the outermost bins.
OCTAVES = (-24, 16)
PER_OCTAVE = 8
AT_ONCE = 2**22  # responses x concepts spread in one go: bounds the memory of fine grids and wide layers


class ConceptTable(NamedTuple):
    """What `ChannelConcepts` finds.

    Attributes:
        iou: (K, O) overlap of each channel's strongest responses with each concept; 0 for channels that never respond.
        threshold: (K,) from which response on a channel counts as lit; NaN for channels that never respond.
        coverage: (K,) share of all cells that are lit.
    """

    iou: Tensor
    threshold: Tensor
    coverage: Tensor

    def names(self, concepts: Sequence[str], least: float = LEAST_IOU) -> list[str | None]:
        """The concept of each channel, None where no overlap exceeds `least`.

        Args:
            concepts: O names, in the order of the metric.
            least: Overlap from which on a channel gets a name.

        Raises:
            InputError: Another number of names than concepts.

        Example:
            >>> table = ConceptTable(torch.tensor([[0.3, 0.1], [0.0, 0.02]]), torch.ones(2), torch.ones(2))
            >>> table.names(["heart", "lung"])
            ['heart', None]
        """
        iou = self.iou.reshape(self.threshold.numel(), -1)
        if len(concepts) != iou.shape[1]:
            raise InputError(f"expected {iou.shape[1]} concept names, got {len(concepts)}: name them as in update()")
        best, index = iou.max(dim=1)
        return [concepts[i] if value > least else None for value, i in zip(best.tolist(), index.tolist(), strict=True)]


class ChannelConcepts(Metric):
    """Names for channels by Network Dissection (Bau et al. 2017, arXiv:1704.05796), made medical.

    A channel is lit where its response reaches its own threshold, the highest one at which at least `top` of all cells
    are lit (all its positive cells, where they are fewer). Its overlap with a concept is |lit and concept| /
    |lit or concept| over all voxels of the data, a cell's response counting for every voxel that it covers. That needs
    no enlargement: a cell adds the share of it that the concept fills. Thresholds are found in one pass by a histogram
    per channel with 8 bins per octave, so a threshold is at most 9 % below the exact quantile.

    As input to `update`: activations (B, K, *S'); concepts (B, O, *S') shares of cells in 0..1
    (`camtrain._grid.occupancy`); known (B,) bool, optional: cases that are not segmented are left out.

    The states take 8 x K x (O + 1) x 320 bytes: 50 MB for 1024 channels and 20 concepts.

    Args:
        num_channels: K.
        num_concepts: O.
        top: Share of the cells that are lit in each channel.
        kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        InputError: An argument out of range.

    Example:
        >>> heart = torch.tensor([[[0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]])
        >>> metric = ChannelConcepts(num_channels=2, num_concepts=1)
        >>> metric.update(torch.cat([3 * heart, 1 - heart], dim=1), heart)
        >>> metric.table().iou, metric.table().names(["heart"])
        (tensor([[1.],
                [0.]], dtype=torch.float64), ['heart', None])
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    lit: Tensor
    overlap: Tensor
    area: Tensor
    cells: Tensor

    def __init__(self, num_channels: int, num_concepts: int, top: float = TOP, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for word, number in (("num_channels", num_channels), ("num_concepts", num_concepts)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise InputError(f"{word}= expects a whole number of at least 1, got {number!r}")
        if not 0 < top < 1:
            raise InputError(f"top= expects a share between 0 and 1 such as {TOP}, got {top!r}")
        self.num_channels, self.num_concepts, self.top = num_channels, num_concepts, top
        bins, dtype = _edges(torch.device("cpu")).numel(), sum_dtype()
        self.add_state("lit", torch.zeros(num_channels, bins, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("overlap", torch.zeros(num_channels, bins, num_concepts, dtype=dtype), dist_reduce_fx="sum")
        self.add_state("area", torch.zeros(num_concepts, dtype=dtype), dist_reduce_fx="sum")
        self.add_state("cells", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, activations: Tensor, concepts: Tensor, known: Tensor | None = None) -> None:
        """Add one batch; see the class for shapes.

        Raises:
            InputError: Shapes or types break the contract.
        """
        activations, concepts = _checked(activations, concepts, known, self.num_channels, self.num_concepts)
        # Never in place: Lightning may reset a metric under inference mode, whose tensors refuse it later.
        lit, overlap = self.lit.clone(), self.overlap.clone()
        for responses, shares in zip(activations.flatten(2), concepts.flatten(2), strict=True):
            _spread(responses, shares.to(overlap.dtype), lit, overlap)
        self.lit, self.overlap = lit, overlap
        self.area = self.area + concepts.flatten(2).sum(dim=(0, 2), dtype=self.area.dtype)
        self.cells = self.cells + len(activations) * activations.shape[2:].numel()

    def compute(self) -> ConceptTable:
        """Overlaps, thresholds and coverage; torchmetrics squeezes single numbers, `table()` keeps the axes."""
        return _table(self.lit, self.overlap, self.area, self.cells, self.top)

    def table(self) -> ConceptTable:
        """What `compute()` gives, always with its axes (all processes must call it together)."""
        with synced(self):
            return _table(self.lit, self.overlap, self.area, self.cells, self.top)


def channel_concepts(
    activations: Tensor, concepts: Tensor, known: Tensor | None = None, top: float = TOP
) -> ConceptTable:
    """Overlap of each channel's strongest responses with each concept; functional twin of `ChannelConcepts`.

    Args:
        activations: (B, K, *S').
        concepts: (B, O, *S') share of each cell that the concept fills.
        known: (B,) bool, optional: cases to count.
        top: Share of the cells that are lit in each channel.

    Returns:
        The table.

    Raises:
        InputError: Shapes or types break the contract.

    Example:
        >>> heart = torch.tensor([[[0.0, 0.5, 1.0, 0.0]]])
        >>> channel_concepts(torch.tensor([[[0.0, 2.0, 2.0, 0.0]]]), heart).iou
        tensor([[0.7500]], dtype=torch.float64)
    """
    if activations.ndim < 3 or concepts.ndim < 3:
        _refuse(activations, concepts)
    metric = ChannelConcepts(activations.shape[1], concepts.shape[1], top).to(activations.device)
    metric.update(activations, concepts, known)
    return metric.table()


def _checked(
    activations: Tensor, concepts: Tensor, known: Tensor | None, channels: int, kinds: int
) -> tuple[Tensor, Tensor]:
    """Plain tensors of the cases that count, in float32 at least."""
    shapes = activations.shape[0] == concepts.shape[0] and activations.shape[2:] == concepts.shape[2:]
    if activations.ndim < 3 or not shapes or not activations.is_floating_point():
        _refuse(activations, concepts)
    if activations.shape[1] != channels or concepts.shape[1] != kinds:
        raise InputError(
            f"the metric was made for {channels} channels and {kinds} concepts, "
            f"got {activations.shape[1]} and {concepts.shape[1]}"
        )
    activations = activations.detach().as_subclass(Tensor)
    concepts = concepts.detach().as_subclass(Tensor).to(activations.device)
    if known is not None:
        if known.dtype != torch.bool or tuple(known.shape) != (len(activations),):
            raise InputError(f"known= expects bool ({len(activations)},), got {known.dtype} {tuple(known.shape)}")
        rows = known.to(activations.device)
        activations, concepts = activations[rows], concepts[rows]
    precise = torch.float64 if activations.dtype == torch.float64 else torch.float32
    return activations.to(precise), concepts


def _refuse(activations: Tensor, concepts: Tensor) -> None:
    raise InputError(
        "expected floating activations (B, K, *S') and the concepts' shares (B, O, *S') on the same grid, "
        f"got {activations.dtype} {tuple(activations.shape)} and {tuple(concepts.shape)}"
    )


def _edges(device: torch.device) -> Tensor:
    """Lower edges of the bins (E,), float32 so that every precision is binned alike."""
    first, last = (octave * PER_OCTAVE for octave in OCTAVES)
    return torch.tensor([2 ** (step / PER_OCTAVE) for step in range(first, last)], dtype=torch.float32, device=device)


def _spread(responses: Tensor, shares: Tensor, lit: Tensor, overlap: Tensor) -> None:
    """Add one case, responses (K, N) and shares (O, N), to the histograms (K, E) and (K, E, O)."""
    edges = _edges(responses.device)
    bins, rows = edges.numel(), shares.t()
    step = max(1, AT_ONCE // max(1, shares.numel()))
    for start in range(0, len(responses), step):
        part = responses[start : start + step].to(torch.float32)
        channel, cell = (part > 0).nonzero(as_tuple=True)
        at = torch.bucketize(part[channel, cell], edges, right=True).sub(1).clamp(min=0) + (channel + start) * bins
        lit.view(-1).index_add_(0, at, torch.ones_like(at))
        overlap.view(-1, overlap.shape[2]).index_add_(0, at, rows[cell])


def _table(lit: Tensor, overlap: Tensor, area: Tensor, cells: Tensor, top: float) -> ConceptTable:
    """From histograms to overlaps: the threshold is the highest edge whose tail holds the wanted number of cells."""
    tails = lit.flip(1).cumsum(dim=1).flip(1)  # (K, E): cells at or above each edge, falling along E
    positive = tails[:, :1]
    wanted = torch.minimum(positive, torch.tensor(max(1, math.ceil(top * int(cells))), device=lit.device)).clamp(min=1)
    at = ((tails >= wanted).sum(dim=1) - 1).clamp(min=0)
    channels = torch.arange(len(lit), device=lit.device)
    count = tails[channels, at].to(overlap.dtype)
    above = torch.arange(lit.shape[1], device=lit.device) >= at[:, None]
    both = torch.einsum("ke,keo->ko", above.to(overlap.dtype), overlap)
    union = count[:, None] + area - both
    dead = positive[:, 0] == 0
    return ConceptTable(
        iou=torch.where((union > 0) & ~dead[:, None], both / union.clamp(min=torch.finfo(union.dtype).tiny), 0.0),
        threshold=_edges(lit.device).to(overlap.dtype)[at].masked_fill(dead, torch.nan),
        coverage=count / cells.clamp(min=1),
    )
