"""`RadChestCTDataModule`: the published chest CTs of Duke with their findings by place, read as their authors did."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.data import DataLoader
from torch.utils.data import Sampler

from camtrain._errors import InputError, nearest
from camtrain._lightning import LightningDataModule
from camtrain.anatomy.organ_table import OrganTable
from camtrain.anatomy.partition import BORDERS, LEAST, partition_files
from camtrain.data._loaders import train_sampler
from camtrain.data.exact_loader import ExactLoader
from camtrain.data.organ_reporting import OrganReport, organ_report, report_and_warn
from camtrain.data.rad_chestct_dataset import Centre, Preparation, RadChestCTScans, organ_file
from camtrain.data.rad_chestct_files import (
    SPLITS,
    find_beside,
    find_scans,
    find_table,
    has_table,
    read_boxes,
    read_header,
    read_patients,
    read_scan,
    read_table,
)
from camtrain.data.rad_chestct_labels import LabelSet, Sides, columns_of, make_truths
from camtrain.data.rad_chestct_transforms import Box, Size

TableSource = Any  # as in ManifestDataModule: a union makes jsonargparse open the file itself
TABLES = {"located": "rad_chestct", "plain": "rad_chestct_plain"}

_log = logging.getLogger(__name__)


class RadChestCTDataModule(LightningDataModule):
    """RAD-ChestCT in its published layout, prepared as Draelos and Carin did for AxialNet and the mask loss.

    A volume is cropped and padded (with its lowest value) to `size`, its HU window is brought to [0, 1], and 0.449 is
    taken off; in training it is flipped and turned with its organs. Axes stay those of the files: downwards, back, left
    (AxialNet: `slice_axis: 0`); `affine` says so to pictures and to written maps.

    Labels are the authors' 80, each a finding in a place, in the order of the shipped table `rad_chestct`. Organs are
    the lungs of their unsupervised partition, one file per scan, with what lies between as heart. For a lung label a
    batch says in `allowed_organs` which lung the report names, so that the mask loss allows that side only.

    Batches hold `image` (B, 1, *S) float32, `label` (B, L) float32 with NaN = unknown, `organs` (B, 1, *S) uint8,
    `has_organs` (B,) bool, `allowed_organs` (B, L, O) bool (located labels only), `id`, `patient` (empty = unknown),
    `affine` (B, 4, 4).

    Args:
        root: Folder with the volumes `<id>.npz`, for the original the unpacked download.
        tables: Folder with the CSV files; None = `root`.
        organs: Folder with one file per scan: `<id>_seg.npz` (lungs, key `segmap`), or `<id>_organs.npz` (ids of the
            table, key `organs`, from any segmenter, on the grid of the scan). None = no scan has organs.
        make_organs: Make lungs that are missing in that folder before training, with `num_workers` processes; for
            25,000 scans that is a day of several cores. Goes on where it stopped.
        label_set: `"located"`: the 80 labels; `"plain"`: 84 findings, wherever they are.
        labels: Some of them, in the order of the outputs; None = all of the table that the CSV files have.
        table: Which organs each label may be read from; None = the shipped table of the label set.
        sides: `"reported"`: a lung label may be read from the lung(s) that the report names. `"authors"`: as their
            program does it, a finding that only lungs have may be read from both.
        size: Voxels: down, back, left.
        centre: Crop around the middle of the volume, or around the lungs (from the extrema's table, or the organs).
        window: HU that become 0 and 1.
        subtract: Taken off the image then.
        lung_borders: A right border of the lungs beyond the first column, or a left one before the second, says that a
            lung is missing; None = only lungs that are not there at all are bad.
        fallback: Where the segmentation is bad: `"rough"` regions (thirds of the volume), or `"none"`: no organs.
        least_voxels: Smallest component of lung that `make_organs` keeps.
        augment: Flip and turn training volumes.
        batch_size: Cases per batch; the authors' is 1.
        num_workers: Worker processes of each loader.
        organ_share: Part of each training batch that has organs, see `OrganShareSampler`; None = as it comes.
        test_splits: Out of train, val, test; one loader each.
        seed: Order of the training cases.

    Attributes:
        labels: Label names.
        table: `OrganTable`, cut to these labels.

    Raises:
        InputError: The folder, a table, a file of it or an argument is not as described; the message names the file.

    Example:
        >>> import tempfile
        >>> from camtrain.data import RadChestCTDataModule, make_rad_chestct_tree
        >>> root = make_rad_chestct_tree(tempfile.mkdtemp(), train=2, val=1, test=1, size=(20, 24, 24))
        >>> data = RadChestCTDataModule(root, size=(18, 26, 26), labels=["heart_cardiomegaly", "lung_nodule"])
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["image"].shape, batch["allowed_organs"].shape, data.table.labels
        (torch.Size([1, 1, 18, 26, 26]), torch.Size([1, 2, 5]), ['heart_cardiomegaly', 'lung_nodule'])
    """

    labels: list[str]
    table: OrganTable

    def __init__(
        self,
        root: str | os.PathLike[str],
        tables: str | os.PathLike[str] | None = None,
        organs: str | os.PathLike[str] | None = None,
        make_organs: bool = False,
        label_set: LabelSet = "located",
        labels: Sequence[str] | None = None,
        table: TableSource = None,
        sides: Sides = "reported",
        size: int | Sequence[int] = (405, 420, 420),
        centre: Centre = "volume",
        window: Sequence[float] = (-1000.0, 800.0),
        subtract: float = 0.449,
        lung_borders: Sequence[int] | None = BORDERS,
        fallback: Literal["rough", "none"] = "rough",
        least_voxels: int = LEAST,
        augment: bool = True,
        batch_size: int = 1,
        num_workers: int = 0,
        organ_share: float | None = None,
        test_splits: Sequence[str] = ("test",),
        seed: int = 0,
    ) -> None:
        super().__init__()
        _one_of("label_set", label_set, TABLES)
        _one_of("sides", sides, ("reported", "authors"))
        _one_of("centre", centre, ("volume", "lungs"))
        _one_of("fallback", fallback, ("rough", "none"))
        self.test_splits = [test_splits] if isinstance(test_splits, str) else list(test_splits)
        for split in self.test_splits:
            _one_of("test_splits", split, SPLITS)
        if batch_size < 1 or num_workers < 0 or least_voxels < 1:
            raise InputError(
                "expected batch_size and least_voxels from 1 and num_workers from 0 on, got "
                f"{batch_size}, {least_voxels}, {num_workers}"
            )
        if make_organs and organs is None:
            raise InputError("make_organs: true needs a folder to write to: set organs= to one of your choice")
        self.root, self.tables = Path(root), Path(root if tables is None else tables)
        self.organs = None if organs is None else Path(organs)
        self.make_organs, self.least_voxels, self.augment = make_organs, least_voxels, augment
        self.label_set, self.sides = label_set, sides
        self.batch_size, self.num_workers, self._seed = batch_size, num_workers, seed
        self.organ_share = organ_share
        self.preparation = Preparation(
            size=_size(size),
            centre=centre,
            window=_pair("window", window, float),
            subtract=float(subtract),
            borders=None if lung_borders is None else _pair("lung_borders", lung_borders, int),
            rough=fallback == "rough",
        )
        self.scans = find_scans(self.root)
        whole = OrganTable.load(TABLES[label_set] if table is None else table)
        self.labels = _labels(labels, whole, label_set, find_table(self.tables, "train"))
        self.table = whole.select(self.labels)
        self._splits: dict[str, RadChestCTScans] = {}
        self._patients: dict[str, str] | None = None
        self._boxes: dict[str, Box] | None = None
        # Plain values only, so that a checkpoint opens with weights_only and rebuilds this module.
        self.save_hyperparameters(
            {
                "root": str(self.root.absolute()),
                "tables": str(self.tables.absolute()),
                "organs": None if self.organs is None else str(self.organs.absolute()),
                "make_organs": make_organs,
                "label_set": label_set,
                "labels": self.labels,
                "table": self.table.to_dict(),
                "sides": sides,
                "size": list(self.preparation.size),
                "centre": centre,
                "window": list(self.preparation.window),
                "subtract": self.preparation.subtract,
                "lung_borders": None if lung_borders is None else [int(n) for n in lung_borders],
                "fallback": fallback,
                "least_voxels": least_voxels,
                "augment": augment,
                "batch_size": batch_size,
                "num_workers": num_workers,
                "organ_share": organ_share,
                "test_splits": self.test_splits,
                "seed": seed,
            },
            logger=False,
        )

    def prepare_data(self) -> None:
        """Make the lungs that are missing, if `make_organs` asks for it."""
        if not self.make_organs or self.organs is None:
            return
        # Who only trains may do without the table of a test split.
        splits = dict.fromkeys(["train", "val", *(s for s in self.test_splits if has_table(self.tables, s))])
        ids = [name for split in splits for name in self._ids(split)]
        missing = {name: self.scans[name] for name in ids if organ_file(self.organs, name) is None}
        failed = partition_files(missing, self.organs, read_scan, max(1, self.num_workers), self.least_voxels)
        if failed:
            name, problem = next(iter(failed.items()))
            _log.warning("%d scans could not be segmented, the first is %s: %s", len(failed), name, problem)

    def setup(self, stage: str) -> None:
        """Read the tables that this stage needs.

        Args:
            stage: fit, validate, test or predict.

        Raises:
            InputError: A table is missing or wrong, or none of its cases has a volume.
        """
        for split in {"fit": ["train", "val"], "validate": ["val"]}.get(stage, self.test_splits):
            self._split(split)
        if stage == "fit" and self.organs is not None:
            report_and_warn(self.organ_report(["train", "val"]), str(self.organs))

    def organ_report(self, splits: Sequence[str] = tuple(SPLITS)) -> OrganReport:
        """Who has organs, by label and split, and whether having them predicts a label.

        Args:
            splits: Out of train, val, test.
        """
        read = {split: self._split(split) for split in splits}
        return organ_report(
            self.labels,
            np.concatenate([scans.truths.label for scans in read.values()]),
            [file is not None for scans in read.values() for file in scans.organs],
            [split for split, scans in read.items() for _ in scans.ids],
            [patient for scans in read.values() for patient in scans.patients],
        )

    def train_dataloader(self) -> DataLoader:
        """Shuffled training cases, flipped and turned."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Validation cases in the order of their table."""
        return self._loader("val")

    def test_dataloader(self) -> list[DataLoader]:
        """One loader per name in `test_splits`."""
        return [self._loader(split) for split in self.test_splits]

    def _ids(self, split: str) -> list[str]:
        return read_table(find_table(self.tables, split), lambda header: (), self.scans).ids

    def _split(self, name: str) -> RadChestCTScans:
        if name not in self._splits:
            self._splits[name] = self._read(name)
        return self._splits[name]

    def _read(self, split: str) -> RadChestCTScans:
        file = find_table(self.tables, split)
        read = read_table(file, self._columns, self.scans)
        if not read.ids:
            raise InputError(
                f"{file}: expected at least one case with a volume in {self.root}, got none of {read.rows}: is "
                "root= the folder with the files of this split?"
            )
        _log.info("%s: %d of %d cases have a volume", file.name, len(read.ids), read.rows)
        patients = self._patients_of(split, read.ids)
        truths = make_truths(read.columns, self.labels, self.label_set, self.sides)
        files = [None if self.organs is None else organ_file(self.organs, name) for name in read.ids]
        if self.organs is not None and not any(files):
            raise InputError(
                f"{self.organs}: expected <id>_seg.npz or <id>_organs.npz for cases of the split {split!r}, got none: "
                "set make_organs: true, or leave organs= out to train without"
            )
        _log.info("%s: %d of %d cases have organs", file.name, sum(f is not None for f in files), len(files))
        return RadChestCTScans(
            ids=read.ids,
            scans=[self.scans[name] for name in read.ids],
            organs=files,
            truths=truths,
            table=self.table,
            preparation=self.preparation,
            patients=patients,
            boxes=self._lung_boxes(),
            sided=self.label_set == "located",
            augment=self.augment and split == "train",
        )

    def _columns(self, header: Sequence[str]) -> list[str]:
        return [name for label in self.labels for name in columns_of(label, self.label_set, header)]

    def _patients_of(self, split: str, ids: Sequence[str]) -> list[str]:
        """Patients of the cases, none of whom may be in another split that was read."""
        if self._patients is None:
            file = find_beside(self.tables, "CT_Scan_Metadata*.csv", "all_identifiers.csv")
            self._patients = {} if file is None else read_patients(file, self.scans)
        patients = [self._patients.get(name, "") for name in ids]
        for other, scans in self._splits.items():
            if shared := sorted({*patients} & {*scans.patients} - {""}):
                raise InputError(
                    f"{self.tables}: expected each patient in one split, got {shared[0]!r} in {other!r} and {split!r} "
                    f"({len(shared)} in all): correct the tables of findings"
                )
        return patients

    def _lung_boxes(self) -> Mapping[str, Box]:
        if self._boxes is None:
            asked = self.preparation.centre == "lungs"
            file = find_beside(self.tables, "Extrema_*.csv", "extrema*.csv") if asked else None
            self._boxes = {} if file is None else read_boxes(file, self.scans)
        return self._boxes

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader:
        scans = self._split(split)
        sampler: Sampler[int] | None = None
        if shuffle:
            has_organs = [file is not None for file in scans.organs]
            sampler = train_sampler(scans, has_organs, self.batch_size, self.organ_share, self._seed)
        return ExactLoader(
            scans,
            seed=self._seed if shuffle and self.augment else None,
            trainer=(lambda: self.trainer) if shuffle else None,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # An own generator: MONAI's loader would reset torch's global one, and the order should follow our seed.
            generator=torch.Generator().manual_seed(self._seed),
        )


def _labels(given: Sequence[str] | None, table: OrganTable, label_set: LabelSet, file: Path) -> list[str]:
    header = read_header(file)
    if label_set == "located" and not any("*" in name for name in header):
        raise InputError(
            f"{file}: expected columns finding*place, got findings without places, as in the older tables: set "
            "label_set: plain, or take the tables ..._Abnormality_and_Location_Labels.csv"
        )
    if given is None:
        there = {name.partition("*")[0] for name in header}
        return [name for name in table.labels if label_set == "located" or name in there]
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        if name not in table.labels:
            raise InputError(f"labels names {name!r}, which has no rule in the table{nearest(name, table.labels)}")
    if not names or len(set(names)) < len(names):
        raise InputError(f"labels expects a list of different labels, got {given!r}: name each one once")
    return names


def _one_of(word: str, value: str, known: Any) -> None:
    if value not in known:
        raise InputError(f"{word} expects {', '.join(map(repr, known))}, got {value!r}{nearest(str(value), known)}")


def _size(size: int | Sequence[int]) -> Size:
    sizes = [size] * 3 if isinstance(size, int) else list(size)
    if len(sizes) != 3 or any(int(n) != n or n < 1 for n in sizes):
        raise InputError(f"size expects three whole numbers of voxels (down, back, left), or one, got {size!r}")
    return int(sizes[0]), int(sizes[1]), int(sizes[2])


def _pair(word: str, values: Sequence[float], kind: Any) -> tuple[Any, Any]:
    if len(values) != 2 or not values[0] < values[1]:
        raise InputError(f"{word} expects two growing numbers, got {values!r}")
    return kind(values[0]), kind(values[1])
