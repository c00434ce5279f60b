"""What a picture needs of a volume: the planes through one point, and nothing else of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Sections:
    """Three planes of a volume that was let go: 1.9 MB of the 256 MB of a 400^3 image in float32.

    Attributes:
        shape: (X, Y, Z) of the volume.
        planes: Name of a plane -> its index along the normal, and the plane as it stands on the screen.
        filled: Of a region: is every voxel true?
        touched: Of a region: is any voxel true?
    """

    shape: tuple[int, ...]
    planes: Mapping[str, tuple[int, Array]]
    filled: bool = False
    touched: bool = True

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the planes."""
        return sum(plane.nbytes for _, plane in self.planes.values())

    def all(self) -> bool:
        """As of the volume."""
        return self.filled

    def any(self) -> bool:
        """As of the volume."""
        return self.touched

    def cut(self, plane: str, index: int) -> Array:
        """A plane that was kept.

        Raises:
            KeyError: It was not.
        """
        kept, pixels = self.planes[plane]
        if kept != index:
            raise KeyError(f"plane {index} of {plane} was not kept, {kept} was")
        return pixels
