"""Who has organs, and the test whether having them predicts a label."""

from __future__ import annotations

import io
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import fisher_exact

from camtrain._errors import InputError
from camtrain.data.organ_reporting import cases_report, exact_test, organ_report, report_and_warn


def hypergeometric(k, present, absent, drawn):
    return math.comb(present, k) * math.comb(absent, drawn - k) / math.comb(present + absent, drawn)


@pytest.mark.parametrize("table", [(3, 5, 1, 7), (0, 4, 3, 9), (6, 6, 2, 11), (2, 20, 3, 8)])
def test_exact_p_sums_the_tables_that_are_no_likelier(table):
    a, present, b, absent = table
    drawn = a + b
    chances = [
        hypergeometric(k, present, absent, drawn) for k in range(max(0, drawn - absent), min(present, drawn) + 1)
    ]
    own = hypergeometric(a, present, absent, drawn)
    p, least = exact_test(*table)
    assert p == pytest.approx(sum(chance for chance in chances if chance <= own * (1 + 1e-9)))
    assert least <= p


def test_exact_p_is_scipys_for_large_tables():
    for table in ((3000, 9000, 9000, 30000), (10, 400, 30, 900), (0, 30000, 9, 9000)):
        a, present, b, absent = table
        expected = fisher_exact([[a, present - a], [b, absent - b]]).pvalue
        assert exact_test(*table)[0] == pytest.approx(expected, rel=1e-5)


def test_counts_leave_unknown_truths_out():
    label = [[1, np.nan], [1, 1], [0, 0], [0, np.nan], [np.nan, 1]]
    report = organ_report(["a", "b"], label, [True, False, True, False, True], ["train"] * 4 + ["val"])
    a, b = (row for row in report.rows if row.split == "train")
    assert (a.present, a.present_with, a.absent, a.absent_with, a.unknown) == (2, 1, 2, 1, 0)
    assert (b.present, b.present_with, b.absent, b.absent_with, b.unknown) == (1, 0, 1, 1, 2)
    assert a.difference == 0
    assert a.auroc == 0.5
    assert b.difference == -1
    assert report.cases == {"train": (4, 2), "val": (1, 1)}
    assert report.partial
    val = [row for row in report.rows if row.split == "val"]
    assert math.isnan(val[1].difference)
    assert val[0].verdict == "too few"
    assert report.line("val") == "val: 1 cases, 1 with organs; nobody with a"


def test_a_label_that_organs_predict_is_found_among_many():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, (300, 40)).astype(float)
    has = rng.random(300) < 0.3 + 0.4 * label[:, 7]
    report = organ_report([f"l{i}" for i in range(40)], label, has, ["train"] * 300)
    assert [row.label for row in report.told] == ["l7"]
    (sentence,) = report.warnings()
    assert "having organs predicts 'l7' in 'train'" in sentence
    assert report.told[0].auroc == pytest.approx((1 + report.told[0].difference) / 2)


@pytest.mark.slow
def test_chance_is_rarely_taken_for_more():
    # 200 reports of 20 labels without any dependence: Holm's promise is at most one false alarm in 20 reports.
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(200):
        label = (rng.random((60, 20)) < 0.3).astype(float)
        report = organ_report([str(i) for i in range(20)], label, rng.random(60) < 0.5, ["train"] * 60)
        alarms += bool(report.told)
    assert alarms <= 17  # 10 expected at most; 17 are exceeded once in a hundred times


def test_scans_of_one_patient_count_once():
    # Eight patients with ten scans each: 80 scans look like proof, 8 people are none.
    label = [[float(patient < 4)] for patient in range(8) for _ in range(10)]
    has = [patient in (0, 1, 2, 4) for patient in range(8) for _ in range(10)]
    people = [f"p{patient}" for patient in range(8) for _ in range(10)]
    alone = organ_report(["a"], label, has, ["train"] * 80)
    together = organ_report(["a"], label, has, ["train"] * 80, people)
    assert alone.told
    assert not together.told
    assert together.rows[0].p == pytest.approx(exact_test(3, 4, 1, 4)[0])
    assert together.rows[0].present == 40  # what is shown are all scans


def test_large_data_with_a_difference_too_small_to_matter_is_no_warning():
    label = [[1.0]] * 20000 + [[0.0]] * 20000
    has = [i % 100 < 53 for i in range(20000)] + [i % 100 < 50 for i in range(20000)]
    (row,) = organ_report(["a"], label, has, ["train"] * 40000).rows
    assert row.holm < 1e-6
    assert row.difference == pytest.approx(0.03)
    assert row.verdict == "no"


def test_too_few_to_tell_is_said():
    (row,) = organ_report(["a"], [[1.0], [1.0], [0.0], [0.0]], [True, True, False, False], ["train"] * 4).rows
    assert row.difference == 1
    assert row.verdict == "too few"


def test_rows_that_cannot_show_anything_cost_the_others_nothing():
    label = np.array([[1.0] * 6 + [0.0] * 6]).T
    has = [True] * 6 + [False] * 6
    alone = organ_report(["a"], label, has, ["train"] * 12).rows[0]
    constant = np.concatenate([label, np.zeros((12, 50))], axis=1)
    among = organ_report([str(i) for i in range(51)], constant, has, ["train"] * 12).rows[0]
    assert among.holm == alone.holm == alone.p


def test_table_and_log(caplog):
    label = [[1.0]] * 20 + [[0.0]] * 20
    report = organ_report(["mass"], label, [True] * 20 + [False] * 20, ["train"] * 40)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(report.table("train"))
    text = console.export_text()
    assert "20 (100 %)" in text
    assert "predicts" in text
    assert report.line("train") == "train: 40 cases, 20 with organs"
    with caplog.at_level(logging.INFO):
        report_and_warn(report, "cases.csv")
    assert "cases.csv: 20 of 40 cases of 'train' have organs" in caplog.text
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "having organs predicts 'mass'" in warning.getMessage()


def test_many_warnings_are_cut_to_a_list_of_names(caplog):
    label = np.repeat([[1.0]] * 20 + [[0.0]] * 20, 9, axis=1)
    report = organ_report([f"l{i}" for i in range(9)], label, [True] * 20 + [False] * 20, ["train"] * 40)
    report_and_warn(report, "cases.csv")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 7
    assert all(f"l{i} (train)" in warnings[-1] for i in (6, 7, 8))


def test_cases_of_a_manifest():
    cases = [SimpleNamespace(label=(1.0,), organs=None, split="train", patient="") for _ in range(3)]
    assert cases_report(["a"], cases).cases == {"train": (3, 0)}
    assert not cases_report(["a"], cases).partial


def test_lengths_must_agree():
    with pytest.raises(InputError, match="expected truths"):
        organ_report(["a", "b"], [[1.0]], [True], ["train"])


def test_brackets_in_names_are_no_markup():
    report = organ_report(["[/b]a"], [[1.0], [0.0]], [True, False], ["[/red]"] * 2)
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(report.table("[/red]"))
    shown = console.export_text()
    assert "[/b]a" in shown
    assert "[/red]: 2 cases" in shown
