"""Simulated cryo-electron tomograms of single particles: which macromolecule is in the volume?

A toy of what Respond-CAM was made for (Zhao et al., 2018): a particle of one of ten classes, turned at random, imaged
with a contrast transfer function, a missing wedge and noise. Every case follows from (seed, split, index) alone.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from camtrain._errors import InputError, nearest
from camtrain.data.cryoet_optics import Optics
from camtrain.data.cryoet_shapes import REACH, SHAPES, density_of, placed, rotation

CLASSES = tuple(SHAPES)
SPLITS = ("train", "val", "test", "noise_free")
"""`noise_free` holds the particles of `test`, imaged without noise."""
SHIFT = 0.1
"""Largest shift from the middle along each axis, as a share of the volume."""


@dataclass(frozen=True)
class Subtomogram:
    """One simulated volume with its truth.

    Attributes:
        id: Split and number.
        image: (X, Y, Z) float32, mean 0 and standard deviation 1.
        label: Name of the class.
        distance: (X, Y, Z) float32, nm to the particle's surface, negative inside.
    """

    id: str
    image: NDArray[np.float32]
    label: str
    distance: NDArray[np.float32]

    @property
    def particle(self) -> NDArray[np.bool_]:
        """(X, Y, Z): where the density is above one half of the particle's."""
        inside: NDArray[np.bool_] = self.distance < 0
        return inside


@dataclass(frozen=True)
class CryoET:
    """What the cases of one simulation have in common.

    Args:
        classes: Names out of `CLASSES`, in the order of the label columns.
        size: Voxels per axis.
        optics: How they are imaged.
        seed: Another seed, other particles.

    Raises:
        InputError: An unknown class, or a volume that is too small for the particles.

    Example:
        >>> case = CryoET(size=(24, 20, 22)).case("train", 3)
        >>> case.image.shape, case.id, case.label, bool(case.particle.any())
        ((24, 20, 22), 'train-00003', 'torus', True)
    """

    classes: tuple[str, ...] = CLASSES
    size: tuple[int, int, int] = (24, 24, 24)
    optics: Optics = field(default_factory=Optics)
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(self.size))  # a list comes from YAML
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise InputError(f"classes expects different names, got {list(self.classes)}: name each one once")
        for name in self.classes:
            _known("classes", name, CLASSES)
        if len(self.size) != 3 or any(int(n) != n or n < 1 for n in self.size):
            raise InputError(f"size expects three positive whole numbers of voxels, got {self.size}")
        room = 2 * REACH / (1 - 2 * SHIFT)
        if min(self.size) * self.optics.voxel < room - 1e-9:
            raise InputError(
                f"expected a volume of at least {room:g} nm along each axis, got {min(self.size)} voxels of "
                f"{self.optics.voxel:g} nm: raise size= or voxel="
            )
        if self.seed < 0:
            raise InputError(f"seed expects a whole number of at least 0, got {self.seed}")

    def case(self, split: str, index: int, label: str | None = None, exposure: int = 0) -> Subtomogram:
        """Make one case.

        Args:
            split: One of `SPLITS`.
            index: Number of the case. Classes take turns: case i is of class i modulo the number of classes.
            label: Class to put there instead, turned and shifted as the other would have been.
            exposure: Another number, other noise on the same particle.

        Returns:
            The case; the same arguments always give the same case.

        Raises:
            InputError: Unknown split or class.
        """
        _known("split", split, SPLITS)
        name = self.classes[index % len(self.classes)] if label is None else label
        _known("label", name, CLASSES)
        people, optics = (split, self.optics) if split != "noise_free" else ("test", _noise_free(self.optics))
        pose = self._rng(people, index, "pose")
        turn, shift = rotation(pose), pose.uniform(-SHIFT, SHIFT, 3) * np.array(self.size) * optics.voxel
        distance = SHAPES[name](placed(self.size, optics.voxel, turn, shift))
        image = optics.expose(density_of(distance), self._rng(people, index, f"noise {exposure}"))
        scaled = (image - image.mean()) / image.std()
        return Subtomogram(f"{split}-{index:05d}", scaled.astype(np.float32), name, distance.astype(np.float32))

    def _rng(self, split: str, index: int, stream: str) -> np.random.Generator:
        """Own randomness for pose and noise, so that one can be changed without the other."""
        return np.random.default_rng([self.seed, zlib.crc32(split.encode()), index, zlib.crc32(stream.encode())])


def _noise_free(optics: Optics) -> Optics:
    return Optics(**{**vars(optics), "snr": None})


def _known(word: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{word} does not know {value!r}{nearest(str(value), known, n=4)}")
