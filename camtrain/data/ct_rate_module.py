"""`CTRateDataModule`: the chest CTs of CT-RATE with their 18 findings, organs from TotalSegmentator for some or all."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from monai.data import DataLoader
from monai.transforms import Compose
from torch.utils.data import Sampler

from camtrain._errors import InputError, nearest
from camtrain._lightning import LightningDataModule
from camtrain.anatomy.organ_table import OrganTable
from camtrain.data._faults import Faults
from camtrain.data._loaders import at_least, train_sampler
from camtrain.data.ct_rate_files import (
    SPLITS,
    Header,
    OrganFinder,
    chosen_for_validation,
    find_root,
    find_volumes,
    known_headers,
    labels_file,
    metadata_file,
    parse_name,
    read_labels,
    read_no_chest,
)
from camtrain.data.ct_rate_header import CorrectHeader
from camtrain.data.exact_loader import ExactLoader
from camtrain.data.manifest import Case
from camtrain.data.manifest_cache import CaseDataset
from camtrain.data.manifest_transforms import build_transforms, check_triple, check_window, collate
from camtrain.data.organ_reporting import OrganReport, cases_report, report_and_warn

TableSource = Any  # as in ManifestDataModule: a union makes jsonargparse open the file itself
_PUBLISHED_ORGANS = Path("ts_seg") / "ts_total"
_log = logging.getLogger(__name__)


class CTRateDataModule(LightningDataModule):
    """CT-RATE in its published layout: NIfTI volumes, table of 18 findings, and organs where there are some.

    Volumes of the folders `train_fixed` and `valid_fixed` are taken where they are there; their headers are right.
    Those of `train` and `valid` were published without slope, intercept and spacing, which then come from the
    metadata. A volume is turned to RAS, resampled to `spacing`, windowed to [0, 1] and cropped or padded with air to
    `size`, with its organs. Volumes that were not downloaded are left out and counted, as are those that show no chest.

    CT-RATE has no test set of its own besides `valid`, so `valid` is the test split here, and `val` is a part of the
    patients of `train`. Splits go by patient: all scans and reconstructions of one are on one side.

    Batches hold `image` (B, 1, *S) float32, `label` (B, L) float32 with NaN = unknown, `organs` (B, 1, *S) int32,
    `has_organs` (B,) bool, `id`, `patient`, `affine` (B, 4, 4), `original_shape` and `original_affine`.

    Args:
        root: The folder `dataset` of the download.
        organs: Folder with one multi-label file, or one folder of binary files, per volume, in the tree of the
            volumes or flat; the published ones lie in `ROOT/ts_seg/ts_total`. None = no case has organs.
        tables: Folder with the CSV files; None = those in `root`.
        table: Which organs each label may be read from; None = the shipped table `ct_rate`.
        labels: Some of the findings, in the order of the outputs; None = all.
        spacing: Voxel size in mm, one number or three.
        size: Voxels after cropping or padding, one number or three.
        window: HU that become 0 and 1.
        reconstructions: `"all"`, or `"first"` of each scan: the second has the same findings in another kernel.
        val_share: Part of the patients of `train` that are `val`; 0 makes the published `valid` the validation split.
        correct_headers: Take slope, intercept and spacing from the metadata; None = where the folder is not `_fixed`.
        batch_size: Cases per batch.
        num_workers: Worker processes of each loader.
        organ_share: Part of each training batch that has organs, see `OrganShareSampler`; None = as it comes.
        cache: Part of the cases to keep in memory: True, False, or a rate in [0, 1].
        augment: Small random rotations, scalings, shifts and changes of brightness in training; never a flip.
        test_splits: Out of `train`, `val`, `valid`; one loader each.
        seed: Of the order and of the choice of `val`.

    Attributes:
        labels: Label names.
        table: `OrganTable`, cut to these labels.

    Raises:
        InputError: The folder, a table, a file or an argument is not as described; the message names the file.

    Example:
        >>> import tempfile
        >>> from camtrain.data import CTRateDataModule, make_ct_rate_tree
        >>> root = make_ct_rate_tree(tempfile.mkdtemp(), train=2, valid=1, size=(20, 20, 16))
        >>> data = CTRateDataModule(root, root / "ts_seg" / "ts_total", spacing=20, size=20, labels=["lung_nodule"])
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader()))["image"].shape, data.table.labels
        (torch.Size([2, 1, 20, 20, 20]), ['lung_nodule'])
    """

    labels: list[str]
    table: OrganTable

    def __init__(
        self,
        root: str | os.PathLike[str],
        organs: str | os.PathLike[str] | None = None,
        tables: str | os.PathLike[str] | None = None,
        table: TableSource = None,
        labels: Sequence[str] | None = None,
        spacing: float | Sequence[float] = 2.0,
        size: int | Sequence[int] = 192,
        window: Sequence[float] = (-1000.0, 1000.0),
        reconstructions: Literal["all", "first"] = "all",
        val_share: float = 0.05,
        correct_headers: bool | None = None,
        batch_size: int = 2,
        num_workers: int = 0,
        organ_share: float | None = None,
        cache: bool | float = False,
        augment: bool = False,
        test_splits: Sequence[str] = ("valid",),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if reconstructions not in ("all", "first"):
            raise InputError(f"reconstructions expects 'all' or 'first', got {reconstructions!r}")
        if not 0 <= val_share < 1:
            raise InputError(f"val_share expects a part of the patients from 0 to below 1, got {val_share}")
        if not 0 <= float(cache) <= 1:
            raise InputError(f"cache expects True, False or a rate in [0, 1], got {cache}: 0.5 keeps half of the cases")
        at_least(1, batch_size=batch_size)
        at_least(0, num_workers=num_workers)
        self.test_splits = [test_splits] if isinstance(test_splits, str) else list(test_splits)
        for split in self.test_splits:
            if split not in ("train", "val", *SPLITS):
                raise InputError(f"test_splits expects train, val or valid, got {split!r}{nearest(split, SPLITS)}")
        self.root = find_root(Path(root))
        self.tables = self.root if tables is None else Path(tables)
        self.organs = None if organs is None else Path(organs)
        self._check_organs()
        self.reconstructions, self.val_share, self.correct_headers = reconstructions, val_share, correct_headers
        self.batch_size, self.num_workers, self.organ_share = batch_size, num_workers, organ_share
        self.cache_rate, self._seed = float(cache), seed
        whole = OrganTable.load("ct_rate" if table is None else table)
        self.labels = _labels(labels, whole, labels_file(self.tables, "train"))
        self.table = whole.select(self.labels)
        self._plain = build_transforms(self.table, spacing, size, window)
        self._augmented = build_transforms(self.table, spacing, size, window, augment) if augment else self._plain
        self._published: dict[str, list[Case]] = {}
        self._headers: dict[str, Header] = {}
        self._datasets: dict[tuple[str, bool], CaseDataset] = {}
        # Plain values only, so that a checkpoint opens with weights_only and rebuilds this module.
        self.save_hyperparameters(
            {
                "root": str(self.root.absolute()),
                "organs": None if self.organs is None else str(self.organs.absolute()),
                "tables": str(self.tables.absolute()),
                "table": self.table.to_dict(),
                "labels": self.labels,
                "spacing": list(check_triple("spacing", spacing, float)),
                "size": list(check_triple("size", size, int)),
                "window": list(check_window(window)),
                "reconstructions": reconstructions,
                "val_share": val_share,
                "correct_headers": correct_headers,
                "batch_size": batch_size,
                "num_workers": num_workers,
                "organ_share": organ_share,
                "cache": cache,
                "augment": augment,
                "test_splits": self.test_splits,
                "seed": seed,
            },
            logger=False,
        )

    def setup(self, stage: str) -> None:
        """Read the tables and find the files that this stage needs; no volume is opened.

        Args:
            stage: fit, validate, test or predict.

        Raises:
            InputError: A table is missing or wrong, or a split has no volume.
        """
        splits = {"fit": ["train", "val"], "validate": ["val"]}.get(stage, self.test_splits)
        faults = Faults(str(self.root))
        for split in splits:
            with faults.noting():
                self._dataset(split, training=stage == "fit" and split == "train")
        faults.stop()
        if stage == "fit" and self.organs is not None:
            report_and_warn(self.organ_report(splits), str(self.organs))

    def organ_report(self, splits: Sequence[str] = ("train", "val", "valid")) -> OrganReport:
        """Who has organs, by label and split, and whether having them predicts a label.

        Args:
            splits: Out of `train`, `val`, `valid`.
        """
        return cases_report(self.labels, [case for split in splits for case in self.cases(split)])

    def cases(self, split: str) -> list[Case]:
        """Cases of a split whose volume is there.

        Args:
            split: `train`, `val` or `valid`.

        Raises:
            InputError: As in `setup`.
        """
        if split == "valid" or not self.val_share:
            return [_in(case, split) for case in self._read("train" if split == "train" else "valid")]
        cases = self._read("train")
        kept = chosen_for_validation((case.patient for case in cases), self.val_share, self._seed)
        found = [_in(case, split) for case in cases if (case.patient in kept) == (split == "val")]
        if not found:
            raise InputError(
                f"{self.root}: expected at least two patients to share among train and val, got one: download more, or "
                "set val_share: 0 to validate on the published split valid"
            )
        return found

    def train_dataloader(self) -> DataLoader:
        """Shuffled training cases, in batches with the share of organs that was asked for."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Validation cases in the order of the table."""
        return self._loader("val")

    def test_dataloader(self) -> list[DataLoader]:
        """One loader per name in `test_splits`."""
        return [self._loader(split) for split in self.test_splits]

    def _check_organs(self) -> None:
        if self.organs is None:
            if (self.root / _PUBLISHED_ORGANS).is_dir():
                _log.info("%s holds published segmentations: set organs= to it", self.root / _PUBLISHED_ORGANS)
            return
        if not self.organs.is_dir():
            raise InputError(f"{self.organs}: expected the folder of the organs, got no such folder: correct organs=")
        if self.organs.resolve() == self.root.resolve():
            raise InputError(
                f"organs expects a folder of segmentations, got the folder of the scans, {self.organs}: set it to "
                f"{_PUBLISHED_ORGANS} inside of it, or to where TotalSegmentator wrote"
            )

    def _read(self, published: str) -> list[Case]:
        if published not in self._published:
            self._published[published] = self._find(published)
        return self._published[published]

    def _find(self, published: str) -> list[Case]:
        """Cases of a published split: rows of its table whose volume is there, shows a chest, and is wanted."""
        place = find_volumes(self.root, published)
        if place is None:
            raise InputError(
                f"{self.root}: expected the folder {published}_fixed or {published} with the volumes, got neither: set "
                "root= to the folder dataset of the download"
            )
        folder, fixed = place
        file = labels_file(self.tables, published)
        rows = read_labels(file, self.labels)[1]
        no_chest, finder, left_out = read_no_chest(self.tables, published), OrganFinder(self.organs), Counter[str]()
        cases: list[Case] = []
        for name, label in rows.items():
            volume = parse_name(name)
            if volume is None or name in no_chest:
                left_out["show no chest"] += 1
                continue
            if self.reconstructions == "first" and volume.reconstruction != 1:
                left_out["are second reconstructions"] += 1
                continue
            path = folder / volume.patient / volume.scan / f"{name}.nii.gz"
            if not path.is_file():
                left_out["are not there"] += 1
                continue
            organs = finder.find(folder.name, volume)
            cases.append(Case(name, path, organs, published, label, volume.patient, f"{file} ({name})"))
        _log.info("%s: %d of %d volumes taken%s", folder, len(cases), len(rows), _counts(left_out))
        if not cases:
            raise InputError(
                f"{folder}: expected volumes <patient>/<scan>/<name>.nii.gz of {file.name}, got none of {len(rows)}"
                f"{_counts(left_out)}: set root= to the folder dataset of the download"
            )
        if self.organs is not None and published == "train" and not any(case.organs for case in cases):
            raise InputError(
                f"{self.organs}: expected organs of the {len(cases)} volumes, got none: expected for example "
                f"{folder.name}/{cases[0].patient}/.../{cases[0].id}.nii.gz, {cases[0].id}.nii.gz or a folder "
                f"{cases[0].id} of binary files; leave organs= out to train without"
            )
        if not fixed if self.correct_headers is None else self.correct_headers:
            wanted = {case.id for case in cases}
            self._headers |= known_headers(metadata_file(self.tables, published), folder, wanted)
        return cases

    def _dataset(self, split: str, training: bool = False) -> CaseDataset:
        key = (split, training)
        if key not in self._datasets:
            cases = self.cases(split)
            transforms = _with_headers(self._augmented if training else self._plain, self._headers)
            self._datasets[key] = CaseDataset(cases, transforms, self.cache_rate, max(1, self.num_workers))
        return self._datasets[key]

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader:
        dataset = self._dataset(split, training=shuffle)
        sampler: Sampler[int] | None = None
        if shuffle:
            has_organs = [case.organs is not None for case in self.cases(split)]
            sampler = train_sampler(dataset, has_organs, self.batch_size, self.organ_share, self._seed)
        return ExactLoader(
            dataset,
            seed=self._seed if shuffle and self._augmented is not self._plain else None,
            trainer=(lambda: self.trainer) if shuffle else None,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # An own generator: MONAI's loader would reset torch's global one, and the order should follow our seed.
            generator=torch.Generator().manual_seed(self._seed),
        )


def _in(case: Case, split: str) -> Case:
    return Case(case.id, case.image, case.organs, split, case.label, case.patient, case.where)


def _with_headers(transforms: Compose, headers: Mapping[str, Header]) -> Compose:
    """Headers are corrected right behind the reading, before anything asks for mm or HU."""
    read, *rest = transforms.transforms
    return Compose([read, CorrectHeader(headers), *rest]) if headers else transforms


def _counts(left_out: Mapping[str, int]) -> str:
    return "".join(f"; {count} {reason}" for reason, count in left_out.items())


def _labels(given: Sequence[str] | None, table: OrganTable, file: Path) -> list[str]:
    there, _ = read_labels(file)
    names = there if given is None else [given] if isinstance(given, str) else list(given)
    for name in names:
        if name not in table.labels:
            raise InputError(
                f"labels: {name!r} has no rule in the organ table{nearest(name, table.labels)}: add it there "
                f"('{name}: anywhere' sets no limit), or name the labels to take"
            )
        if name not in there:
            raise InputError(f"labels names {name!r}, which is no column of {file}{nearest(name, there)}")
    if not names or len(set(names)) < len(names):
        raise InputError(f"labels expects a list of different labels, got {given!r}: name each one once")
    return names
