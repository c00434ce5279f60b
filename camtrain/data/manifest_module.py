"""`ManifestDataModule`: real scans listed in a CSV file, read with MONAI, as batches of the contract."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from monai.data import CacheDataset, DataLoader

from camtrain._errors import InputError, nearest
from camtrain._lightning import LightningDataModule
from camtrain.anatomy.organ_table import OrganTable
from camtrain.data._loaders import share_sampler
from camtrain.data.manifest import Case, Manifest, read_manifest
from camtrain.data.manifest_transforms import CaseError, build_transforms, collate, root_input_error
from camtrain.data.organ_report import cases_report, report_and_warn

# str, path, mapping or OrganTable. The annotation cannot say so: with a class or a mapping in it, jsonargparse opens
# the YAML file itself and hands on a text of the parsed content when that is wrong: the file's name would be lost.
TableSource = Any

_log = logging.getLogger(__name__)


class ManifestDataModule(LightningDataModule):
    """Scans, organs and findings of a manifest (CSV) as train, validation and test batches.

    Every volume is turned to RAS, resampled to `spacing` (image linearly, organs nearest), windowed to [0, 1], and
    cropped or padded with air around its centre to `size`. A batch is a dict: image (B, 1, *S) float32, label (B, L)
    float32 with NaN = unknown, organs (B, 1, *S) int32, has_organs (B,) bool, id, patient (empty = unknown), affine
    (B, 4, 4) voxel-to-world of the very grid the network sees, original_shape and original_affine of the files.

    Args:
        manifest: CSV file with `id, image, organs, split`, optional `patient`, and one column per label.
        table: Which organs each label may be read from: a YAML file, the name of a shipped table, the YAML's
            content, or an `OrganTable`.
        spacing: Voxel size in mm, one number or three (right-left, back-front, bottom-top); None keeps each scan's own.
        size: Voxels after cropping or padding, one number or three; None keeps each scan's own (then batch_size=1
            unless all are equal).
        window: HU that become 0 and 1.
        batch_size: Cases per batch.
        num_workers: Worker processes of each loader; also the threads that fill the cache.
        labels: Labels to use, in the order of the outputs; None takes all label columns of the manifest.
        cache: Keep this part of the cases in memory after the first reading: True, False, or a rate in [0, 1].
        augment: Small random rotations, scalings, shifts and changes of brightness in training; never a flip.
        train_split: Word in the column split of the training cases.
        val_split: The same for validation; None means no validation.
        test_splits: The same for the test loaders, one loader each.
        organ_share: Part of each training batch that has organs, see `OrganShareSampler`; None = as it comes.

    Attributes:
        labels: Label names, in the order of `label`.
        table: `OrganTable`, cut to these labels.
        manifest: The checked `Manifest`.

    Raises:
        InputError: The manifest, its files, the table or an argument is not as described.
    """

    labels: list[str]
    table: OrganTable

    def __init__(
        self,
        manifest: str | os.PathLike[str],
        table: TableSource,
        spacing: float | Sequence[float] | None = None,
        size: int | Sequence[int] | None = None,
        window: Sequence[float] = (-1000.0, 800.0),
        batch_size: int = 2,
        num_workers: int = 0,
        labels: Sequence[str] | None = None,
        cache: bool | float = True,
        augment: bool = False,
        train_split: str = "train",
        val_split: str | None = "val",
        test_splits: Sequence[str] = ("test",),
        organ_share: float | None = None,
    ) -> None:
        super().__init__()
        self.manifest: Manifest = read_manifest(manifest, [labels] if isinstance(labels, str) else labels)
        self.labels = list(self.manifest.labels)
        self.table = _table(table, self.labels, self.manifest)
        self.batch_size = _at_least("batch_size", batch_size, 1)
        self.num_workers = _at_least("num_workers", num_workers, 0)
        self.cache_rate = float(cache)
        if not 0 <= self.cache_rate <= 1:
            raise InputError(f"cache expects True, False or a rate in [0, 1], got {cache}: 0.5 keeps half of the cases")
        self.train_split, self.val_split = train_split, val_split
        self.test_splits = [test_splits] if isinstance(test_splits, str) else list(test_splits)
        self.organ_share = organ_share
        self._transforms = build_transforms(self.table, spacing, size, window)
        self._augmented = build_transforms(self.table, spacing, size, window, augment) if augment else self._transforms
        self._datasets: dict[tuple[str, bool], CaseDataset] = {}
        # Plain values only: a checkpoint that holds them opens with weights_only, and rebuilds this module anywhere
        # the files lie. Not sent to loggers: Lightning stops when model and data have a hyper-parameter of one name.
        self.save_hyperparameters(
            {
                "manifest": str(Path(manifest).absolute()),
                "table": self.table.to_dict(),  # the content: a table edited later must not change a trained model's
                "spacing": _plain(spacing),
                "size": _plain(size),
                "window": _plain(window),
                "batch_size": self.batch_size,
                "num_workers": self.num_workers,
                "labels": self.labels,
                "cache": cache,
                "augment": augment,
                "train_split": train_split,
                "val_split": val_split,
                "test_splits": self.test_splits,
                "organ_share": organ_share,
            },
            logger=False,
        )
        self._report_unused_splits()

    def setup(self, stage: str) -> None:
        """Read (and cache) the splits that this stage needs.

        Args:
            stage: fit, validate, test or predict.

        Raises:
            InputError: A split has no case, or a volume is unreadable or wrong.
        """
        needed = {
            "fit": [("train_split", self.train_split), ("val_split", self.val_split)],
            "validate": [("val_split", self.val_split)],
        }.get(stage, [("test_splits", split) for split in self.test_splits])
        wanted = [(argument, split) for argument, split in needed if split is not None]
        for argument, split in wanted:  # First, so that a missing split is told before hours of reading.
            self.manifest.split(split, argument)
        if stage == "fit":
            names = [split for _, split in wanted]
            report = cases_report(self.labels, [case for case in self.manifest.cases if case.split in names])
            report_and_warn(report, str(self.manifest.path))
        for argument, split in wanted:
            self._dataset(split, argument)

    def train_dataloader(self) -> DataLoader:
        """Shuffled training cases, the last incomplete batch included."""
        return self._loader(self.train_split, "train_split", shuffle=True)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Validation cases in the order of the manifest."""
        return [] if self.val_split is None else self._loader(self.val_split, "val_split")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """One loader per test split; not in a list when there is one."""
        loaders = [self._loader(split, "test_splits") for split in self.test_splits]
        return loaders[0] if len(loaders) == 1 else loaders

    def _dataset(self, split: str, argument: str) -> CaseDataset:
        transforms = self._augmented if argument == "train_split" else self._transforms
        key = (split, transforms is self._augmented)
        if key not in self._datasets:
            cases = self.manifest.split(split, argument)
            self._datasets[key] = CaseDataset(cases, transforms, self.cache_rate, max(1, self.num_workers))
        return self._datasets[key]

    def _loader(self, split: str, argument: str, shuffle: bool = False) -> DataLoader:
        # A generator of its own, seeded from torch's: MONAI's loader would rewind the global one otherwise.
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        sampler = None
        if shuffle and self.organ_share is not None:
            has_organs = [case.organs is not None for case in self.manifest.split(split, argument)]
            # Every process must draw the same order, so that the seed is not torch's own.
            seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
            sampler = share_sampler(has_organs, self.batch_size, self.organ_share, seed)
        return DataLoader(
            self._dataset(split, argument),
            num_workers=self.num_workers,
            batch_size=self.batch_size,
            shuffle=shuffle and sampler is None,
            sampler=sampler,
            collate_fn=collate,
            generator=generator,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _report_unused_splits(self) -> None:
        used = {self.train_split, self.val_split, *self.test_splits}
        if unused := {name: n for name, n in self.manifest.splits.items() if name not in used}:
            text = ", ".join(f"{n} of {name!r}" for name, n in unused.items())
            _log.warning("%s: cases in no train, validation or test split: %s", self.manifest.path, text)


class CaseDataset(CacheDataset):  # type: ignore[misc]
    """MONAI's cached dataset, whose errors are one `InputError` that names file and row.

    Args:
        cases: Rows of the manifest.
        transforms: From `build_transforms`.
        cache_rate: Part of the cases to keep in memory.
        threads: Threads that fill the cache.
    """

    def __init__(self, cases: list[Case], transforms: Any, cache_rate: float, threads: int) -> None:
        self._failed: dict[int, Exception] = {}
        super().__init__(cases, transforms, cache_rate=cache_rate, num_workers=threads, progress=len(cases) > 10)
        if self._failed:
            raise self._failed[min(self._failed)]

    def _load_cache_item(self, idx: int) -> Any:
        # An exception that leaves the pool while other threads are still reading lets the process abort at its end:
        # the first one is kept, the others stop at their next case, and then it is raised.
        if self._failed:
            return None
        try:
            with _naming(self.data[idx]):
                return super()._load_cache_item(idx)
        except Exception as error:
            self._failed[idx] = error
            return None

    def _transform(self, index: int) -> Any:
        with _naming(self.data[index]):
            return super()._transform(index)


@contextmanager
def _naming(case: Case) -> Iterator[None]:
    """Put file and row before an `InputError`, also one that MONAI wrapped; let any other error pass."""
    try:
        yield
    except Exception as error:
        if (known := root_input_error(error)) is None:
            raise
        raise CaseError(f"{case.where}: {known}") from error


def _table(source: TableSource, labels: Sequence[str], manifest: Manifest) -> OrganTable:
    """The table, cut to the labels; every label needs a rule there."""
    table = OrganTable.load(os.fspath(source) if isinstance(source, os.PathLike) else source)
    for name in labels:
        if name not in table.labels:
            raise InputError(
                f"{manifest.path}: expected a rule in the organ table for every label, got none for {name!r}"
                f"{nearest(name, table.labels)}: add it to the table ('{name}: anywhere' sets no limit), "
                "or leave the column out with labels="
            )
    return table.select(labels)


def _at_least(name: str, value: int, low: int) -> int:
    if int(value) != value or value < low:
        raise InputError(f"{name} expects a whole number from {low} on, got {value}: set it so")
    return int(value)


def _plain(value: Any) -> Any:
    """Numbers and lists of numbers of Python's own kinds."""
    if value is None:
        return None
    return (
        [_plain(v) for v in value] if hasattr(value, "__iter__") else value.item() if hasattr(value, "item") else value
    )
