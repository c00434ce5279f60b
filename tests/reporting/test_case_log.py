from __future__ import annotations

import math

import pytest

from camtrain._errors import InputError
from camtrain.reporting import CaseRow, RunDir, read_cases, write_cases

ROW = CaseRow(0, 9, "val", '<b>a</b>, "x"\n', "nodule ü", 1, 0.25, "hirescam", None, 0.5, 0.02, "hard")


def test_rows_come_back_and_replace_their_own(tmp_path):
    run = RunDir(tmp_path)
    assert read_cases(run) == []
    other = ROW._replace(epoch=1, organ_iou=0.75, energy_inside=None, threshold=None)
    write_cases(run, [ROW, other])
    assert read_cases(run) == [ROW, other]
    write_cases(run, [ROW._replace(probability=0.5)])
    assert read_cases(run) == [other, ROW._replace(probability=0.5)]


def test_undefined_numbers_are_empty_cells(tmp_path):
    run = RunDir(tmp_path)
    write_cases(run, [ROW._replace(probability=math.nan, energy_inside=math.inf)])
    (row,) = read_cases(run)
    assert math.isnan(row.probability)
    assert row.energy_inside is None


@pytest.mark.parametrize(("text", "message"), [
    ("a,b\n", "expected the columns epoch, step"),
    (",".join(CaseRow._fields) + "\n1,2,val\n", "line 2: not a row of cases"),
])  # fmt: skip
def test_a_changed_file_is_named(tmp_path, text, message):
    run = RunDir(tmp_path)
    run.cases_path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_cases(run)
