"""A chest phantom with known truth: scans, organs, findings, and shortcuts that go with the findings by chance.

Every case follows from (seed, split, index) alone, so cases can be made in any order, in any number and anew.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from camtrain._errors import InputError, nearest
from camtrain.data.phantom_anatomy import draw_anatomy
from camtrain.data.phantom_body import Scene, paint_bodies
from camtrain.data.phantom_findings import FINDINGS, PAINTING_ORDER, paint_finding
from camtrain.data.phantom_frame import Bools, Frame, Places, affine_of, places_in
from camtrain.data.phantom_shortcuts import PLACES, paint_marker

LABELS = tuple(FINDINGS)
DEFAULT_SIZE = (48, 36, 48)
WINDOW = (-1000.0, 800.0)
"""HU that become 0 and 1 in the image."""
SHIFTS = ("shift_free", "shift_random", "shift_reversed")
"""Splits with the cases of `test` but other markers: none, meaningless ones, and ones that say the opposite."""
SPLITS = ("train", "val", "test", *SHIFTS)
_SMALLEST = 16


@dataclass(frozen=True)
class Case:
    """One phantom scan with its truth.

    Attributes:
        id: Split and number.
        hu: (X, Y, Z) float32 Hounsfield units.
        organs: (X, Y, Z) uint8 organ ids, with holes where asked for.
        label: (L,) float32, 0 or 1.
        marker: (L,) bool: which labels' markers are in the scan.
        lesion_bits: (X, Y, Z) uint8, bit i = finding i of `LABELS`.
        marker_bits: (X, Y, Z) uint8, bit i = marker of finding i of `LABELS`.
        affine: (4, 4) voxel to world, mm, RAS.
    """

    id: str
    hu: NDArray[np.float32]
    organs: NDArray[np.uint8]
    label: NDArray[np.float32]
    marker: Bools
    lesion_bits: NDArray[np.uint8]
    marker_bits: NDArray[np.uint8]
    affine: NDArray[np.float64]


def to_image(hu: NDArray[np.float32], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Hounsfield units to the network's input: `WINDOW` becomes 0 to 1, what lies outside is clipped.

    Args:
        hu: Hounsfield units, of any shape.
        out: Where to put the image, of the same shape; `hu` itself will do.

    Example:
        >>> to_image(np.array([-1000, -100, 2000], np.float32)).tolist()
        [0.0, 0.5, 1.0]
    """
    low, high = WINDOW
    image: NDArray[np.float32] = np.subtract(hu, np.float32(low), out=out)
    image /= np.float32(high - low)
    return image.clip(0, 1, out=image)


def unpack(bits: NDArray[np.uint8], labels: Sequence[str]) -> Bools:
    """Regions per label, (L, X, Y, Z) bool, out of one byte per voxel."""
    regions = np.empty((len(labels), *bits.shape), bool)
    for region, name in zip(regions, labels, strict=True):
        np.not_equal(bits & np.uint8(1 << LABELS.index(name)), 0, out=region)
    return regions


