"""The label-randomised control: a network that was trained on labels of other cases can only have learnt them by heart.

Adebayo et al. (2018, arXiv:1810.03292, section 4): a map that looks the same for a network that learnt the findings and
for one that learnt noise does not explain what was learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import monai.data
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from camtrain._errors import InputError
from camtrain.cam.engine import Reshape
from camtrain.cam.logits import PickLogits
from camtrain.cam.question import Layer
from camtrain.cam.several import Layers
from camtrain.evaluation.sanity import METHODS, MapAsker, Methods, OwnMethod
from camtrain.evaluation.sanity_table import SanityTable, label_rows


class ShuffledLabels(Dataset[dict[str, Any]]):
    """A map-style dataset whose cases have the labels of other cases, always the same ones.

    Whole rows are exchanged, so that the share of each finding, what goes together and what is unknown stay as they
    are; image, organs and everything else stay with their case.

    Args:
        dataset: Gives dicts with the key `label`.
        seed: Of the permutation; torch's generator is not touched.
        key: The label's key.

    Raises:
        InputError: No length (an iterable dataset), fewer than two cases, or (on access) no such key.

    Example:
        >>> shuffled = ShuffledLabels([{"image": i, "label": torch.tensor([float(i)])} for i in range(4)])
        >>> sorted(int(case["label"]) for case in shuffled), any(case["image"] == case["label"] for case in shuffled)
        ([0, 1, 2, 3], False)
    """

    def __init__(self, dataset: Any, seed: int = 0, key: str = "label") -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise InputError(
                f"labels are exchanged between the cases of a map-style dataset, got {type(dataset).__name__}, which "
                "has no length: list its cases first"
            )
        if len(dataset) < 2:
            raise InputError(f"expected at least two cases to exchange labels between, got {len(dataset)}")
        self.dataset = dataset
        self.key = key
        self.order = _round_trip(len(dataset), seed)
        self._labels: dict[int, Any] = {}

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One case with the label of another."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"case {index} of {len(self)}")
        index %= len(self)
        case = self.dataset[index]
        # A case's own label is at hand now, and another will need it.
        self._labels[index] = self._label_in(case)
        other = self.order[index]
        if other not in self._labels:
            self._labels[other] = self._label_in(self.dataset[other])
        return {**case, self.key: self._labels[other]}

    def _label_in(self, case: Any) -> Any:
        if not isinstance(case, Mapping) or self.key not in case:
            came = ", ".join(map(str, case)) if isinstance(case, Mapping) else type(case).__name__
            raise InputError(f"expected cases that are dicts with the key {self.key!r}, got {came}: pass key=")
        label = case[self.key]
        return label.clone() if isinstance(label, Tensor) else label


def _round_trip(cases: int, seed: int) -> list[int]:
    """A random permutation in one cycle: no case keeps its own label, as one would on average."""
    way: list[int] = torch.randperm(cases, generator=torch.Generator().manual_seed(seed)).tolist()
    order = [0] * cases
    for here, there in zip(way, [*way[1:], way[0]], strict=True):
        order[here] = there
    return order


@contextmanager
def shuffle_labels(datamodule: Any, seed: int = 0, key: str = "label") -> Iterator[Any]:
    """Within the block, a data module's training loader has the labels exchanged; validation and test stay true.

    Args:
        datamodule: A LightningDataModule whose `train_dataloader` gives one loader of a map-style dataset.
        seed: Of the permutation.
        key: The label's key in a case.

    Yields:
        The data module itself.

    Raises:
        InputError: No `train_dataloader`; when it is asked: several loaders, or an iterable dataset.

    Example:
        >>> from camtrain.data import PhantomDataModule
        >>> data = PhantomDataModule(cases=8, size=16, batch_size=8)
        >>> (true,) = data.train_dataloader()
        >>> with shuffle_labels(data):
        ...     (batch,) = data.train_dataloader()
        >>> torch.equal(batch["label"], true["label"]), torch.equal(batch["label"].sum(0), true["label"].sum(0))
        (False, True)
    """
    if not callable(getattr(datamodule, "train_dataloader", None)):
        raise InputError(f"expected a LightningDataModule, got {type(datamodule).__name__}")
    own = datamodule.__dict__.get("train_dataloader")
    # A partial of a plain function, which Lightning takes for an overridden method, and which can be pickled.
    datamodule.train_dataloader = partial(_shuffled_loader, datamodule.train_dataloader, seed, key)
    try:
        yield datamodule
    finally:
        if own is None:
            del datamodule.train_dataloader
        else:
            datamodule.train_dataloader = own


def _shuffled_loader(make: Callable[[], Any], seed: int, key: str) -> DataLoader[Any]:
    """The loader that `make` gives, over the same cases with labels exchanged."""
    loader = make()
    if not isinstance(loader, DataLoader):
        raise InputError(f"labels are exchanged in one DataLoader, and train_dataloader gives {type(loader).__name__}")
    # MONAI's loader seeds random transforms in worker processes, and does more in __init__ than it hands on.
    kind = monai.data.DataLoader if isinstance(loader, monai.data.DataLoader) else DataLoader
    batches: dict[str, Any] = (
        {"batch_sampler": loader.batch_sampler}
        if loader.batch_size is None
        else {"batch_size": loader.batch_size, "sampler": loader.sampler, "drop_last": loader.drop_last}
    )
    # worker_init_fn is MONAI's own there, and it makes another.
    seeds: dict[str, Any] = {} if kind is monai.data.DataLoader else {"worker_init_fn": loader.worker_init_fn}
    made: DataLoader[Any] = kind(
        ShuffledLabels(loader.dataset, seed, key),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        **seeds,
        **batches,
    )
    return made


def compare_models(
    model: nn.Module,
    control: nn.Module,
    image: Tensor,
    methods: Methods = METHODS,
    layer: Layer | Layers = None,
    labels: Any = None,
    label: Tensor | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    controls: Methods = (),
    own: Mapping[str, OwnMethod] | None = None,
    names: Sequence[str] | None = None,
    logits: PickLogits | None = None,
    reshape: Reshape | None = None,
    chunk: int = 8,
) -> SanityTable:
    """How alike are the maps of two models of one architecture, for the same cases and labels?

    Meant for a network and its twin that was trained on exchanged labels (`shuffle_labels`). Two networks that learnt
    the same findings from other seeds give the number to set beside it. The rows have the stage 0 and no verdict: no
    threshold is known that would hold for other data.

    Args:
        model: The network in question.
        control: Another one, with layers of the same names.
        image: (B, C, *S).
        methods: See `sanity_check`, as are all others.
        layer: See there.
        labels: See there.
        label: See there.
        options: See there.
        controls: See there.
        own: See there.
        names: See there.
        logits: See there.
        reshape: See there.
        chunk: See there.

    Returns:
        A row per method, layer and label.

    Raises:
        InputError: As `sanity_check`; the control lacks the layer, or its maps have another grid.

    Example:
        >>> make = lambda: nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        >>> table = compare_models(make(), make(), torch.rand(3, 1, 18), ["hirescam"])
        >>> [(row.label, row.n) for row in table.rows]
        [('label 0', 3), ('label 1', 3)]
    """
    asker = MapAsker.make(model, image, methods, controls, layer, labels, label, options, own, names, logits, reshape,
                          chunk)  # fmt: skip
    found = asker.compare(asker.maps(model), control)
    place = (0, "the other model", 1.0)
    return SanityTable(tuple(label_rows(place, [found], asker.pairs, asker.names, asker.controls)))
