"""`PascalVOCDataModule`: photographs with objects of twenty classes, and the pixels of each, as 2D batches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from monai.data import DataLoader
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from camtrain._errors import InputError, nearest
from camtrain._lightning import LightningDataModule
from camtrain.anatomy.organ_table import OrganTable
from camtrain.data._loaders import at_least, seeded_loader
from camtrain.data.voc_files import CLASSES, VOID, Picture, read_picture, read_split

Resize = Literal["letterbox", "squash"]
_MEMORY = 2 * 2**30


class PascalVOCDataModule(LightningDataModule):
    """Pictures of a PASCAL VOC tree, with "organs" that are the pixels of each class.

    A label is 1 where the annotation has an object of the class, 0 where it has none, and NaN (unknown) where all of
    them are marked difficult. In the organs an id is a class (VOC's ids, 1 to 20) or void (255: borders, and objects
    that were left out); each label may be read from the pixels of its own class. Pictures without a mask file, which
    are most of VOC, have `has_organs` False.

    Batches hold `image` (B, 3, H, W) float32 in 0..1, `label` (B, L) float32, `organs` (B, 1, H, W) int32,
    `has_organs` (B,) bool and `id`. Resized pictures are kept in memory up to 2 GiB a split.

    Args:
        root: Folder with JPEGImages, Annotations, ImageSets and (for masks) SegmentationClass, for the original
            `VOCdevkit/VOC2012`; `make_voc_tree` writes a small one.
        size: Height and width of the images, or one number.
        resize: `"letterbox"` keeps the proportions and fills up with black and background, `"squash"` does not.
        labels: Classes, in the order of the outputs; None = those of VOC's 20 that occur in the training pictures.
        batch_size: Pictures per batch.
        num_workers: Worker processes of each loader.
        image_set: `"Segmentation"` (pictures with masks) or `"Main"` (all pictures): where the lists are taken from.
        train: List of the training pictures.
        val: List of the validation pictures.
        test_splits: Lists of the test pictures, one loader each. VOC keeps the truths of its own test set back, so
            its validation pictures stand here.
        seed: Order of the training pictures.

    Attributes:
        labels: Label names.
        table: `OrganTable` in which each label has its own class.

    Raises:
        InputError: The tree, a file of it or an argument is not as described; the message names the file.

    Example:
        >>> import tempfile
        >>> from camtrain.data import PascalVOCDataModule, make_voc_tree
        >>> root = make_voc_tree(tempfile.mkdtemp(), train=4, val=2, test=0, size=32)
        >>> data = PascalVOCDataModule(root, size=32, labels=["cat", "car"], batch_size=2)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["image"].shape, batch["organs"].shape, data.table.labels
        (torch.Size([2, 3, 32, 32]), torch.Size([2, 1, 32, 32]), ['cat', 'car'])
    """

    labels: list[str]
    table: OrganTable

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int | tuple[int, int] = 224,
        resize: Resize = "letterbox",
        labels: Sequence[str] | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        image_set: Literal["Segmentation", "Main"] = "Segmentation",
        train: str = "train",
        val: str = "val",
        test_splits: Sequence[str] = ("val",),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if image_set not in ("Segmentation", "Main"):
            raise InputError(f"image_set expects 'Segmentation' or 'Main', got {image_set!r}")
        at_least(1, batch_size=batch_size)
        at_least(0, num_workers=num_workers)
        self.root, self.image_set = Path(root), image_set
        self.size = _height_width(size)
        if resize not in ("letterbox", "squash"):
            raise InputError(f"resize expects 'letterbox' or 'squash', got {resize!r}")
        self.resize: Resize = resize
        self.batch_size, self.num_workers, self._seed = batch_size, num_workers, seed
        self.train, self.val = train, val
        self.test_splits = [test_splits] if isinstance(test_splits, str) else list(test_splits)
        self._splits: dict[str, VOCPictures] = {}
        pictures = read_split(self.root, image_set, train)
        self.labels = _labels(labels, pictures, self.root)
        self.table = OrganTable(
            organs={name: number for number, name in enumerate(CLASSES, 1)} | {"void": VOID},
            labels={name: [name] for name in self.labels},
        )
        self._splits[train] = VOCPictures(pictures, self.labels, self.size, self.resize)
        # Plain values only, so that a checkpoint opens with weights_only and rebuilds this module.
        self.save_hyperparameters(
            {
                "root": str(self.root.absolute()),
                "size": list(self.size),
                "resize": resize,
                "labels": self.labels,
                "batch_size": batch_size,
                "num_workers": num_workers,
                "image_set": image_set,
                "train": train,
                "val": val,
                "test_splits": self.test_splits,
                "seed": seed,
            },
            logger=False,
        )

    def setup(self, stage: str) -> None:
        """Read the lists and annotations that this stage needs.

        Args:
            stage: fit, validate, test or predict.

        Raises:
            InputError: A list, picture or annotation is missing or damaged.
        """
        for split in {"fit": [self.train, self.val], "validate": [self.val]}.get(stage, self.test_splits):
            self._split(split)

    def train_dataloader(self) -> DataLoader:
        """Shuffled training pictures."""
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Validation pictures in the order of their list."""
        return self._loader(self.val)

    def test_dataloader(self) -> list[DataLoader]:
        """One loader per name in `test_splits`."""
        return [self._loader(split) for split in self.test_splits]

    def _split(self, name: str) -> VOCPictures:
        if name not in self._splits:
            pictures = read_split(self.root, self.image_set, name)
            self._splits[name] = VOCPictures(pictures, self.labels, self.size, self.resize)
        return self._splits[name]

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader:
        return seeded_loader(
            self._split(split), self.batch_size, self.num_workers, self._seed, shuffle, lambda: self.trainer
        )


