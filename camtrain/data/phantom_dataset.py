"""The phantom's cases as a torch dataset that makes each case once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from camtrain.data.phantom import Case, Phantom, to_image, unpack
from camtrain.data.phantom_frame import affine_of

MEMORY = 2 * 2**30
"""Bytes that the kept cases of one split may take by default."""
_NEIGHBOURS, _AT_ONCE = 16, 16 * 48 * 36 * 48
"""Cases, and their voxels, that are made together: so they take less time than between the steps of a network."""


class _Kept(NamedTuple):
    """One case in 3 to 4 bytes per voxel: half precision resolves one Hounsfield unit, below the noise of 22.

    Attributes:
        marker: Places in the flat volume that markers take, where they are not in the image yet.
    """

    id: str
    image: Tensor
    organs: Tensor
    label: Tensor
    lesions: Tensor | None
    marker: Tensor | None = None


class PhantomDataset(Dataset[dict[str, Any]]):
    """The cases of one split, made when first asked for and kept in memory.

    Args:
        phantom: What the cases have in common.
        split: One of `camtrain.data.phantom.SPLITS`.
        cases: How many.
        lesions: Add the lesion masks, for scoring; never in training.
        memory: Bytes that the kept cases may take; a split that needs more is made anew on every access.
        scans: Where splits of the same people (`test` and the shifts) share their scans, each made once; theirs alone.

    Example:
        >>> case = PhantomDataset(Phantom(size=(24, 20, 24)), "train", cases=4)[2]
        >>> case["image"].shape, case["label"].shape, "lesions" in case
        (torch.Size([1, 24, 20, 24]), torch.Size([8]), False)
    """

    def __init__(
        self,
        phantom: Phantom,
        split: str,
        cases: int,
        lesions: bool = False,
        memory: int = MEMORY,
        scans: dict[int, _Kept] | None = None,
    ) -> None:
        self.phantom = phantom
        self.split = split
        self.cases = cases
        self.lesions = lesions
        self._keep = math.prod(phantom.size) * cases * (4 if lesions else 3) <= memory
        self._kept: dict[int, _Kept] = {}
        # Of organs with holes it is not known any more where a marker may lie.
        self._scans = scans if self._keep and phantom.organs == "exact" else None
        self._affine = torch.from_numpy(affine_of(phantom.size))

    def __len__(self) -> int:
        """Number of cases."""
        return self.cases

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One case in the words of the batch contract."""
        if not 0 <= index < self.cases:
            raise IndexError(f"case {index} of {self.cases}")
        case = self._kept.get(index) or self._make(index)
        image = case.image.float()
        if case.marker is not None:
            image.view(-1)[case.marker] = 1.0
        item: dict[str, Any] = {
            "image": image[None],
            "label": case.label,
            "organs": case.organs[None],
            "has_organs": torch.tensor(True),
            "id": case.id,
            "affine": self._affine,
        }
        if case.lesions is not None:
            item["lesions"] = torch.from_numpy(unpack(case.lesions.numpy(), self.phantom.labels))
        return item

    def make_all(self) -> None:
        """Make every case now, so that worker processes inherit them instead of each making its own."""
        for index in range(self.cases) if self._keep else ():
            if index not in self._kept:
                self._make(index)

    def _make(self, index: int) -> _Kept:
        """This case, and where cases are kept those neighbours that are soon asked for as well."""
        if not self._keep:
            return self._converted(self.phantom.case(self.split, index))
        block = max(1, min(_NEIGHBOURS, _AT_ONCE // math.prod(self.phantom.size)))
        first = index - index % block
        missing = [i for i in range(first, min(self.cases, first + block)) if i not in self._kept]
        if self._scans is None:
            made = self.phantom.cases(self.split, missing)
            self._kept.update(zip(missing, map(self._converted, made), strict=True))
        else:
            self._share(missing)
            self._kept.update((i, self._marked(i, self._scans[i])) for i in missing)
        return self._kept[index]

    def _share(self, indices: Sequence[int]) -> None:
        """Make the scans that the splits share, without markers."""
        assert self._scans is not None  # noqa: S101
        missing = [index for index in indices if index not in self._scans]
        bare = self.phantom.cases(self.split, missing, marker=dict.fromkeys(self.phantom.labels, False))
        self._scans.update(zip(missing, map(self._converted, bare), strict=True))

    def _marked(self, index: int, scan: _Kept) -> _Kept:
        """The scan with the markers of this split."""
        marker = torch.from_numpy(self.phantom.marked(self.split, index, scan.organs.numpy()))
        return scan._replace(id=f"{self.split}-{index:05d}", marker=marker)

    def _converted(self, case: Case) -> _Kept:
        return _Kept(
            id=case.id,
            image=torch.from_numpy(to_image(case.hu, out=case.hu)).half(),  # numpy's float16 takes twenty times as long
            organs=torch.from_numpy(case.organs),
            label=torch.from_numpy(case.label),
            lesions=torch.from_numpy(case.lesion_bits) if self.lesions else None,
        )
