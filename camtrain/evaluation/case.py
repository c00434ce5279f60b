"""One case of a user's data, as an evaluation sees it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One case of the data, a batch of one.

    Attributes:
        id: Its name.
        split: Its split.
        patient: Its patient, or None.
        image: (1, C, *S).
        label: (1, L), NaN = unknown.
        organs: (1, 1, *S) integer ids, or None where it was not segmented.
        affine: (1, 4, 4) voxel to world in mm, or None.
        allowed_organs: (1, L, O) bool, what is known of this case (see `OrganTable.allowed`), or None.
    """

    id: str
    split: str
    patient: str | None
    image: Tensor
    label: Tensor
    organs: Tensor | None
    affine: Tensor | None
    allowed_organs: Tensor | None = None

    def checksum(self) -> str:
        """Tells this case from another of the same name: its truth, and some ten thousand voxels of each volume."""
        volumes = (self.image, self.organs, self.affine, self.allowed_organs)
        parts = [self.label, *(_thinned(t) for t in volumes if t is not None)]
        code = zlib.crc32(repr((self.patient, tuple(self.image.shape))).encode())
        for part in parts:
            code = zlib.crc32(part.detach().float().cpu().contiguous().numpy().tobytes(), code)
        return f"{code:08x}"


def _thinned(volume: Tensor) -> Tensor:
    flat = volume.reshape(-1)
    return flat[:: max(1, len(flat) // 10007)]