class _Kept(NamedTuple):
    image: Tensor
    organs: Tensor


class VOCPictures(Dataset[dict[str, Any]]):
    """The pictures of one split, read and resized when first asked for and then kept in memory.

    Args:
        pictures: From `read_split`.
        labels: Label names.
        size: Height and width.
        resize: `"letterbox"` or `"squash"`.
        memory: Bytes that kept pictures may take; a split that needs more is read anew on every access.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        labels: Sequence[str],
        size: tuple[int, int],
        resize: Resize = "letterbox",
        memory: int = _MEMORY,
    ) -> None:
        self.pictures, self.labels, self.size, self.resize = list(pictures), list(labels), size, resize
        self._keep = 4 * size[0] * size[1] * len(self.pictures) <= memory
        self._kept: dict[int, _Kept] = {}

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One picture in the words of the batch contract."""
        picture = self.pictures[index]
        kept = self._kept.get(index) or self._read(index)
        return {
            "image": kept.image.float() / 255,
            "label": torch.tensor(picture.label(self.labels), dtype=torch.float32),
            "organs": kept.organs.int(),
            "has_organs": torch.tensor(picture.mask is not None),
            "id": picture.id,
        }

    def _read(self, index: int) -> _Kept:
        image, mask = read_picture(self.pictures[index])
        pixels = fit_into(image, self.size, self.resize, Image.Resampling.BILINEAR)
        ids = (
            np.zeros(self.size, dtype=np.uint8)
            if mask is None
            else fit_into(mask, self.size, self.resize, Image.Resampling.NEAREST)
        )
        kept = _Kept(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), torch.from_numpy(ids)[None])
        if self._keep:
            self._kept[index] = kept
        return kept


def fit_into(picture: Image.Image, size: tuple[int, int], resize: Resize, sampling: Image.Resampling) -> Any:
    """Bring a picture or mask to a size.

    Args:
        picture: Of any size.
        size: Height and width wanted.
        resize: `"letterbox"` keeps the proportions, centres, and fills up with 0; `"squash"` does not keep them.
        sampling: Pillow's rule: bilinear (which averages when it reduces) for pictures, nearest for masks.

    Returns:
        (H, W) or (H, W, 3) uint8, an array of its own.

    Example:
        >>> fit_into(Image.new("L", (40, 20), 7), (4, 4), "letterbox", Image.Resampling.NEAREST).tolist()
        [[0, 0, 0, 0], [7, 7, 7, 7], [7, 7, 7, 7], [0, 0, 0, 0]]
    """
    height, width = size
    if resize == "squash":
        return np.array(picture.resize((width, height), sampling))
    scale = min(height / picture.height, width / picture.width)
    inner = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    framed = Image.new(picture.mode, (width, height))
    framed.paste(picture.resize(inner, sampling), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return np.array(framed)


def _labels(labels: Sequence[str] | None, pictures: Sequence[Picture], root: Path) -> list[str]:
    found = {name for picture in pictures for name in picture.objects}
    if labels is None:
        names = [name for name in CLASSES if name in found]
        if not names:
            raise InputError(
                f"{root}: expected objects of VOC's classes in the training pictures, got "
                f"{', '.join(sorted(found)) or 'none'}: name the classes as VOC does ({', '.join(CLASSES)})"
            )
        return names
    for name in labels:
        if name not in CLASSES:
            raise InputError(f"labels names {name!r}, which is no class of PASCAL VOC{nearest(name, CLASSES)}")
    if not labels or len(set(labels)) < len(labels) or isinstance(labels, str):
        raise InputError(f"labels expects a list of different classes, got {labels!r}: name each one once")
    return list(labels)


def _height_width(size: int | Sequence[int]) -> tuple[int, int]:
    sizes = [size, size] if isinstance(size, int) else list(size)
    if len(sizes) != 2 or any(int(n) != n or n < 1 for n in sizes):
        raise InputError(f"size expects one whole number of pixels or two (height, width), got {size!r}")
    return int(sizes[0]), int(sizes[1])
