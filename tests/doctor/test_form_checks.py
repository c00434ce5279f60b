"""Faults of the manifest itself, each written into a real file; no volume is opened for them."""

from __future__ import annotations

import pytest

from camtrain.doctor import Extent
from camtrain.doctor.sheet import read_sheet

HEADERS = Extent(headers_only=True)


def test_a_sound_study_gives_no_error_and_no_warning(study):
    found = study.examine(spacing=2.0, size=(24, 20, 24))
    assert found.bad == []
    assert not found.examination.fails
    assert found.examination.stages == ["form", "headers", "contents"]
    assert len(found.examination.facts.contents) == 12
    assert {f.check for f in found.findings} == set()


@pytest.mark.parametrize(("mark", "word"), [(";", "semicolons"), ("\t", "tabs")])
def test_sheet_other_separators(study, mark, word):
    text = study.write().read_text().replace(",", mark)
    finding = study.examine(text=text).of("sheet", "error")
    assert word in finding.got


def test_sheet_other_encodings(study):
    study.rows[0][0] = "Müller"
    text = study.write().read_text().encode("latin-1")
    assert "latin-1" in study.examine(text=text).of("sheet", "error").got
    assert read_sheet(study.folder / "cases.csv").rows[0][1]["id"] == "Müller"


def test_a_byte_order_mark_is_fine(study):
    assert study.examine(text=b"\xef\xbb\xbf" + study.write().read_bytes()).bad == []


def test_sheet_missing_empty_or_ragged(study):
    study.rows[2] += ["surplus"]
    study.rows[4] = study.rows[4][:3]
    finding = study.examine().of("sheet", "error")
    assert [place.where.rsplit(" ", 1)[1] for place in finding.places] == ["4", "6"]
    assert "empty" in study.examine(text="").of("sheet", "error").got
    assert "no cases" in study.examine(text=",".join(study.header) + "\n").of("sheet", "error").title
    assert "No such file" in study.examine(manifest=study.folder / "other.csv").of("sheet", "error").got


def test_columns_missing_or_twice(study):
    study.header[1] = "imge"
    finding = study.examine().of("columns", "error")
    assert "'image'" in finding.title
    assert "nearest: imge" in finding.got
    study.header[1], study.header[6] = "image", "nodule"
    assert "2 times" in study.examine().of("columns", "error").title


@pytest.mark.slow
def test_ids_twice_or_empty(study):
    study.rows[3][0] = "c1"
    assert study.examine().of("ids", "error").places[0].got == "as in row 3 (train)"
    study.rows[3][0] = ""
    assert "without a value in the column 'id'" in study.examine().of("ids", "error").title


def test_paths_all_missing_files_at_once(study):
    study.rows[1][1], study.rows[5][1], study.rows[6][2] = "gone.nii.gz", "no/folder.nii.gz", "gone_seg.nii.gz"
    (study.folder / "loop.nii.gz").symlink_to(study.folder / "loop.nii.gz")
    study.rows[8][1] = "loop.nii.gz"
    found = study.examine()
    assert sorted(found.ids("paths")) == ["c1", "c5", "c6", "c8"]
    told = {place.id: place.got for f in found.findings if f.check == "paths" for place in f.places}
    assert told["c5"].startswith("no folder")
    assert "circle" in told["c8"]
    assert found.examination.fails
    assert len(found.examination.facts.image_headers) == 12  # the others are looked at all the same


def test_label_values(study):
    study.rows[0][5], study.rows[2][5], study.rows[3][6] = "yes", "2", "NaN"
    finding = study.examine().of("label_values", "error")
    assert [place.got for place in finding.places] == ["'yes'", "'2'"]
    assert "'nodule'" in finding.title


def test_rules_a_label_misspelt_by_a_letter(study):
    study.header[5] = "nodul"
    finding = study.examine().of("rules", "error")
    assert "'nodul'" in finding.title
    assert "nearest: nodule" in finding.got
    assert study.examine(labels=["cardiomegaly"]).bad == []


def test_organ_table_that_cannot_be_read(study):
    (study.folder / "table.yaml").write_text("organs: {heart: 3}\nlabels: {nodule: [lung]}\n")
    finding = study.examine().of("organ_table", "error")
    assert "lung" in finding.got


def test_patients_in_two_splits(study):
    study.rows[2][4] = study.rows[9][4] = "p1"
    finding = study.examine().of("patients", "error")
    assert [place.id for place in finding.places] == ["c1", "c2", "c9"]
    assert "patient" in finding.title


def test_patients_one_scan_in_two_splits(study):
    study.rows[9][1] = "c1.nii.gz"
    study.rows[9][2] = "c1_seg.nii.gz"
    assert "scan" in study.examine().of("patients", "error").title


def test_patients_not_said(study):
    study.header.pop(4)
    for row in study.rows:
        row.pop(4)
    assert "whose scans" in study.examine().of("patients", "note").title


def test_splits_that_nobody_has_or_reads(study):
    found = study.examine(HEADERS, train_split="training", test_splits=["external"])
    assert "'training'" in found.of("splits", "error").title
    assert "'external'" in found.of("splits", "warning").title
    assert "'test'" in " ".join(f.title for f in found.findings if f.severity == "note")


def test_made_tells_what_no_other_check_knows(study):
    found = study.examine(window=[800, -1000])
    assert "low < high" in found.of("made", "error").got
    study.rows[0][0] = study.rows[1][0]
    assert [f.check for f in study.examine().findings if f.severity == "error"] == ["ids"]


def test_all_faults_of_all_kinds_at_once(study):
    study.rows[0][5] = "maybe"
    study.rows[1][1] = "gone.nii.gz"
    study.rows[3][0] = "c2"
    study.rows[4][4] = "p9"
    (study.folder / "c5.nii.gz").write_bytes((study.folder / "c5.nii.gz").read_bytes()[:400])
    found = study.examine()
    assert {"label_values", "paths", "ids", "patients", "unreadable"} <= {
        f.check for f in found.findings if f.severity == "error"
    }
