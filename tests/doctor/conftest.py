"""A small sound study of real files, to be damaged one fault at a time."""

from __future__ import annotations

import csv

import nibabel as nib
import numpy as np
import pytest

from camtrain._errors import InputError
from camtrain.data import ManifestDataModule
from camtrain.doctor import Extent, examine
from camtrain.doctor.gathering import facts_of_refused

SHAPE, STEP = (24, 20, 16), (2.0, 2.0, 3.0)
TABLE = (
    "organs: {lung_left: 1, lung_right: 2, heart: 3}\n"
    "labels: {nodule: [lung_left, lung_right], cardiomegaly: [heart]}\n"
)
SPLITS = ["train"] * 6 + ["val"] * 3 + ["test"] * 3


class Study:
    """Scans, organs and manifest in a folder; every part can be changed before it is examined."""

    shape, step, splits = SHAPE, STEP, SPLITS

    def __init__(self, folder):
        self.folder = folder
        self.header = ["id", "image", "organs", "split", "patient", "nodule", "cardiomegaly"]
        self.rows = [
            [f"c{n}", f"c{n}.nii.gz", f"c{n}_seg.nii.gz", split, f"p{n}", str(n % 2), str(n // 2 % 2)]
            for n, split in enumerate(SPLITS)
        ]
        (folder / "table.yaml").write_text(TABLE)
        for n in range(len(SPLITS)):
            self.save(f"c{n}.nii.gz", self.scan(n))
            self.save(f"c{n}_seg.nii.gz", self.organs())

    @property
    def affine(self):
        return np.diag([*STEP, 1.0])

    def scan(self, n=0):
        """HU of a body with air around it, different from case to case."""
        rng = np.random.default_rng(n)
        hu = np.full(SHAPE, -1000.0)
        hu[3:-3, 3:-3] = 40
        hu[4:-4, 5:-5, 2:-2] = -850
        return (hu + rng.normal(0, 10, SHAPE)).astype(np.int16)

    def organs(self):
        ids = np.zeros(SHAPE, np.uint8)
        ids[4:9, 5:15, 3:13] = 1  # RAS: the first axis runs to the right, so left comes first
        ids[15:20, 5:15, 3:13] = 2
        ids[10:14, 6:12, 4:7] = 3
        return ids

    def save(self, name, data, affine=None, code=1):
        image = nib.Nifti1Image(data, self.affine if affine is None else affine)
        image.set_sform(image.affine, code)
        image.set_qform(image.affine, code)
        nib.save(image, self.folder / name)

    def write(self):
        with (self.folder / "cases.csv").open("w", newline="") as file:
            csv.writer(file).writerows([self.header, *self.rows])
        return self.folder / "cases.csv"

    def examine(self, extent=None, text=None, **arguments):
        """Findings by check, through the data module or, where it refuses, as the command does it."""
        path = self.write()
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        given = {"manifest": path, "table": self.folder / "table.yaml", **arguments}
        facts = data = None
        try:
            data = ManifestDataModule(**given)
        except InputError as error:
            facts = facts_of_refused(given, str(error))
        return Found(examine(facts, data, extent=extent or Extent()))


class Found:
    """An examination whose findings are asked for by check."""

    def __init__(self, examination):
        self.examination = examination
        self.findings = examination.findings

    def of(self, check, severity=None):
        found = [f for f in self.findings if f.check == check and severity in (None, f.severity)]
        assert found, f"no {severity or 'finding'} of {check} in {[(f.check, f.severity) for f in self.findings]}"
        return found[0]

    @property
    def bad(self):
        return [(f.check, f.title) for f in self.findings if f.severity != "note"]

    def ids(self, check):
        return [place.id for f in self.findings if f.check == check for place in f.places]


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)
