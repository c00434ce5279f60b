"""The phantom as a Lightning data module: training, validation, and four tests that tell cheating from reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.data import DataLoader

from camtrain._lightning import LightningDataModule
from camtrain.anatomy.organ_table import OrganTable
from camtrain.data._loaders import at_least, cases_by_split, seeded_loader
from camtrain.data.phantom import DEFAULT_SIZE, LABELS, SHIFTS, Phantom, one_of
from camtrain.data.phantom_dataset import PhantomDataset

_TESTS = ("test", *SHIFTS)


class PhantomDataModule(LightningDataModule):
    """Chest phantoms with planted shortcuts.

    Each label may have a marker outside the organs that goes with it by chance. The test splits hold the same cases
    under four rules for the markers: `test` as in training, `shift_free` without markers, `shift_random` with
    markers that mean nothing, `shift_reversed` with markers that say the opposite as often as they said the truth.
    A model that reads the organs scores the same on all four.

    Batches hold `image` (B, 1, X, Y, Z) float32 in 0..1, `label` (B, L) float32, `organs` (B, 1, X, Y, Z) uint8,
    `has_organs` (B,), `id`, `affine` (B, 4, 4); in validation and test also `lesions` (B, L, X, Y, Z) bool, for
    scoring. All volumes are in RAS order. Cases are made once, on first use, and kept in memory up to 2 GiB a split.

    Args:
        labels: Findings, in the order of the label columns; None = all eight of `camtrain.data.phantom.LABELS`.
        cases: Number of training cases.
        size: Voxels per axis (right, front, up), or one number for a cube; the scan is 320 x 240 x 300 mm at any size.
        shortcut: Probability that a marker agrees with its label, in training, validation and test; 0.5 = markers
            that mean nothing; None = no markers.
        shortcut_at: `skin` (outside the organs), `other_organ` (in an organ of other labels), `own_organ`.
        cooccurrence: Share of a common cause in the findings, 0 = independent.
        organs: `exact`, or `holes`: the lesions are missing from the organs, in every split.
        prevalence: Share of cases with each finding.
        seed: Population and order of the training cases.
        batch_size: Cases per batch.
        num_workers: Worker processes of each loader; the cases are then made before the workers start.
        test_splits: Test loaders, in this order.
        val_cases: Number of validation cases; None = a quarter of `cases`.
        test_cases: Number of cases in each test split; None = a quarter of `cases`.

    Attributes:
        labels: Label names.
        table: Which organs each label may be read from.
        test_splits: Names of the test loaders.

    Raises:
        InputError: An argument is out of range or a name is unknown.

    Example:
        >>> data = PhantomDataModule(labels=["nodule", "effusion"], cases=4, size=24, batch_size=2)
        >>> data.setup("fit")
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["image"].shape, batch["label"].shape, data.table.labels
        (torch.Size([2, 1, 24, 24, 24]), torch.Size([2, 2]), ['nodule', 'effusion'])
    """

    def __init__(
        self,
        labels: Sequence[str] | None = None,
        cases: int = 800,
        size: int | tuple[int, int, int] = DEFAULT_SIZE,
        shortcut: float | None = 0.95,
        shortcut_at: str = "skin",
        cooccurrence: float = 0.0,
        organs: str = "exact",
        prevalence: float = 0.4,
        seed: int = 0,
        batch_size: int = 16,
        num_workers: int = 0,
        test_splits: Sequence[str] = _TESTS,
        val_cases: int | None = None,
        test_cases: int | None = None,
    ) -> None:
        super().__init__()
        # Lightning stops when model and data module log one name with different values (labels).
        self.save_hyperparameters(logger=False)
        at_least(1, cases=cases, batch_size=batch_size, val_cases=val_cases, test_cases=test_cases)
        at_least(0, num_workers=num_workers)
        for split in test_splits:
            one_of("test_splits", split, _TESTS)
        self.labels: list[str] = list(LABELS if labels is None else labels)
        self.test_splits: list[str] = list(test_splits)
        self.phantom = Phantom(
            labels=tuple(self.labels),
            size=(size, size, size) if isinstance(size, int) else size,
            shortcut=shortcut,
            shortcut_at=shortcut_at,
            cooccurrence=cooccurrence,
            organs=organs,
            prevalence=prevalence,
            seed=seed,
        )
        self.table = OrganTable.load("phantom").select(self.labels)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._seed = seed
        counts = cases_by_split(cases, val_cases, test_cases, _TESTS)
        scans: dict[int, Any] = {}  # the test splits hold the same people under other markers
        self._sets = {
            s: PhantomDataset(self.phantom, s, n, lesions=s != "train", scans=scans if s in _TESTS else None)
            for s, n in counts.items()
        }

    def train_dataloader(self) -> DataLoader:
        """Shuffled training cases, without lesion masks."""
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
