"""Simulated subtomograms as a Lightning data module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader
from torch import Tensor
from torch.utils.data import Dataset

from camtrain._errors import InputError
from camtrain._lightning import LightningDataModule
from camtrain.anatomy.organ_table import OrganTable
from camtrain.data._loaders import at_least, cases_by_split, seeded_loader
from camtrain.data.cryoet import CLASSES, CryoET
from camtrain.data.cryoet_optics import Optics

MEMORY = 2 * 2**30
"""Bytes that the kept cases of one split may take; a split that needs more is made anew on every access."""
_TESTS = ("test", "noise_free")


class CryoETDataset(Dataset[dict[str, Any]]):
    """The cases of one split, made when first asked for and kept in memory.

    Args:
        simulation: What the cases have in common.
        split: One of `camtrain.data.cryoet.SPLITS`.
        cases: How many.
        margin: What lies up to this many nm from the particle belongs to it in `organs`.
        truth: Add the particle itself, for scoring; never in training.

    Example:
        >>> case = CryoETDataset(CryoET(classes=("rod", "torus")), "test", cases=4, truth=True)[1]
        >>> case["label"].tolist(), case["image"].shape, bool((case["organs"][case["particle"]] == 1).all())
        ([0.0, 1.0], torch.Size([1, 24, 24, 24]), True)
    """

    def __init__(self, simulation: CryoET, split: str, cases: int, margin: float = 2.0, truth: bool = False) -> None:
        self.simulation = simulation
        self.split = split
        self.cases = cases
        self.margin = margin
        self.truth = truth
        # Half precision keeps three digits, far below the noise; the masks take two bytes.
        self._keep = math.prod(simulation.size) * cases * 4 <= MEMORY
        self._kept: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        """Number of cases."""
        return self.cases

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One case in the words of the batch contract."""
        if not 0 <= index < self.cases:
            raise IndexError(f"case {index} of {self.cases}")
        case = self._kept.get(index) or self._make(index)
        return {**case, "image": case["image"].float()}

    def make_all(self) -> None:
        """Make every case now, so that worker processes inherit them instead of each making its own."""
        for index in range(self.cases) if self._keep else ():
            if index not in self._kept:
                self._make(index)

    def _make(self, index: int) -> dict[str, Any]:
        case = self.simulation.case(self.split, index)
        made: dict[str, Any] = {
            "image": torch.from_numpy(case.image.astype(np.float16))[None],
            "label": torch.tensor([float(name == case.label) for name in self.simulation.classes]),
            "organs": torch.from_numpy((case.distance < self.margin).astype(np.uint8))[None],
            "has_organs": torch.tensor(True),
            "id": case.id,
        }
        if self.truth:
            made["particle"] = torch.from_numpy(case.particle)[None]
        if self._keep:
            self._kept[index] = made
        return made


