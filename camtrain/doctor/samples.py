"""Cases of any data module, by the batch contract: what is known where there is no manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from camtrain._batch import Batch, read_batch
from camtrain._errors import InputError
from camtrain.doctor.contents import of_intensities, organ_sizes
from camtrain.doctor.facts import Content, Facts, Row
from camtrain.doctor.reading import bar


@dataclass(frozen=True)
class Split:
    """Cases of a loader, one by one.

    Attributes:
        name: Of the split.
        dataset: Its cases.
        collate: Makes a batch of a list of them.
        batch_size: Of the loader.
        workers: Processes of the loader.
    """

    name: str
    dataset: Any
    collate: Callable[[list[Any]], Any]
    batch_size: int
    workers: int

    def batch(self, indices: list[int]) -> Any:
        """A batch of some cases."""
        return self.collate([self.dataset[index] for index in indices])


def splits_of(data: Any) -> dict[str, Split]:
    """Training, validation and test cases of a data module that is set up.

    A test loader of the same name as a split that is known already (PASCAL VOC's `val`) is left out.
    """
    found: dict[str, Split] = {}
    tests = list(getattr(data, "test_splits", None) or ["test"])
    for names, call in (
        ([_name(data, "train", "train")], data.train_dataloader),
        ([_name(data, "val", "val")], data.val_dataloader),
        (tests, data.test_dataloader),
    ):
        loaders = call()
        listed = list(loaders) if isinstance(loaders, list | tuple) else [loaders]
        for name, loader in zip(names, listed, strict=False):
            if loader is not None and name not in found:
                size, workers = int(loader.batch_size or 1), int(loader.num_workers)
                found[name] = Split(name, loader.dataset, loader.collate_fn, size, workers)
    return found


def _name(data: Any, attribute: str, default: str) -> str:
    for word in (f"{attribute}_split", attribute):
        if isinstance(name := getattr(data, word, None), str):
            return name
    return default


def read_samples(facts: Facts, splits: Mapping[str, Split], limit: int | None = None) -> None:
    """Fill rows and contents with the cases of all splits.

    Args:
        facts: Changed in place.
        splits: From `splits_of`.
        limit: At most so many cases of each split.
    """
    rows: list[Row] = []
    counts = {name: min(len(split.dataset), limit or len(split.dataset)) for name, split in splits.items()}
    with bar("reading cases", sum(counts.values())) as advance:
        for name, split in splits.items():
            for number in range(counts[name]):
                row, content = _sample(split, number, len(facts.labels))
                facts.contents[len(rows)] = content
                rows.append(row)
                advance()
    facts.rows = rows


def _sample(split: Split, number: int, labels: int) -> tuple[Row, Content]:
    where = f"{split.name}, case {number}"
    begin = time.perf_counter()
    try:
        raw = split.batch([number])
        batch = read_batch(raw, outputs=labels or None)
        if batch.image is None:
            raise InputError("expected the key 'image' in the batch")
    except InputError as error:
        return Row(where, "", split.name), Content(image_fault=str(error))
    seconds = time.perf_counter() - begin
    name = batch.ids[0] if batch.ids else str(number)
    patient = raw.get("patient") if isinstance(raw, Mapping) else None
    return (
        Row(
            where=where,
            id=name,
            split=split.name,
            patient=str(patient[0]) if isinstance(patient, list | tuple) and patient else "",
            label=() if batch.label is None else tuple(batch.label[0].tolist()),
        ),
        _content(batch, seconds),
    )


def _content(batch: Batch, seconds: float) -> Content:
    assert batch.image is not None  # noqa: S101  (checked by the caller)
    image = batch.image[0].detach().cpu().float().numpy()
    if not np.isfinite(image).all():
        return Content(image_fault=f"expected finite intensities, got NaN or Inf in {batch.image.shape}")
    found = of_intensities(image) | {"shape": tuple(batch.image.shape[2:])}
    organs = _organs(batch)
    return Content(**found, organs=organs, seconds=seconds)


def _organs(batch: Batch) -> dict[int, Any] | None:
    if batch.organs is None or not bool(batch.has_organs[0]):
        return None
    ids: Tensor = batch.organs[0, 0].cpu()
    affine = None if batch.affine is None else batch.affine[0].cpu().double().numpy()
    return organ_sizes(ids.numpy(), affine if affine is not None and len(affine) == ids.ndim + 1 else None)
