"""Data of the shortcut study: the phantom with organs on some cases only, with poor masks, or given as an input.

Not a recipe. Only the training and validation cases change; every test is scored with the exact organs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from monai.data import DataLoader
from monai.transforms import BoundingRect
from scipy.ndimage import grey_dilation
from torch import Tensor
from torch.utils.data import Dataset

from camtrain import OrganTable
from camtrain.data import PhantomDataModule

Case = dict[str, Any]
Change = Callable[[Case, int], Case]


class Changed(Dataset[Case]):
    """The cases of another data set, each changed on the way."""

    def __init__(self, cases: Dataset[Case], changes: list[Change]) -> None:
        self.cases, self.changes = cases, changes

    def __len__(self) -> int:
        return len(self.cases)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Case:
        case = dict(self.cases[index])
        for change in self.changes:
            case = change(case, index)
        return case


class StudyData(pl.LightningDataModule):
    """A phantom whose training cases have organs of this kind, and whose images may carry them.

    Args:
        phantom: The data module with exact organs, or with holes.
        organs_share: Share of the training cases that have organs at all.
        masks: A key of `MASKS`; `exact` and `holes` are the phantom's own.
        inputs: What the network gets: `image`, `masked` (air outside all organs that any label needs) or `with_organs`
            (the organs as a second channel, for a head that pools over them).
    """

    def __init__(
        self, phantom: PhantomDataModule, organs_share: float = 1.0, masks: str = "exact", inputs: str = "image"
    ) -> None:
        super().__init__()
        self.phantom, self.labels, self.table = phantom, phantom.labels, phantom.table
        self.test_splits = phantom.test_splits
        self._inputs: list[Change] = {
            "image": [],
            "masked": [partial(masked_image, table=self.table)],
            "with_organs": [image_with_organs],
        }[inputs]
        self._training = [*MASKS[masks], partial(some_organs, share=organs_share)]

    def train_dataloader(self) -> DataLoader:
        """Training cases in the phantom's own order."""
        return self._like(self.phantom.train_dataloader(), self._training)

    def val_dataloader(self) -> DataLoader:
        """Validation cases; thresholds are chosen on them, with exact organs."""
        return self._like(self.phantom.val_dataloader(), [])

    def test_dataloader(self) -> list[DataLoader]:
        """Test splits."""
        return [self._like(loader, []) for loader in self.phantom.test_dataloader()]

    def _like(self, loader: DataLoader, changes: list[Change]) -> DataLoader:
        cases = Changed(loader.dataset, [*changes, *self._inputs])
        return DataLoader(cases, batch_size=loader.batch_size, sampler=loader.sampler, num_workers=0)


def some_organs(case: Case, index: int, share: float) -> Case:
    """Organs on every k-th case only."""
    # Fractions of a step add up: of 500 cases, 1 % are the five whose running share passes a whole number.
    if int((index + 1) * share) > int(index * share):
        return case
    return case | {"organs": torch.zeros_like(case["organs"]), "has_organs": torch.tensor(False)}


def masked_image(case: Case, index: int, table: OrganTable) -> Case:
    """Air outside the organs that any label may be read from."""
    allowed = table.allowed(case["organs"][None])[0].any(dim=0)
    return case | {"image": torch.where(allowed, case["image"], 0.0)}


def image_with_organs(case: Case, index: int) -> Case:
    """Organ ids as a second channel of the image."""
    return case | {"image": torch.cat([case["image"], case["organs"].to(case["image"])])}


def dilated(case: Case, index: int) -> Case:
    """Every organ two voxels larger, into what was background."""
    organs = case["organs"]
    grown = torch.from_numpy(grey_dilation(organs[0].numpy(), size=(5, 5, 5)))[None].to(organs)
    return case | {"organs": torch.where(organs == 0, grown, organs)}


def shifted(case: Case, index: int) -> Case:
    """Masks two voxels off along each axis, in a direction of the case's own."""
    signs = [1 if (index >> bit) & 1 else -1 for bit in range(3)]
    return case | {"organs": torch.roll(case["organs"], [2 * s for s in signs], dims=[1, 2, 3])}


def boxes(case: Case, index: int) -> Case:
    """Bounding boxes instead of organs; smaller ones lie over larger ones."""
    organs = case["organs"]
    ids = sorted(organs.unique().tolist(), key=lambda i: -int((organs == i).sum()))
    made = torch.zeros_like(organs)
    for i in filter(None, ids):
        low_high = BoundingRect()((organs == i).float())[0].tolist()
        place = tuple(slice(int(low_high[2 * a]), int(low_high[2 * a + 1])) for a in range(3))
        made[(0, *place)] = i
    return case | {"organs": made}


def one_site(case: Case, index: int) -> Case:
    """Half of the cases come from a site with another scanner (darker, noisier) and without organs."""
    if index % 2 == 0:
        return case
    noise = torch.randn(case["image"].shape, generator=torch.Generator().manual_seed(index))
    image: Tensor = (0.85 * case["image"] + 0.03 * noise).clamp(0, 1)
    return case | {"image": image, "organs": torch.zeros_like(case["organs"]), "has_organs": torch.tensor(False)}


MASKS: dict[str, list[Change]] = {
    "exact": [],
    "holes": [],
    "dilated": [dilated],
    "shifted": [shifted],
    "boxes": [boxes],
    "one_site": [one_site],
}