class CryoETDataModule(LightningDataModule):
    """Simulated subtomograms: one particle in each volume, and the question which of the classes it is.

    Classes exclude one another, so train with a cross-entropy over them:
    `LitClassifier(net, data.labels, loss=torch.nn.CrossEntropyLoss())`. Classes take turns and are equally frequent.

    Batches hold `image` (B, 1, X, Y, Z) float32 with mean 0 and standard deviation 1, `label` (B, L) float32 with one 1
    in each row, `organs` (B, 1, X, Y, Z) uint8 with 1 on the particle and its margin, `has_organs` (B,), `id`; in
    validation and test also `particle` (B, 1, X, Y, Z) bool, for scoring. There is no `affine`: a particle has no
    left and right. Cases are made once, on first use, and kept in memory up to 2 GiB a split.

    Args:
        classes: Names out of `camtrain.data.cryoet.CLASSES`, in the order of the label columns; None = all ten.
        size: Voxels per axis, or one number for a cube. The volume must be 20 nm wide.
        snr: Variance of the signal over that of the noise; None = no noise.
        tilt: Largest tilt in degrees: what is missing is a wedge of 90 - tilt to either side; 90 = complete.
        defocus: In micrometres, negative = dense matter is bright; None = no contrast transfer function.
        voxel: Edge of a voxel in nm.
        margin: What lies up to this many nm from the particle belongs to it in `organs`: contrast transfer moves a
            part of the evidence into a halo around the particle.
        cases: Number of training cases.
        seed: Particles, noise and order of the training cases.
        batch_size: Cases per batch.
        num_workers: Worker processes of each loader; the cases are then made before the workers start.
        test_splits: Test loaders, in this order: `test`, and `noise_free` with the same particles without noise.
        val_cases: Number of validation cases; None = a quarter of `cases`.
        test_cases: Number of cases in each test split; None = a quarter of `cases`.

    Attributes:
        labels: Class names.
        table: Every class is read from the particle.
        test_splits: Names of the test loaders.

    Raises:
        InputError: An argument is out of range or a name is unknown.

    Example:
        >>> data = CryoETDataModule(classes=["rod", "torus", "shell"], cases=4, snr=0.1, batch_size=2)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["image"].shape, batch["label"].sum(dim=1).tolist(), data.table.labels
        (torch.Size([2, 1, 24, 24, 24]), [1.0, 1.0], ['rod', 'torus', 'shell'])
    """

    def __init__(
        self,
        classes: Sequence[str] | None = None,
        size: int | tuple[int, int, int] = 24,
        snr: float | None = None,
        tilt: float = 60.0,
        defocus: float | None = -5.0,
        voxel: float = 1.0,
        margin: float = 2.0,
        cases: int = 1000,
        seed: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
        test_splits: Sequence[str] = ("test",),
        val_cases: int | None = None,
        test_cases: int | None = None,
    ) -> None:
        super().__init__()
        # Lightning stops when model and data module log one name with different values.
        self.save_hyperparameters(logger=False)
        at_least(1, cases=cases, batch_size=batch_size, val_cases=val_cases, test_cases=test_cases)
        at_least(0, num_workers=num_workers, margin=margin)
        if unknown := [name for name in test_splits if name not in _TESTS]:
            raise InputError(f"test_splits expects names out of {', '.join(_TESTS)}, got {unknown[0]!r}")
        self.labels: list[str] = list(CLASSES if classes is None else classes)
        self.test_splits: list[str] = list(test_splits)
        self.simulation = CryoET(
            classes=tuple(self.labels),
            size=(size, size, size) if isinstance(size, int) else size,
            optics=Optics(snr=snr, tilt=tilt, defocus=defocus, voxel=voxel),
            seed=seed,
        )
        self.table = OrganTable(organs={"particle": 1}, labels={name: ["particle"] for name in self.labels})
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._seed = seed
        counts = cases_by_split(cases, val_cases, test_cases, _TESTS)
        self._sets = {s: CryoETDataset(self.simulation, s, n, margin, truth=s != "train") for s, n in counts.items()}

    def train_dataloader(self) -> DataLoader:
        """Shuffled training cases, without the particle's own mask."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Validation cases in order."""
        return self._loader("val")

    def test_dataloader(self) -> list[DataLoader]:
        """One loader per name in `test_splits`."""
        return [self._loader(split) for split in self.test_splits]

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader:
        return seeded_loader(
            self._sets[split], self.batch_size, self.num_workers, self._seed, shuffle, lambda: self.trainer
        )


def particles(batch: dict[str, Any]) -> Tensor:
    """Where each label's particle is, (B, L, X, Y, Z) bool: the mask in the column of its class, nothing elsewhere.

    Args:
        batch: A validation or test batch.

    Example:
        >>> batch = next(iter(CryoETDataModule(cases=4).val_dataloader()))
        >>> particles(batch).flatten(2).any(dim=2).int().sum(dim=1).tolist()
        [1]
    """
    label, inside = batch["label"].bool(), batch["particle"]
    where: Tensor = inside & label.reshape(*label.shape, *(1,) * (inside.ndim - 2))
    return where
