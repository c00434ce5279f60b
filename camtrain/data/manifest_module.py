"""`ManifestDataModule`: real scans listed in a CSV file, read with MONAI, as batches of the contract."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import DataLoader
from torch.utils.data import Sampler

from camtrain._errors import InputError
from camtrain._lightning import LightningDataModule
from camtrain.anatomy.organ_table import OrganTable
from camtrain.data._faults import Faults
from camtrain.data._loaders import train_sampler
from camtrain.data.exact_loader import ExactLoader
from camtrain.data.manifest import Case, Manifest
from camtrain.data.manifest_cache import CaseDataset, DiskDataset, LazyDataset, OnError
from camtrain.data.manifest_look import checked_manifest
from camtrain.data.manifest_plan import CachePlan, Kind, check_cache
from camtrain.data.manifest_splits import kfold, label_counts
from camtrain.data.manifest_transforms import CT_WINDOW, build_transforms, collate
from camtrain.data.organ_reporting import cases_report, report_and_warn
from camtrain.data.volume_picture import is_picture

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
    Pictures (PNG, JPEG) give (B, C, rows, columns).

    Args:
        manifest: CSV file with `id, image, organs, split`, optional `patient`, and one column per label.
        table: Which organs each label may be read from: a YAML file, the name of a shipped table, the YAML's
            content, or an `OrganTable`.
        spacing: Voxel size in mm, one number or three (right-left, back-front, bottom-top); None keeps each scan's own.
            Of MRC files in nm.
        size: Voxels after cropping or padding, one number or three (two of pictures); None keeps each scan's own (then
            batch_size=1 unless all are equal).
        window: HU that become 0 and 1; or `"percentiles"` or `"zscore"` of each scan (MRI, cryo-ET).
        batch_size: Cases per batch.
        num_workers: Worker processes of each loader; also the threads that fill the cache.
        labels: Labels to use, in the order of the outputs; None takes all label columns of the manifest.
        cache: Where cases are kept after the first reading. True: in memory, read before the stage begins; a rate in
            [0, 1]: this part of them. False: nowhere. `"lazy"`: in memory, each read at its first use, one copy for all
            workers (needs `size`). `"disk"`: in `cache_dir`. `"auto"`: few cases as True, more as `"lazy"` where the
            memory suffices, else as `"disk"` if there is a `cache_dir`, else nowhere.
        augment: Small random rotations, scalings, shifts and changes of brightness in training; never a flip.
        train_split: Word in the column split of the training cases.
        val_split: The same for validation; None means no validation.
        test_splits: The same for the test loaders, one loader each.
        organ_share: Part of each training batch that has organs, see `OrganShareSampler`; None = as it comes.
        mirror: Probability that a training case is mirrored, with left and right organs and findings exchanged.
        on_error: What a file does that cannot be read: `"raise"` stops the run, `"skip"` leaves the case out, with one
            warning.
        cache_dir: Folder for `cache="disk"`, and for `"auto"`; files of plain tensors, to be deleted by the user.
        labels_csv: CSV file with `id` and one column per label, where they do not stand in the manifest.
        root: Folder in which all files must lie; relative paths start there. None: at the manifest.
        splits: Splits from elsewhere: a CSV file with `id` or `patient` and `split`, or split -> text file of ids.
        split_column: Column of the splits.
        folds: Divide training and validation cases anew into so many folds, by patient, with alike shares of labels.
        fold: The fold that validates, from 0.
        fold_seed: Of the division.
        check_files: Are all files there? False touches none before it is read.

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
        window: Sequence[float] | str = CT_WINDOW,
        batch_size: int = 2,
        num_workers: int = 0,
        labels: Sequence[str] | None = None,
        cache: bool | float | str = "auto",
        augment: bool = False,
        train_split: str = "train",
        val_split: str | None = "val",
        test_splits: Sequence[str] = ("test",),
        organ_share: float | None = None,
        mirror: float = 0.0,
        on_error: OnError = "raise",
        cache_dir: str | os.PathLike[str] | None = None,
        labels_csv: str | os.PathLike[str] | None = None,
        root: str | os.PathLike[str] | None = None,
        splits: str | os.PathLike[str] | dict[str, str] | None = None,
        split_column: str = "split",
        folds: int | None = None,
        fold: int = 0,
        fold_seed: int = 0,
        check_files: bool = True,
    ) -> None:
        super().__init__()
        self.test_splits = [test_splits] if isinstance(test_splits, str) else list(test_splits)
        rules, read = checked_manifest(
            manifest,
            table,
            [labels] if isinstance(labels, str) else labels,
            splits,
            labels_csv=labels_csv,
            root=root,
            split_column=None if splits is not None else split_column,
            check_files=check_files,
        )
        if folds is not None:
            read = kfold(read, folds, fold, fold_seed, (train_split, val_split or "val"), val_split or "val")
        self.manifest: Manifest = read
        self.labels = list(self.manifest.labels)
        self.table = rules.select(self.labels)
        self.batch_size = _at_least("batch_size", batch_size, 1)
        self.num_workers = _at_least("num_workers", num_workers, 0)
        self.cache = check_cache(cache, cache_dir, size)
        self.cache_rate = float(cache) if isinstance(cache, (bool, int, float)) else 1.0
        if on_error not in ("raise", "skip"):
            raise InputError(f"on_error expects 'raise' or 'skip', got {on_error!r}")
        self.on_error: OnError = on_error
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.train_split, self.val_split = train_split, val_split
        self.organ_share = organ_share
        picture = _all_pictures(self.manifest)
        self._settings = {"spacing": _plain(spacing), "size": _plain(size), "window": _plain(window)}
        steps: dict[str, Any] = {"spacing": spacing, "size": size, "window": window, "picture": picture}
        self._transforms = build_transforms(self.table, **steps)
        changed = augment or mirror != 0
        self._augmented = (
            build_transforms(self.table, **steps, augment=augment, mirror=mirror) if changed else self._transforms
        )
        self._plan = CachePlan(self.cache, size, spacing, self.num_workers, self.cache_dir)
        self._datasets: dict[tuple[str, bool], Any] = {}
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
                "mirror": mirror,
                "on_error": on_error,
                "cache_dir": _place(cache_dir),
                "labels_csv": _place(labels_csv),
                "root": _place(root),
                "splits": {k: _place(v) for k, v in splits.items()} if isinstance(splits, Mapping) else _place(splits),
                "split_column": split_column,
                "folds": folds,
                "fold": fold,
                "fold_seed": fold_seed,
                "check_files": check_files,
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
        faults = Faults("the cases")
        for argument, split in wanted:
            with faults.noting():
                self._dataset(split, argument)
        faults.stop()

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

    @property
    def label_counts(self) -> dict[str, dict[str, int]]:
        """Label -> `present`, `absent` and `unknown` cases of the training split."""
        counts = label_counts(self.manifest.split(self.train_split, "train_split")).tolist()
        words = ("present", "absent", "unknown")
        return {name: dict(zip(words, row, strict=True)) for name, row in zip(self.labels, counts, strict=True)}

    @property
    def class_weights(self) -> list[float]:
        """For each label absent / present cases of the training split: what a present case must weigh for balance.

        From 0.01 to 100; 1 where one of the two is missing. `LitClassifier(class_weights="balanced")` takes it.
        """
        return [
            min(max(row["absent"] / row["present"], 0.01), 100.0) if row["present"] and row["absent"] else 1.0
            for row in self.label_counts.values()
        ]

    def _dataset(self, split: str, argument: str) -> Any:
        transforms = self._augmented if argument == "train_split" else self._transforms
        key = (split, transforms is self._augmented)
        if key not in self._datasets:
            cases = self.manifest.split(split, argument)
            self._datasets[key] = self._made(cases, transforms, self._plan.kind(split, cases))
        return self._datasets[key]

    def _made(self, cases: list[Case], transforms: Any, kind: Kind) -> Any:
        if kind == "lazy":
            return LazyDataset(cases, transforms, self._plan.shape(cases), self.on_error)
        if kind == "disk":
            assert self.cache_dir is not None  # noqa: S101  (the plan says so)
            return DiskDataset(cases, transforms, self.cache_dir, self._settings, self.on_error)
        rate = 0.0 if kind == "none" else self.cache_rate
        return CaseDataset(cases, transforms, rate, max(1, self.num_workers), self.on_error)

    def _loader(self, split: str, argument: str, shuffle: bool = False) -> DataLoader:
        # A generator of its own, seeded from torch's: MONAI's loader would rewind the global one otherwise.
        drawn = int(torch.randint(2**62, ()))
        generator = torch.Generator().manual_seed(drawn)
        dataset = self._dataset(split, argument)
        sampler: Sampler[int] | None = None
        draws: int | None = None
        if shuffle:
            has_organs = [case.organs is not None for case in self.manifest.split(split, argument)]
            # Every process must draw the same shares, so that there the seed is never torch's own.
            seed = int(os.environ.get("PL_GLOBAL_SEED", drawn if self.organ_share is None else 0))
            sampler = train_sampler(dataset, has_organs, self.batch_size, self.organ_share, seed)
            draws = seed if self._augmented is not self._transforms else None
        return ExactLoader(
            dataset,
            seed=draws,
            trainer=(lambda: self.trainer) if shuffle else None,
            num_workers=self.num_workers,
            batch_size=self.batch_size,
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


def _all_pictures(manifest: Manifest) -> bool:
    """Pictures or volumes: a network takes one of the two."""
    pictures = [case for case in manifest.cases if is_picture(case.image)]
    if pictures and len(pictures) < len(manifest.cases):
        volume = next(case for case in manifest.cases if not is_picture(case.image))
        raise InputError(
            f"{manifest.path}: expected pictures or volumes, got both: {pictures[0].image.name} in the "
            f"row of {pictures[0].id!r} and {volume.image.name} in that of {volume.id!r}: write one manifest for each"
        )
    return bool(pictures)


def _place(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


def _at_least(name: str, value: int, low: int) -> int:
    if int(value) != value or value < low:
        raise InputError(f"{name} expects a whole number from {low} on, got {value}: set it so")
    return int(value)


def _plain(value: Any) -> Any:
    """Numbers and lists of numbers of Python's own kinds."""
    if value is None or isinstance(value, str):
        return value
    return (
        [_plain(v) for v in value] if hasattr(value, "__iter__") else value.item() if hasattr(value, "item") else value
    )
