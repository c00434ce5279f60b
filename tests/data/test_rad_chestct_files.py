"""What is read from RAD-ChestCT's files, and what is refused in one line that names the file."""

from __future__ import annotations

import io
import math
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from camtrain import InputError
from camtrain.data.rad_chestct_files import (
    find_beside,
    find_scans,
    find_table,
    read_boxes,
    read_header,
    read_patients,
    read_scan,
    read_table,
)

DEMO = Path(__file__).resolve().parents[3] / "shared" / "data" / "rad_chestct_demo"
DEMO = DEMO if DEMO.is_dir() else Path(__file__).resolve().parents[4] / "shared" / "data" / "rad_chestct_demo"
needs_demo = pytest.mark.skipif(not DEMO.is_dir(), reason="the authors' demo files are not here")


def everything(header):
    return header


def csv_file(folder, text, name="table.csv"):
    file = folder / name
    file.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    return file


def test_a_table(tmp_path):
    text = "NoteAcc_DEID,a*x,b*x,b*y\r\ntrn1,0,1,\r\ntrn2,1.0,0.0,nan\r\n\r\ntrn3,-1,1,0\r\n"
    for content in (text, "\ufeff" + text):  # with a byte-order mark, too
        table = read_table(csv_file(tmp_path, content), everything)
        assert table.ids == ["trn1", "trn2", "trn3"]
        assert table.rows == 3
        np.testing.assert_array_equal(table.columns["a*x"], [0, 1, math.nan])
        np.testing.assert_array_equal(table.columns["b*x"], [1, 0, 1])
        np.testing.assert_array_equal(table.columns["b*y"], [math.nan, math.nan, 0])
    some = read_table(csv_file(tmp_path, text), lambda header: ["b*y"], {"trn3", "trn9"})
    assert (some.ids, list(some.columns), some.rows) == (["trn3"], ["b*y"], 3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("NoteAcc_DEID,a\nx,2\ny,0\nz,yes\n", "row 4, column 'a': 'yes': expected 0, 1 or empty"),
        ("NoteAcc_DEID,a\nx,1\ny,0\nx,1\n", "row 4: 'x' stands in row 2 already"),
        ("NoteAcc_DEID,a\nx,1,0\ny\n", "row 3 has 1 cells instead of 2"),
        ("NoteAcc_DEID;a\nx;1\n", "got semicolons"),
        ("NoteAcc_DEID,a,a\nx,1,1\n", "'a' twice"),
        ("name,a\nx,1\n", "expected a column NoteAcc_DEID"),
        ("", "is the file complete"),
        (b"NoteAcc_DEID,a\nx\xff,1\n", "in UTF-8"),
        ("NoteAcc_DEID,a\n" + "".join(f"c{i},7\n" for i in range(9)), "9 faults"),
    ],
)
def test_wrong_tables(tmp_path, text, says):
    file = csv_file(tmp_path, text)
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        read_table(file, everything)
    head, *lines = str(caught.value).splitlines()
    assert str(file) in head
    assert all(line.startswith(f"- {file}, row ") for line in lines)


def test_no_table(tmp_path):
    with pytest.raises(InputError, match=r"imgvalid_Abnormality_and_Location_Labels.csv \(or the older"):
        find_table(tmp_path, "val")
    with pytest.raises(InputError, match="train, val, test, got 'valid'"):
        find_table(tmp_path, "valid")
    csv_file(tmp_path, "", "imgvalid_BinaryLabels.csv")
    assert find_table(tmp_path, "val").name == "imgvalid_BinaryLabels.csv"
    csv_file(tmp_path, "", "imgvalid_Abnormality_and_Location_Labels.csv")
    assert find_table(tmp_path, "val").name == "imgvalid_Abnormality_and_Location_Labels.csv"
    with pytest.raises(InputError, match="expected a CSV file, got"):
        read_header(tmp_path / "missing.csv")


def test_borders_that_are_missing_or_infinite_become_those_of_the_volume(tmp_path):
    borders = "sup_axis0min,inf_axis0max,ant_axis1min,pos_axis1max,rig_axis2min,lef_axis2max"
    head = f"NoteAcc_DEID,{borders},shape0,shape1,shape2"
    rows = "trn1,1,2,3,4,5,6,10,11,12\ntrn2.npz,,nan,inf,-inf,inf,NaN,10,11,12\ntrn3,1.0,9,3,4,5,6,10,11,12\n"
    boxes = read_boxes(csv_file(tmp_path, f"{head}\n{rows}"))
    assert boxes == {
        "trn1": ((1, 2), (3, 4), (5, 6)),
        "trn2": ((0, 10), (0, 11), (0, 12)),
        "trn3": ((1, 9), (3, 4), (5, 6)),
    }
    assert list(read_boxes(tmp_path / "table.csv", {"trn2"})) == ["trn2"]
    with pytest.raises(InputError, match=r"row 2 \('a'\): x"):
        read_boxes(csv_file(tmp_path, f"{head}\na,x,2,3,4,5,6,10,11,12\n"))
    with pytest.raises(InputError, match="none named 'shape2'"):
        read_boxes(csv_file(tmp_path, f"{head[:-7]}\n{rows}"))


