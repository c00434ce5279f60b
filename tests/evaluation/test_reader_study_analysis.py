"""From answer files and a key to tables: by hand, and with everything that can be wrong."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from reader_study_tools import LABELS, answer_file, small_key
from scipy.stats import binomtest

from camtrain._errors import InputError
from camtrain.evaluation.reader_study import KeyTask, StudyKey, key_text, parse_key, read_key, save_key
from camtrain.evaluation.reader_study_analysis import analyse_study
from camtrain.evaluation.reader_study_answers import collect_answers
from camtrain.evaluation.reader_study_saving import save_result, study_markdown

KEY = small_key()


def wrong(name):
    """A choice that is not the right one."""
    return next(c for c in LABELS if c != KEY.tasks[name].label)


def analysed(tmp_path, rows, **options):
    return analyse_study(KEY, collect_answers(KEY, [answer_file(tmp_path / "a.csv", rows)]), repeats=200, **options)


def test_by_hand(tmp_path):
    right = {f"h{i}": KEY.tasks[f"h{i}"].label for i in range(6)} | {"h5": wrong("h5")}
    half = {f"g{i}": KEY.tasks[f"g{i}"].label if i < 3 else wrong(f"g{i}") for i in range(5)}
    result = analysed(tmp_path, right | half)
    first, second = result.row("accuracy", "hirescam"), result.row("accuracy", "gradcam")
    assert (first.n, first.value, first.cases, first.readers) == (6, 5 / 6, 3, 1)
    assert (second.n, second.value) == (5, 3 / 5)
    assert (first.chance, first.chance_present) == (0.25, 0.5)
    assert first.p == pytest.approx(binomtest(5, 6, 0.25, alternative="greater").pvalue)
    theirs = binomtest(5, 6).proportion_ci(0.95, method="wilson")
    assert (first.wilson_low, first.wilson_high) == pytest.approx((theirs.low, theirs.high))
    difference = result.row("difference", "hirescam - gradcam")
    assert (difference.n, difference.value) == (5, 2 / 5)  # g5 has no answer: its finding does not count
    # Patients 1 and 2 differ by one finding each: four flips of three patients keep |sum| = 2 or make it 0.
    assert difference.p == pytest.approx(0.5)
    assert difference.p_holm == difference.p
    (reader,) = result.readers
    assert (reader.answered, reader.missing, reader.repeated, reader.seconds) == (11, 7, 0, 2.5)
    assert reader.accuracy == pytest.approx(8 / 11)


def test_trust_has_the_sign_of_the_first_on_either_side(tmp_path):
    prefers_first = {f"t{i}": "1" if i % 2 else "5" for i in range(6)}
    row = analysed(tmp_path, prefers_first).row("trust", "hirescam against gradcam")
    assert (row.value, row.low, row.high, row.n) == (2.0, 2.0, 2.0, 6)
    row = analysed(tmp_path, {f"t{i}": "4" if i % 2 else "2" for i in range(6)}).row(
        "trust", "hirescam against gradcam"
    )
    assert row.value == -1.0
    always_left = analysed(tmp_path, {f"t{i}": "2" for i in range(6)})
    assert always_left.row("trust", "hirescam against gradcam").value == 0.0
    assert always_left.readers[0].left == 1.0


def test_findings_add_up(tmp_path):
    result = analysed(tmp_path, {name: KEY.tasks[name].choices[0] for name in KEY.tasks})
    for part, subject in (("accuracy", "hirescam"), ("accuracy", "gradcam"), ("trust", "hirescam against gradcam")):
        parts = [r for r in result.rows if (r.part, r.subject) == (part, subject) and r.label != "all"]
        assert {r.label for r in parts} == set(LABELS)
        whole = result.row(part, subject)
        assert sum(r.n for r in parts) == whole.n == 6
        assert sum(r.n * r.value for r in parts) == pytest.approx(whole.n * whole.value)


def test_agreement(tmp_path):
    same = [(reader, name, task.label) for reader in ("a", "b") for name, task in KEY.tasks.items() if name[0] == "h"]
    assert analysed(tmp_path, same).agreement["discrimination"] == 1.0
    assert np.isnan(analysed(tmp_path, same).agreement["trust"])
    opposite = [(r, f"t{i}", "1" if (r == "a") == bool(i % 2) else "5") for r in ("a", "b") for i in range(6)]
    assert analysed(tmp_path, opposite).agreement["trust"] < -0.5


def test_guessers_do_not_agree_by_the_choices_that_they_are_offered(tmp_path):
    """Two of forty findings are offered at a time: by name, guessers would agree in half of what they say."""
    rng = np.random.default_rng(0)
    tasks, rows = {}, []
    for i in range(400):
        choices = tuple(f"finding {c}" for c in rng.permutation(40)[:2])
        tasks[f"t{i}"] = KeyTask("discrimination", f"c{i}", f"c{i}", choices[0], ("hirescam",), choices, choices)
        rows += [(reader, f"t{i}", str(rng.choice(choices))) for reader in ("a", "b")]
    key = StudyKey("abc123abc123", tasks)
    answers = collect_answers(key, [answer_file(tmp_path / "a.csv", rows)])
    assert abs(analyse_study(key, answers, repeats=50).agreement["discrimination"]) < 0.15


def test_answers_given_twice(tmp_path):
    first = answer_file(tmp_path / "1.csv", {"h0": wrong("h0"), "h1": KEY.tasks["h1"].label})
    later = answer_file(tmp_path / "2.csv", {"h0": KEY.tasks["h0"].label, "h1": KEY.tasks["h1"].label})
    result = analyse_study(KEY, collect_answers(KEY, [first, later]), repeats=50)
    (reader,) = result.readers
    assert (reader.answered, reader.repeated, reader.contradicted, reader.accuracy) == (2, 2, 1, 1.0)


def test_what_spreadsheets_make_of_it(tmp_path):
    plain = answer_file(tmp_path / "plain.csv", {"h2": LABELS[2], "h3": LABELS[3], "t0": "4"})
    expected = collect_answers(KEY, [plain]).given
    rows = list(csv.reader(plain.read_text().splitlines()))
    for delimiter, mark in ((";", "\ufeff"), ("\t", ""), (",", "\ufeff")):
        path = tmp_path / "again.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            file.write(mark)
            # A spreadsheet with decimal commas.
            csv.writer(file, delimiter=delimiter).writerows([c.replace("2.5", "2,5") for c in row] for row in rows)
            file.write("\n")
        assert collect_answers(KEY, [path]).given == expected


HEAD = "reader,task,answer,seconds,study\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        (HEAD, "at least one answer"),
        ("reader,task,answer,seconds\nann,h0,nodule,1\n", "no column 'study'"),
        (HEAD + "ann,h0,nodule,1,000000000000\n", "study '000000000000', the key of 'abc123abc123'"),
        (HEAD + "ann,h9,nodule,1,abc123abc123\n", "no task 'h9'; known: h0"),
        (HEAD + "ann,h0,nodul,1,abc123abc123\n", "'nodul' is no choice of task h0"),
        (HEAD + "ann,t0,6,1,abc123abc123\n", "'6' is no choice of task t0"),
        (HEAD + " ,t0,5,1,abc123abc123\n", "reader has no name"),
        (HEAD + "ann,t0,5,soon,abc123abc123\n", "expected seconds as a number"),
        (HEAD + "ann,t0,5,nan,abc123abc123\n", "expected seconds as a number"),
        (HEAD + "ann,t0,5,abc123abc123\n", "line 2: expected 5 cells"),
        (HEAD.encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_bad_answers(tmp_path, text, says):
    path = tmp_path / "bad.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=says):
        collect_answers(KEY, [path])


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        collect_answers(KEY, [tmp_path / "none.csv"])
    with pytest.raises(InputError, match="at least one answer"):
        collect_answers(KEY, [])
    with pytest.raises(InputError, match="cannot be read"):
        read_key(tmp_path / "none.json")


def test_a_key_comes_back_whole_and_only_whole(tmp_path):
    path = save_key(KEY, tmp_path / "key.json")
    assert read_key(path) == KEY
    text = key_text(KEY)
    for broken, says in (
        (text.replace('"nodule"', '"effusion"', 1), "changed after it was written"),
        (text[:-20], "is no JSON"),
        ("{}", "not the key of a reader study"),
        ("[]", "not the key of a reader study"),
    ):
        with pytest.raises(InputError, match=says):
            parse_key(broken)


def test_bad_options(tmp_path):
    for options, says in (({"level": 95}, "between 0 and 1"), ({"repeats": 1}, "--repeats expects")):
        answers = collect_answers(KEY, [answer_file(tmp_path / "a.csv", {"t0": "3"})])
        with pytest.raises(InputError, match=says):
            analyse_study(KEY, answers, **options)


def test_files_of_the_analysis(tmp_path):
    result = analysed(tmp_path, {name: KEY.tasks[name].choices[0] for name in KEY.tasks})
    paths = save_result(result, tmp_path / "out")
    assert [p.name for p in paths] == ["analysis.json", "scores.csv", "readers.csv", "analysis.md"]
    said = json.loads((tmp_path / "out" / "analysis.json").read_text(encoding="utf-8"))
    with (tmp_path / "out" / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(said["rows"]) == len(result.rows)
    for row, plain in zip(result.rows, rows, strict=True):
        assert (row.part, row.subject, row.label) == (plain["part"], plain["subject"], plain["label"])
        assert float(plain["value"]) == row.value
        assert (plain["chance"] == "") == np.isnan(row.chance)
    assert "NaN" not in (tmp_path / "out" / "analysis.json").read_text(encoding="utf-8")
    lines = [line for line in study_markdown(result).splitlines() if line.startswith("|")]
    assert all("<b>" not in line for line in lines)
    assert "| hirescam | 6 | 1 | 3 |" in study_markdown(result)


def test_no_trust_tasks_no_trust_table(tmp_path):
    import dataclasses

    key = dataclasses.replace(KEY, tasks={n: t for n, t in KEY.tasks.items() if t.kind == "discrimination"})
    answers = collect_answers(key, [answer_file(tmp_path / "a.csv", {"h0": "nodule"})])
    result = analyse_study(key, answers, repeats=50)
    assert "reasonable" not in study_markdown(result)
    assert list(result.agreement) == ["discrimination"]
