"""What is known of a data set while it is looked at: rows, headers, contents. Plain values, filled stage by stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from camtrain.anatomy.organ_table import OrganTable
from camtrain.doctor.finding import Place, Severity
from camtrain.doctor.net_facts import NetFacts
from camtrain.doctor.sheet import Sheet


@dataclass(frozen=True)
class Row:
    """One case as it is listed, before any file is touched.

    Attributes:
        where: File and row, or split and number of a data module without a manifest.
        id: Name of the case.
        split: Its split.
        patient: Whose scan it is; "" = not said.
        label: 0, 1 or NaN per label, in the order of `Facts.labels`.
        image: The scan; None where the data module has no files, or the manifest names none.
        organs: Segmentation: a file, a folder, or several files.
    """

    where: str
    id: str
    split: str
    patient: str = ""
    label: tuple[float, ...] = ()
    image: Path | None = None
    organs: Path | tuple[Path, ...] | None = None

    @property
    def organ_files(self) -> tuple[Path, ...]:
        """The segmentation's files or its folder."""
        return () if self.organs is None else self.organs if isinstance(self.organs, tuple) else (self.organs,)

    def place(self, got: str, file: Path | tuple[Path, ...] | None = None) -> Place:
        """This row in a finding."""
        files = file if isinstance(file, tuple) else () if file is None else (file,)
        return Place(self.where, self.id, " | ".join(map(str, files)), got)