def test_patients_and_files_beside(tmp_path):
    assert find_beside(tmp_path, "CT_*.csv") is None
    file = csv_file(tmp_path, "MRN_DEID,NoteAcc_DEID\np1,trn1\np2 ,trn2\n", "CT_Scan_Metadata_x.csv")
    assert find_beside(tmp_path, "CT_*.csv", "all.csv") == file
    assert read_patients(file) == {"trn1": "p1", "trn2": "p2"}
    with pytest.raises(InputError, match="MRN_DEID or MRN"):
        read_patients(csv_file(tmp_path, "NoteAcc_DEID,age\ntrn1,7\n"))
    csv_file(tmp_path, "", "CT_Scan_Metadata_y.csv")
    with pytest.raises(InputError, match="leave one there"):
        find_beside(tmp_path, "CT_*.csv")


def test_scans(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        find_scans(tmp_path / "nowhere")
    with pytest.raises(InputError, match="got none"):
        find_scans(tmp_path)
    for kind in (np.int16, np.int32, np.float32):
        np.savez_compressed(tmp_path / "trn1.npz", ct=np.full((3, 4, 5), -700, dtype=kind))
        assert read_scan(tmp_path / "trn1.npz").dtype == kind
    np.savez(tmp_path / "trn1_seg.npz", segmap=np.zeros(1))
    assert list(find_scans(tmp_path)) == ["trn1"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"scan": np.zeros((2, 2, 2))}, "the key 'ct'"),
        ({"ct": np.zeros((2, 2))}, r"got float64 \(2, 2\)"),
        ({"ct": np.zeros((0, 2, 2))}, "is it a scan"),
        ({"ct": np.array([[["a"]]])}, "volume of numbers"),
        ({"ct": np.full((2, 2, 2), np.nan)}, "got NaN"),
        ({"ct": np.array([[[{"code": 1}]]], dtype=object)}, "got object|Object arrays"),
    ],
)
def test_wrong_volumes(tmp_path, content, says):
    file = tmp_path / "trn1.npz"
    np.savez(file, **content)
    with pytest.raises(InputError, match=f"{re.escape(str(file))}.*({says})"):
        read_scan(file)


def test_damaged_volumes(tmp_path):
    file = tmp_path / "trn1.npz"
    np.savez_compressed(file, ct=np.random.default_rng(0).integers(0, 999, (9, 9, 9)))
    whole = file.read_bytes()
    for damaged in (b"", b"no archive", whole[: len(whole) // 2], whole[:200] + b"\0" * 99 + whole[299:]):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"trn1.npz: expected an npz file.*copy it again"):
            read_scan(file)


def test_a_bomb_is_not_unpacked(tmp_path):
    """A file that says it holds 4,096^3 voxels: refused for its header, of which there is next to nothing behind."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<i2", "fortran_order": False, "shape": (4096, 4096, 4096)})
    with zipfile.ZipFile(tmp_path / "trn1.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ct.npy", head.getvalue() + b"\0" * 1000)
    with pytest.raises(InputError, match=r"at most 1073741824 voxels, got \(4096, 4096, 4096\)"):
        read_scan(tmp_path / "trn1.npz")


@needs_demo
def test_the_authors_demo_files():
    scans = find_scans(DEMO)
    assert {"FAKE000", "FAKE111", "FAKE222"} <= set(scans)
    volume = read_scan(scans["FAKE000"])
    assert (volume.dtype, volume.shape) == (np.int32, (10, 10, 10))
    table = read_table(find_table(DEMO, "train"), everything, scans)
    assert table.ids == ["FAKE000", "FAKE111", "FAKE222"]
    assert (len(table.columns), table.rows) == (83, 6)
    assert table.columns["nodule"].tolist() == [float(line.split(",")[67]) for line in _lines()[1:4]]
    assert read_patients(DEMO / "all_identifiers.csv")["FAKE111"] == "MRN111"


def _lines():
    lines = (DEMO / "imgtrain_BinaryLabels.csv").read_text().splitlines()
    assert lines[0].split(",")[67] == "nodule"
    return lines
