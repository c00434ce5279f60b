"""Manifests that are wrong in several places, in paths, in separate label files, and in size: all told at once."""

from __future__ import annotations

import itertools
import math
import time
from types import SimpleNamespace

import pytest

from camtrain._errors import InputError
from camtrain.data import manifest_look
from camtrain.data.manifest import read_manifest
from camtrain.data.manifest_csv import one_letter_apart
from camtrain.data.manifest_look import checked_manifest, not_looking

HEADER = "id,image,organs,split,nodule"


@pytest.fixture
def write(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz"):
        (tmp_path / name).touch()

    def _write(*lines, header=HEADER, name="cases.csv"):
        (tmp_path / name).write_text("\n".join([header, *lines]) + "\n")
        return tmp_path / name

    return _write


def faults(function, *arguments, **options):
    with pytest.raises(InputError) as error:
        function(*arguments, **options)
    return str(error.value).splitlines()


def test_all_faults_are_told_at_once_one_line_each(write):
    path = write(
        "A,a.nii.gz,,train,2", "B,nowhere.nii.gz,,train,1", "C,c.txt,,train,1", "A,b.nii.gz,,val,x", "E,,,train,1"
    )
    lines = faults(read_manifest, path)
    assert lines[0] == f"{path}: 6 faults"
    for line, words in zip(lines[1:], ["'2'", "nowhere", "c.txt", "'x'", "row 6", "every id once"], strict=True):
        assert line.startswith(f"- {path}, row ")
        assert words in line


def test_many_faults_are_counted_and_the_first_shown(write):
    lines = faults(read_manifest, write(*[f"{i},x.nii.gz,,train,7" for i in range(300)]), check_files=False)
    assert lines[0].endswith(": 300 faults")
    assert len(lines) == 52
    assert lines[-1] == "- and 250 more"


def test_columns_missing_and_without_a_name_at_once(write):
    assert len(faults(read_manifest, write(header="id,imag,organs,nodule,,"))) == 4


def test_rows_of_another_length_at_once(write):
    lines = faults(read_manifest, write("A,a.nii.gz,,train", "B,b.nii.gz,,train,1", "C,c.nii.gz,,train,1,1"))
    assert ["row 2" in lines[1], "row 4" in lines[2]] == [True, True]


def test_a_column_that_is_a_letter_beside_a_known_one(write):
    path = write("A,a.nii.gz,,train,1,p", header=HEADER + ",patiant")
    with pytest.raises(InputError, match=r"the column 'patiant' differs from 'patient' by a letter"):
        read_manifest(path)
    assert read_manifest(path, labels=["nodule"]).labels == ("nodule",)


def test_letters():
    for other in ("patiant", "patien", "patients", "apatient", "ptaient", "patietn"):
        assert one_letter_apart(other, "patient"), other
    for other in ("patient", "patinets", "ptn", "", "mpatients"):
        assert not one_letter_apart(other, "patient"), other


def test_a_path_outside_the_root(write, tmp_path):
    inside = tmp_path / "data"
    inside.mkdir()
    (inside / "a.nii.gz").touch()
    (inside / "link.nii.gz").symlink_to(tmp_path / "b.nii.gz")
    path = write(
        "A,a.nii.gz,,train,1", "B,../b.nii.gz,,train,1", "C,link.nii.gz,,train,1", f"D,{tmp_path}/c.nii.gz,,train,1"
    )
    lines = faults(read_manifest, path, root=inside)
    assert len(lines) == 4
    assert all("inside the root" in line for line in lines[1:])
    assert len(faults(read_manifest, path, root=inside, check_files=False)) == 3  # the text of a link tells nothing


def test_a_loop_of_links_and_other_paths_that_lead_nowhere(write, tmp_path):
    (tmp_path / "loop.nii.gz").symlink_to(tmp_path / "pool.nii.gz")
    (tmp_path / "pool.nii.gz").symlink_to(tmp_path / "loop.nii.gz")
    (tmp_path / "empty").mkdir()
    path = write(
        "A,loop.nii.gz,,train,1",
        "B,a.nii.gz/b.nii.gz,,train,1",
        "C,empty,,train,1",
        "D,a.nii.gz,empty|b.nii.gz,train,1",
    )
    lines = faults(read_manifest, path)
    assert [
        word in line
        for word, line in zip(["loop of links", "does not exist", "no file", "expects files"], lines[1:], strict=True)
    ] == [True] * 4


def test_organs_in_several_files(write, tmp_path):
    manifest = read_manifest(write("A,a.nii.gz,b.nii.gz | c.nii.gz,train,1"))
    assert manifest.cases[0].organs == (tmp_path / "b.nii.gz", tmp_path / "c.nii.gz")


def test_nothing_is_touched_without_check_files(write):
    manifest = read_manifest(write("A,there/is/none.nii.gz,no/folder,train,1"), check_files=False)
    assert manifest.cases[0].image.name == "none.nii.gz"
    with pytest.raises(InputError, match="does not exist"):
        read_manifest(manifest.path)


def test_labels_of_a_separate_file(write, caplog):
    path = write("A,a.nii.gz,,train,63", "B,b.nii.gz,,train,7", header="id,image,organs,split,age")
    labels = write("B,1,-1", "Z,0,0", header="id,nodule,mass", name="labels.csv")
    manifest = read_manifest(path, labels_csv=labels)
    assert manifest.labels == ("nodule", "mass")
    assert all(math.isnan(v) for v in manifest.cases[0].label)
    assert manifest.cases[1].label[0] == 1
    assert "no row for A" in caplog.text
    assert read_manifest(path, ["mass"], labels_csv=labels).labels == ("mass",)


def test_faults_of_a_separate_file(write):
    path = write("A,a.nii.gz,,train", header="id,image,organs,split")
    lines = faults(read_manifest, path, labels_csv=write("A,1", "A,0", ",1", "B,9", header="id,nodule", name="l.csv"))
    assert [w in line for w, line in zip(["row 3 (id 'A')", "row 4", "'9'"], lines[1:], strict=True)] == [True] * 3
    with pytest.raises(
        InputError, match=r"expected rows for the ids of cases\.csv \(such as 'A'\), got none of them but 'a'"
    ):
        read_manifest(path, labels_csv=write("a,1", header="id,nodule", name="l.csv"))


def test_another_split_column(write):
    path = write("A,a.nii.gz,,train,1,val", header=HEADER + ",fold0")
    assert read_manifest(path, split_column="fold0").splits == {"val": 1}
    with pytest.raises(InputError, match="'fold1' is missing; nearest: fold0"):
        read_manifest(path, split_column="fold1")


@pytest.mark.slow
def test_a_large_manifest_is_checked_in_seconds(tmp_path):
    names = [f"finding_{i}" for i in range(83)]
    rows = [
        f"c{i},scans/c{i}.nii.gz,organs/c{i},{'train' if i % 5 else 'val'},p{i}" + ",1,0,,-1,nan".__mul__(16) + ",0,1,0"
        for i in range(4000)
    ]
    (tmp_path / "cases.csv").write_text("\n".join([",".join(["id,image,organs,split,patient", *names]), *rows]))
    start = time.process_time()
    assert len(read_manifest(tmp_path / "cases.csv", check_files=False).cases) == 4000
    # 36,316 rows of RAD-ChestCT with 84 labels in under ten seconds, on any machine that trains.
    assert time.process_time() - start < 10 * 4000 / 36316


def test_manifest_labels_splits_table_and_volumes_together(write, tmp_path, monkeypatch):
    """What stands in four files, with one line for each fault; the volumes (empty files here) as long as time is."""
    cases = write("A,a.nii.gz,,train", "B,b.nii.gz,,val", "C,gone.nii.gz,,val", header="id,image,organs,split")
    labels = write("A;2", "A;1", "B;1", header="id;nodul", name="labels.csv")
    splits = write("A;train", "Z;val", header="id;split", name="splits.csv")
    table = {"organs": {"lung": 1}, "labels": {"nodule": ["lung"]}}
    lines = faults(checked_manifest, cases, table, None, str(splits), labels_csv=labels)
    told = "\n".join(lines[1:])
    assert lines[0] == f"{cases}: 9 faults"
    for words in (
        *("labels.csv: expected columns separated by commas", "nearest: nodule", "row 2 (id 'A'): label 'nodul'"),
        *("labels.csv, row 3 (id 'A'): expected every id once", "gone.nii.gz, which does not exist"),
        *("splits.csv: expected columns separated by commas", "splits.csv, row 3: expected the id of a case"),
        *("row 2 (id 'A'): expected a readable NIfTI", "row 3 (id 'B'): expected a readable NIfTI"),
    ):
        assert words in told
    clock = itertools.count(0, 6)  # each look at it takes six seconds
    monkeypatch.setattr(manifest_look, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    lines = faults(checked_manifest, cases, table, None, str(splits), labels_csv=labels)
    assert lines[0] == f"{cases}: 8 faults (1 of 2 cases were looked into; camtrain doctor looks into all)"
    with not_looking():
        assert len(faults(checked_manifest, cases, table, None, str(splits), labels_csv=labels)) == 8
    wrong = faults(checked_manifest, cases, {"organs": {}}, None, None, check_files=False, labels_csv=labels)
    assert len(wrong) == 5  # the table's fault among them; no file is touched