@dataclass(frozen=True)
class Header:
    """What the header of a volume says.

    Attributes:
        path: The file.
        shape: Voxels per axis, as stored.
        affine: (4, 4) voxel to world in mm.
        dtype: Kind of the stored numbers.
        placed: Does the header say where left and right are (sform or qform)?
        fault: Why training cannot read it; "" = nothing seen so far.
        doubt: Why it may be unreadable, as far as a header can tell.
        size: Bytes on disk.
        print: Of the first and last bytes and the size: equal files have equal prints.
    """

    path: Path
    shape: tuple[int, ...] = ()
    affine: NDArray[np.float64] = field(default_factory=lambda: np.eye(4))
    dtype: str = ""
    placed: bool = True
    fault: str = ""
    doubt: str = ""
    size: int = 0
    print: str = ""

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape) if self.shape else 0

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size in mm along each axis of the file."""
        return tuple(np.linalg.norm(self.affine[:3, :3], axis=0).tolist())


@dataclass(frozen=True)
class OrganSize:
    """One organ id of one case.

    Attributes:
        voxels: How many.
        inside: How many of them the network gets to see.
        ml: Volume; of pictures and volumes without geometry NaN.
        extent: Length of the bounding box along each axis, mm (voxels without geometry).
        centre: Middle of mass, mm in the world (voxels without geometry).
    """

    voxels: int
    inside: int
    ml: float
    extent: tuple[float, ...]
    centre: tuple[float, ...]


@dataclass(frozen=True)
class Content:
    """What a case holds.

    Attributes:
        image_fault: Why its image cannot be used, "" = it can.
        organs_fault: The same of its organs.
        shape: Spatial shape of the image as read.
        low: Smallest intensity.
        high: Largest.
        quantiles: 1, 50 and 99 % of the intensities.
        clipped: Share of voxels outside the window; NaN where there is none.
        organs: Id -> its size, without background; None = not segmented.
        grids: How the grids of image and organs differ, "" = not at all.
        print: Of a sample of the intensities: equal content has equal prints, in any file.
        seconds: Reading took so long.
    """

    image_fault: str = ""
    organs_fault: str = ""
    shape: tuple[int, ...] = ()
    low: float = math.nan
    high: float = math.nan
    quantiles: tuple[float, float, float] = (math.nan,) * 3
    clipped: float = math.nan
    organs: Mapping[int, OrganSize] | None = None
    grids: str = ""
    print: str = ""
    seconds: float = math.nan


@dataclass
class Facts:
    """All that is known, for the checks to read.

    Attributes:
        source: The manifest, or the class of the data module.
        labels: Label names, in the order of the outputs.
        table: Organ table, cut to the labels that it knows; None where it could not be read.
        rules: Labels for which the whole table has a rule.
        rows: All cases.
        train: Name of the training split.
        val: Of the validation split, None = there is none.
        tests: Of the test splits.
        spacing: Voxel size in mm that training resamples to, None = each scan's own.
        size: Voxels after cropping, None = each scan's own.
        window: HU that become 0 and 1; None where the data module has no window.
        files: Are the rows those of a manifest, whose files can be looked at one by one?
        hounsfield: Are intensities as read Hounsfield units, and not pictures, or what a module made of them?
        organs_to_come: Will organs be made before training, and are not there yet?
        skips: Does training leave out what cannot be read, instead of stopping?
        sheet: The manifest as text, where it could not be used.
        refused: What the data module said when it was made, "" = it could be made.
        table_fault: Why the organ table cannot be read, "" = it can.
        unbuilt: What the network or a callback said when it was made, "" = it could be made.
        untested: What the data module said when its test splits were set up, "" = nothing.
        config: What the config is refused for before anything is built, "" = nothing.
        cache: Part of the cases that training keeps in memory.
        cached_bytes: Of the cases that training keeps in memory, all together; 0 = not known.
        free_memory: Bytes that this machine has free; None = not known.
        image_headers: Index of the row -> header of its image.
        organ_headers: Index of the row -> header of its organs (the first file of a folder).
        stray_files: Index of the row -> names of organ files that the table does not know.
        contents: Index of the row -> what it holds.
        net: What was measured of the network.
    """

    source: str
    labels: Sequence[str] = ()
    table: OrganTable | None = None
    rules: Sequence[str] = ()
    rows: Sequence[Row] = ()
    train: str = "train"
    val: str | None = "val"
    tests: Sequence[str] = ("test",)
    spacing: tuple[float, ...] | None = None
    size: tuple[int, ...] | None = None
    window: tuple[float, float] | None = None
    files: bool = False
    hounsfield: bool = False
    organs_to_come: bool = False
    skips: bool = False
    sheet: Sheet | None = None
    refused: str = ""
    table_fault: str = ""
    unbuilt: str = ""
    untested: str = ""
    config: str = ""
    cache: float = 0.0
    cached_bytes: int = 0
    free_memory: int | None = None
    image_headers: dict[int, Header] = field(default_factory=dict)
    organ_headers: dict[int, Header] = field(default_factory=dict)
    stray_files: dict[int, tuple[str, ...]] = field(default_factory=dict)
    contents: dict[int, Content] = field(default_factory=dict)
    net: NetFacts | None = None

    @property
    def of_a_file(self) -> Severity:
        """How bad a file is that training cannot read."""
        return "warning" if self.skips else "error"

    @property
    def splits(self) -> list[str]:
        """Splits that occur, in the order of the rows."""
        return list(dict.fromkeys(row.split for row in self.rows))

    @property
    def used_splits(self) -> list[str]:
        """Splits that training, validation and test read."""
        return [name for name in dict.fromkeys([self.train, self.val, *self.tests]) if name]

    def of_split(self, split: str) -> list[int]:
        """Indices of the rows of a split."""
        return [index for index, row in enumerate(self.rows) if row.split == split]

    def organ_ids(self, name: str) -> tuple[int, ...]:
        """Ids of an organ."""
        return () if self.table is None else self.table.organs.get(name, ())

    def organ_voxels(self, index: int, name: str, inside: bool = False) -> int:
        """Voxels of an organ in a case, all or those that the network sees."""
        organs = self.contents[index].organs or {}
        found = [organs[i] for i in self.organ_ids(name) if i in organs]
        return sum(size.inside if inside else size.voxels for size in found)