@dataclass(frozen=True)
class Phantom:
    """What the cases of one phantom have in common.

    Args:
        labels: Findings that occur, in the order of the label columns.
        size: Voxels per axis: to the right, to the front, upwards.
        shortcut: Probability that a marker agrees with its label (is there exactly when the finding is); None = no
            markers.
        shortcut_at: Where markers lie: `skin` (outside all organs), `other_organ` (in an organ that only other
            labels are read from) or `own_organ`.
        cooccurrence: Share of the findings' latent variance that a common cause explains, 0 = independent.
        organs: `exact`, or `holes`: lesion voxels are background in the organs, as segmenters leave them.
        prevalence: Share of cases with each finding.
        seed: Another seed, another population sample.

    Raises:
        InputError: An argument is out of range or a name is unknown.

    Example:
        >>> case = Phantom(size=(24, 20, 24)).case("train", 0)
        >>> case.hu.shape, case.id
        ((24, 20, 24), 'train-00000')
    """

    labels: tuple[str, ...] = LABELS
    size: tuple[int, int, int] = DEFAULT_SIZE
    shortcut: float | None = 0.95
    shortcut_at: str = "skin"
    cooccurrence: float = 0.0
    organs: str = "exact"
    prevalence: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.labels or len(set(self.labels)) != len(self.labels):
            raise InputError(f"labels expects different findings, got {list(self.labels)}: name each one once")
        for name in self.labels:
            one_of("labels", name, LABELS)
        one_of("shortcut_at", self.shortcut_at, PLACES)
        one_of("organs", self.organs, ("exact", "holes"))
        object.__setattr__(self, "size", tuple(self.size))  # a list comes from YAML
        if len(self.size) != 3 or any(int(n) != n or n < _SMALLEST for n in self.size):
            raise InputError(f"size expects three whole numbers of at least {_SMALLEST} voxels, got {self.size}")
        for word, value in (("shortcut", self.shortcut), ("cooccurrence", self.cooccurrence)):
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"{word} expects a number from 0 to 1, got {value}: {word}=0.5 lies halfway")
        if not 0 < self.prevalence < 1:
            raise InputError(f"prevalence expects a number between 0 and 1, got {self.prevalence}: take 0.4")
        if self.seed < 0:
            raise InputError(f"seed expects a whole number of at least 0, got {self.seed}")

    def case(
        self,
        split: str,
        index: int,
        label: Mapping[str, bool] | None = None,
        marker: Mapping[str, bool] | None = None,
    ) -> Case:
        """Make one case.

        Args:
            split: One of `SPLITS`. The shift splits are the cases of `test` under other markers.
            index: Number of the case.
            label: Findings to force, name -> there or not; the others as drawn.
            marker: Markers to force, likewise.

        Returns:
            The case; the same arguments always give the same case.

        Raises:
            InputError: Unknown split or label.
        """
        (made,) = self.cases(split, [index], label, marker)
        return made

    def cases(
        self,
        split: str,
        indices: Sequence[int],
        label: Mapping[str, bool] | None = None,
        marker: Mapping[str, bool] | None = None,
    ) -> list[Case]:
        """Make several cases, the same as `case` makes them, in a tenth less time.

        Args:
            split: One of `SPLITS`.
            indices: Numbers of the cases.
            label: Findings to force in all of them.
            marker: Markers to force, likewise.

        Raises:
            InputError: Unknown split or label.
        """
        one_of("split", split, SPLITS)
        people = "test" if split in SHIFTS else split
        truths = [self._draw_label(people, index) | self._forced("label", label) for index in indices]
        marks = [
            self._draw_marker(split, index, truth) | self._forced("marker", marker)
            for index, truth in zip(indices, truths, strict=True)
        ]
        anatomies = [draw_anatomy(self._rng(people, index, "anatomy")) for index in indices]
        scenes = paint_bodies(anatomies, self.size, [self._rng(people, index, "texture") for index in indices])
        for name in PAINTING_ORDER:
            for index, scene, truth in zip(indices, scenes, truths, strict=True):
                if truth.get(name):
                    paint_finding(scene, name, self._rng(people, index, name))
        noise = np.empty(self.size, np.float32)
        for index, scene in zip(indices, scenes, strict=True):
            _blur(scene.hu, noise)
            self._rng(people, index, "noise").standard_normal(dtype=np.float32, out=noise)
            noise *= 22
            scene.hu += noise
        for name in self.labels:
            for scene, marked in zip(scenes, marks, strict=True):
                if marked[name]:
                    paint_marker(scene, name, self.shortcut_at)
        names = [f"{split}-{index:05d}" for index in indices]
        return [self._finish(*one) for one in zip(names, scenes, truths, marks, strict=True)]

    def marked(self, split: str, index: int, organs: NDArray[np.uint8]) -> Places:
        """Where the markers of a case lie, without making it anew: places in the flat volume.

        Args:
            split: One of `SPLITS`.
            index: Number of the case.
            organs: (X, Y, Z) organ ids of the case, without holes.
        """
        people = "test" if split in SHIFTS else split
        marks = self._draw_marker(split, index, self._draw_label(people, index))
        anatomy = draw_anatomy(self._rng(people, index, "anatomy"))
        scene = Scene(Frame(self.size, anatomy.pose), anatomy, np.empty(self.size, np.float32), organs)
        for name in self.labels:
            if marks[name]:
                paint_marker(scene, name, self.shortcut_at)
        return places_in(scene.markers != 0)

    def _finish(self, name: str, scene: Scene, truth: dict[str, bool], marks: dict[str, bool]) -> Case:
        organs = scene.organs
        if self.organs == "holes":
            organs = np.where(scene.lesions > 0, np.uint8(0), organs)
        return Case(
            id=name,
            hu=scene.hu,
            organs=organs,
            label=np.array([truth[n] for n in self.labels], np.float32),
            marker=np.array([marks[n] for n in self.labels], bool),
            lesion_bits=scene.lesions,
            marker_bits=scene.markers,
            affine=affine_of(self.size),
        )

    def _rng(self, split: str, index: int, stream: str) -> np.random.Generator:
        """Own randomness for each part of a case, so that adding a finding leaves all else as it was."""
        words = [self.seed, zlib.crc32(split.encode()), index, zlib.crc32(stream.encode())]
        # Numbers of 32 bits are taken as they are, an array of them twice as fast as a list.
        seed = np.array(words, np.uint32) if max(words) < 2**32 else words
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))

    def _draw_label(self, split: str, index: int) -> dict[str, bool]:
        """Gaussian copula: one common cause and one own cause per finding."""
        draws = self._rng(split, index, "label").standard_normal(1 + len(LABELS))
        latent = math.sqrt(self.cooccurrence) * draws[0] + math.sqrt(1 - self.cooccurrence) * draws[1:]
        drawn = dict(zip(LABELS, (latent < _quantile(self.prevalence)).tolist(), strict=True))
        return {name: drawn[name] for name in self.labels}

    def _draw_marker(self, split: str, index: int, truth: dict[str, bool]) -> dict[str, bool]:
        if self.shortcut is None or split == "shift_free":
            return dict.fromkeys(self.labels, False)
        draws = dict(zip(LABELS, self._rng(split, index, "marker").random(len(LABELS)).tolist(), strict=True))
        agree = {"shift_random": 0.5, "shift_reversed": 1 - self.shortcut}.get(split, self.shortcut)
        return {name: truth[name] == (draws[name] < agree) for name in self.labels}

    def _forced(self, word: str, given: Mapping[str, bool] | None) -> dict[str, bool]:
        for name in given or {}:
            one_of(word, name, self.labels)
        return {name: bool(value) for name, value in (given or {}).items()}


