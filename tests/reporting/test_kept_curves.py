"""Scores that were read once are not read again, and never believed once the file says something else."""

from __future__ import annotations

import pytest

from camtrain.reporting import RunDir, RunReport, Score
from camtrain.reporting import kept_curves as module
from camtrain.reporting.kept_curves import KeptCurves
from camtrain.reporting.report_digest import Curves

LABELS = ["nodule", 'of two\nlines, "quoted"', "肺"]


def rows(*epochs, value=0.0):
    return [Score(e, e, "val", "cam", label, "organ_iou", value + e / 10) for e in epochs for label in LABELS]


def said(curves):
    return curves.labels, curves.epochs, curves.for_script(), len(curves)


@pytest.fixture
def parsed(monkeypatch):
    """How many rows each reading has made."""
    counts = []
    real = module.scores_in
    monkeypatch.setattr(module, "scores_in", lambda lines: counts.append(len((found := real(lines))[0])) or found)
    return counts


def test_only_new_rows_are_read(tmp_path, parsed):
    run = RunDir(tmp_path)
    kept = KeptCurves()
    assert kept.read(run.scores_path)[1:] == (0, [])
    for epoch in range(4):
        run.write_scores(rows(epoch))
        curves, count, faults = kept.read(run.scores_path)
        assert said(curves) == said(Curves(run.read_scores()))
        assert (count, faults) == (3 * (epoch + 1), [])
    kept.read(run.scores_path)
    assert parsed == [3, 3, 3, 3]


def test_what_was_changed_is_read_anew(tmp_path, parsed):
    run, kept = RunDir(tmp_path), KeptCurves()
    run.write_scores(rows(0, 1, 2))
    kept.read(run.scores_path)
    run.write_scores(rows(1, value=0.5))  # resumed from before: rows take the place of others
    assert said(kept.read(run.scores_path)[0]) == said(Curves(run.read_scores()))
    run.scores_path.write_text(run.scores_path.read_text().replace("0.2", "0.9"))  # the same length
    assert kept.read(run.scores_path)[0].last("val", "cam", "organ_iou", "nodule") == 0.9
    whole = run.scores_path.read_bytes()
    run.scores_path.write_bytes(whole[:60])
    assert said(kept.read(run.scores_path)[0]) == said(Curves([]))
    run.scores_path.write_bytes(whole)
    assert len(kept.read(run.scores_path)[0]) == 3
    run.scores_path.unlink()
    assert len(kept.read(run.scores_path)[0]) == 0
    assert parsed == [9, 9, 9, 0, 9]


def test_a_damaged_file_is_read_whole_every_time(tmp_path):
    run, kept = RunDir(tmp_path), KeptCurves()
    run.write_scores(rows(0))
    with run.scores_path.open("a") as file:
        file.write("1,x\n")
    for _ in range(2):
        curves, count, (fault,) = kept.read(run.scores_path)
        assert (len(curves), count) == (3, 3)
        assert "line 6: not a row of scores" in fault
    run.scores_path.write_text(run.scores_path.read_text().removesuffix("1,x\n") + "1,1,val,cam,nodule,organ_iou,0.")
    assert kept.read(run.scores_path)[0].last("val", "cam", "organ_iou", "nodule") == 0.0  # half a number
    with run.scores_path.open("a") as file:
        file.write("75\n")
    assert kept.read(run.scores_path)[0].last("val", "cam", "organ_iou", "nodule") == 0.75


def test_the_line_of_a_fault_is_counted_from_the_beginning(tmp_path):
    run, kept = RunDir(tmp_path), KeptCurves()
    run.write_scores(rows(0, 1))
    kept.read(run.scores_path)
    before = run.scores_path.read_text()
    with run.scores_path.open("a") as file:
        file.write("1,x\n")
    curves, count, (fault,) = kept.read(run.scores_path)
    assert (len(curves), count) == (3, 6)
    assert f"line {before.count(chr(10)) + 1}: not a row of scores" in fault


def test_a_report_keeps_its_curves(tmp_path, parsed):
    run = RunDir(tmp_path)
    report = RunReport(run.path)
    for epoch in range(3):
        run.write_scores(rows(epoch))
        report.write()
    assert parsed == [3, 3, 3]
