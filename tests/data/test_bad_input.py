"""Every bad input of a study at once: one line each, with file and row, in one run of doctor or fit; exit code 2."""

from __future__ import annotations

import csv
import importlib.util
import io
import zipfile

import nibabel as nib
import numpy as np
import pytest
import yaml
from volume_files import AXIAL, voxels, write_mha, write_series

from camtrain.cli.main import main

SIZE = (24, 18, 30)
HAS_DICOM = importlib.util.find_spec("pydicom") is not None
TABLE = "organs: {lung_left: 1, heart: 3}\nlabels: {nodule: [lung_left], cardiomegaly: [heart]}\n"


def scan(seed):
    hu = np.full(SIZE, -1000.0)
    hu[3:-3, 3:-3] = 40
    return (hu + np.random.default_rng(seed).normal(0, 10, SIZE)).astype(np.int16)


def save(path, data, third=2.0):
    nib.save(nib.Nifti1Image(data, np.diag([2.0, 2.0, third, 1.0])), path)


def npz(path, shape, size):
    """A header that says one thing, and zeros that are another."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i2", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", header.getvalue() + bytes(size))


def volumes(folder):
    """(id, image, organs, words of its line) for everything that only shows in a file."""
    save(folder / "cut.nii.gz", scan(1))
    (folder / "cut.nii.gz").write_bytes((folder / "cut.nii.gz").read_bytes()[:2000])
    save(folder / "four.nii.gz", np.stack([scan(2)] * 2, -1))
    write_mha(folder / "endian.mha", scan(3), BinaryDataByteOrderMSB=True)  # the bytes are little-endian
    np.save(folder / "objects.npy", np.array([{"a": 1}]), allow_pickle=True)
    npz(folder / "bomb.npz", SIZE, 20 << 20)
    npz(folder / "huge.npz", (10**5, 10**5, 10**3), 1000)
    yield "cut", "cut.nii.gz", "ids.nii.gz", "truncated"
    yield "four", "four.nii.gz", "", "4D|(24, 18, 30, 2)"
    yield "endian", "endian.mha", "", "byte order"
    yield "objects", "objects.npy", "", "object array"
    yield "bomb", "bomb.npz", "", "zip bomb"
    yield "huge", "huge.npz", "", "at most 4 GiB"
    yield "grid", "good.nii.gz", "thick.nii.gz", "voxels of 2 x 2 x 3 mm|one voxel grid"
    yield "several", "good.nii.gz", "lung_left.nii.gz|heart.nii.gz", "heart.nii.gz"
    if HAS_DICOM:
        slices = voxels("i4", (6, 5, 4)) + 100
        write_series(folder / "rgb", slices, SamplesPerPixel=3)
        across = (0, 1, 0, 0, 0, 1)
        write_series(folder / "mixed", slices, ImageOrientationPatient=lambda k: list(AXIAL if k else across))
        write_series(folder / "two", slices)
        write_series(folder / "two", slices, uid="1.2.4", name="t")
        write_series(folder / "gap", slices, ImagePositionPatient=lambda k: [0, 0, [0, 2.5, 5, 10][k]])
        yield "rgb", "rgb", "", "colours (RGB)"
        yield "mixed", "mixed", "", "one orientation"
        yield "two", "two", "", "got 2 in"
        yield "gap", "gap", "", "1 of 5 slices is missing"


def study(folder):
    """The files, and (id, image, organs, split, nodule, words of its line); words are alternatives with | between."""
    save(folder / "good.nii.gz", scan(0))
    ids = np.zeros(SIZE, np.uint8)
    ids[4:9, 5:15, 3:13] = 1
    save(folder / "ids.nii.gz", ids)
    save(folder / "lung_left.nii.gz", ids)
    save(folder / "thick.nii.gz", ids, 3.0)
    save(folder / "heart.nii.gz", ids, 3.0)
    (folder / "loop.nii.gz").symlink_to(folder / "loop_too.nii.gz")
    (folder / "loop_too.nii.gz").symlink_to(folder / "loop.nii.gz")
    save(folder.parent / "outside.nii.gz", scan(4))
    (folder / "link.nii.gz").symlink_to(folder.parent / "outside.nii.gz")
    yield "good", "good.nii.gz", "ids.nii.gz", "train", "1", ""
    # In turns, so that both splits of a fit have faults.
    for number, (name, image, organs, words) in enumerate(volumes(folder)):
        yield name, image, organs, ("train", "val")[number % 2] if image != "good.nii.gz" else "train", "0", words
    yield "outside", "../outside.nii.gz", "", "train", "1", "inside the root"
    yield "link", "link.nii.gz", "", "train", "1", "inside the root"
    yield "loop", "loop.nii.gz", "", "train", "1", "loop of links"
    yield "gone", "gone.nii.gz", "", "val", "1", "does not exist"
    yield "good", "ids.nii.gz", "", "train", "1", "every id once"
    yield "word", "good.nii.gz", "", "train", "perhaps", "'perhaps'"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder, config, and what must be told of which row."""
    root = tmp_path_factory.mktemp("bad")
    (root / "data").mkdir()
    rows = list(study(root / "data"))
    with (root / "data" / "cases.csv").open("w", newline="", encoding="utf-8-sig") as file:  # with a byte-order mark
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["id", "image", "organs", "split", "nodule", "cardiomegali"])
        writer.writerows([*row[:5], "1"] for row in rows)
    (root / "data" / "table.yaml").write_text(TABLE)
    config = {
        "data": {
            "class_path": "camtrain.data.ManifestDataModule",
            "init_args": {
                "manifest": str(root / "data" / "cases.csv"),
                "table": str(root / "data" / "table.yaml"),
                "root": str(root / "data"),
                "size": list(SIZE),
            },
        },
        "model": {
            "class_path": "camtrain.models.LitClassifier",
            "init_args": {"net": {"class_path": "camtrain.models.FlattenNet", "init_args": {"size": list(SIZE)}}},
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    }
    (root / "c.yaml").write_text(yaml.safe_dump(config))
    whole = [("semicolons", "separated by commas"), ("cardiomegali", "nearest: cardiomegaly")]
    return root, whole, [(n, name, words) for n, (name, *_, words) in enumerate(rows, start=2) if words]


def missing(text, whole, expected):
    """What a text does not tell, in a line of its own."""
    lines = text.splitlines()
    lost = [words for words in whole if not any(all(word in line for word in words) for line in lines)]
    for number, name, words in expected:
        told = [line for line in lines if f"cases.csv, row {number} (id {name!r})" in line]
        if not any(word in line for line in told for word in words.split("|")):
            lost.append((number, name, words))
    return lost


@pytest.mark.slow
@pytest.mark.parametrize("words", [["fit"], ["doctor", "--out", "page.html"]], ids=["fit", "doctor"])
def test_all_bad_inputs_at_once(made, words, monkeypatch, capsys, tmp_path):
    root, whole, expected = made
    monkeypatch.chdir(tmp_path)
    assert main([words[0], "--config", str(root / "c.yaml"), *words[1:]]) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert missing(out + err, whole, expected) == []
    if words[0] == "fit":
        (head,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert head.endswith(f"cases.csv: {len(whole) + len(expected)} faults")
    else:
        page = (tmp_path / "page.html").read_text()
        assert [row for row in expected if f"cases.csv, row {row[0]}" not in page] == []


def test_volumes_of_both_splits_where_the_form_is_right(made, monkeypatch, capsys, tmp_path):
    """Then the cases are read before the first step, and all that are broken are told together."""
    root, _, expected = made
    monkeypatch.chdir(tmp_path)
    lines = (root / "data" / "cases.csv").read_text(encoding="utf-8-sig").replace(";", ",").splitlines()
    form = {"inside the root", "loop of links", "does not exist", "every id once", "'perhaps'"}
    kept = {number for number, _, words in expected if words not in form} | {1, 2}
    rows = [line if number in kept else "" for number, line in enumerate(lines, start=1)]  # the numbers stay
    rows[0] = rows[0].replace("cardiomegali", "cardiomegaly")
    manifest = root / "data" / "right.csv"
    manifest.write_text("\n".join(rows))
    assert main(["fit", "--config", str(root / "c.yaml"), "--data.manifest", str(manifest)]) == 2
    err = capsys.readouterr().err.replace("right.csv", "cases.csv")
    assert missing(err, [], [row for row in expected if row[2] not in form]) == []