@functools.lru_cache(maxsize=16)
def _quantile(share: float) -> float:
    """Below which this share of a normal distribution lies."""
    return float(ndtri(share))


def one_of(word: str, value: str, known: Sequence[str]) -> None:
    """Check that a name is known.

    Raises:
        InputError: It is not; the message offers those that look like it.

    Example:
        >>> one_of("organs", "holes", ("exact", "holes"))
    """
    if value not in known:
        raise InputError(f"{word} does not know {value!r}{nearest(str(value), known, n=4)}")


def _blur(hu: NDArray[np.float32], scratch: NDArray[np.float32], weight: float = 0.13) -> None:
    """The scanner's point spread, in place: (w, 1 - 2w, w) along every axis; the outermost planes stay.

    Args:
        hu: (X, Y, Z), without gaps in memory.
        scratch: As large, for sums.
        weight: w.
    """
    flat, room = hu.reshape(-1), scratch.reshape(-1)
    edges = ((hu[0], hu[-1]), (hu[:, 0], hu[:, -1]), (hu[:, :, 0], hu[:, :, -1]))
    for (first, last), step in zip(edges, (hu.shape[1] * hu.shape[2], hu.shape[2], 1), strict=True):
        # Along the whole memory, rows run over into each other only in the outermost planes, which are put back.
        outer = first.copy(), last.copy()
        middle, smooth = flat[step:-step], room[: -2 * step]
        np.add(flat[2 * step :], flat[: -2 * step], out=smooth)
        smooth *= np.float32(weight)
        middle *= np.float32(1 - 2 * weight)
        middle += smooth
        first[...], last[...] = outer
