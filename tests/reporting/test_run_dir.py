from __future__ import annotations

import csv
import os
import stat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from camtrain._errors import InputError
from camtrain.reporting import RunDir, Score
from camtrain.reporting._files import distinct, file_stem, replacing


def score(epoch=0, step=10, label="nodule", value=0.5, measure="organ_iou"):
    return Score(epoch, step, "val", "hirescam", label, measure, value)


def test_new_runs_never_share_a_folder(tmp_path, monkeypatch):
    runs = [RunDir(tmp_path) for _ in range(20)]
    assert len({run.path for run in runs}) == 20
    assert all(run.path.parent == tmp_path / "camtrain" for run in runs)
    # Even when chance gives a name that is taken, the taken folder is left alone.
    draws = iter(["aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr("camtrain.reporting.run_dir.secrets.token_hex", lambda n: next(draws))
    monkeypatch.setattr("camtrain.reporting.run_dir.time.strftime", lambda f: "now")
    assert [RunDir(tmp_path).id, RunDir(tmp_path).id] == ["now-aaaa", "now-bbbb"]


def test_a_resumed_run_goes_on(tmp_path):
    run = RunDir(tmp_path)
    run.write_scores([score(0), score(1, 20)])
    again = RunDir(tmp_path, run.id)
    again.write_scores([score(2, 30)])
    assert [row.epoch for row in run.read_scores()] == [0, 1, 2]


def test_ids_leave_the_global_random_state_alone(tmp_path):
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    RunDir(tmp_path)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize("run_id", ["", "..", ".hidden", "a/b", "a b", "x" * 200])
def test_bad_ids(tmp_path, run_id):
    with pytest.raises(InputError, match="run id"):
        RunDir(tmp_path, run_id)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "camtrain").write_text("")
    with pytest.raises(InputError, match="cannot make the run folder"):
        RunDir(tmp_path)


def test_a_repeated_epoch_replaces_its_rows(tmp_path):
    run = RunDir(tmp_path)
    run.write_scores([score(label="a", value=0.1), score(label="b", value=0.2), score(1, 20, "a", 0.3)])
    run.write_scores([score(label="b", value=0.9), score(label="c", value=0.4)])
    rows = {(r.epoch, r.label): r.value for r in run.read_scores()}
    assert rows == {(0, "a"): 0.1, (0, "b"): 0.9, (0, "c"): 0.4, (1, "a"): 0.3}
    assert len(run.read_scores()) == 4


def test_a_later_epoch_is_appended_without_reading_and_gives_the_same_file(tmp_path, monkeypatch):
    def epoch(number, step, *more):
        rows = [
            Score(number, step, split, "", label, "auroc", number + 0.1) for split in ("val", "b") for label in "xy"
        ]
        return [*rows, Score(number, step, "val", "", "z", "auroc", float("nan")), *more]

    twice = Score(2, 20, "val", "", "x", "auroc", 9.0)  # a row that is given twice counts as it came last
    epochs = [epoch(0, 5), epoch(1, 10), epoch(2, 20, twice), epoch(2, 20), epoch(1, 10), epoch(3, 30)]
    long, reads = RunDir(tmp_path / "a"), []
    read = RunDir.read_scores
    monkeypatch.setattr(RunDir, "read_scores", lambda self: reads.append(len(reads)) or read(self))
    for rows in epochs:
        long.write_scores(rows)
    assert len(reads) == 3  # the first, and the two that come back to an earlier place
    for rows in epochs:
        merging = RunDir(tmp_path / "b", "each")  # knows nothing of what it wrote before
        merging.write_scores(rows)
    assert long.scores_path.read_bytes() == merging.scores_path.read_bytes()
    long.scores_path.write_text("spoilt")
    with pytest.raises(InputError, match="columns"):
        long.write_scores(epoch(4, 40))


def test_undefined_scores_are_left_out_and_take_an_old_value_with_them(tmp_path):
    run = RunDir(tmp_path)
    run.write_scores([score(value=0.5), score(label="b", value=float("nan")), score(label="c", value=float("inf"))])
    assert [r.label for r in run.read_scores()] == ["nodule"]
    run.write_scores([score(value=float("nan"))])
    assert run.read_scores() == []


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=30), st.floats(allow_nan=False, allow_infinity=False))
def test_any_label_and_value_round_trip(tmp_path_factory, label, value):
    run = RunDir(tmp_path_factory.mktemp("run"))
    label = label.replace("\r", "").replace("\0", "").encode("utf-8", "ignore").decode()
    run.write_scores([score(label=label, value=value)])
    assert run.read_scores() == [score(label=label, value=value)]


def test_scores_are_a_plain_csv(tmp_path):
    run = RunDir(tmp_path)
    run.write_scores([score(label='a, "b"', value=np.float32(0.25))])
    with run.scores_path.open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {
                "epoch": "0",
                "step": "10",
                "split": "val",
                "method": "hirescam",
                "label": 'a, "b"',
                "measure": "organ_iou",
                "value": "0.25",
            }
        ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,value\na,1\n", "expected the columns epoch"),
        ("{h}\n0,1,val\n", "line 2"),
        ("{h}\nx,1,v,m,l,s,1\n", "line 2"),
    ],
)
def test_a_spoilt_file_is_named_not_overwritten(tmp_path, text, message):
    run = RunDir(tmp_path)
    run.scores_path.write_text(text.format(h=",".join(Score._fields)))
    before = run.scores_path.read_bytes()
    with pytest.raises(InputError, match=message):
        run.write_scores([score()])
    assert run.scores_path.read_bytes() == before


def test_nothing_half_written(tmp_path):
    target = tmp_path / "deep" / "file.txt"

    def fail():
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(target.parent.iterdir()) == []
    with replacing(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


def test_files_are_readable_by_the_group_as_umask_says(tmp_path):
    old = os.umask(0o022)
    try:
        run = RunDir(tmp_path)
        run.write_scores([score()])
    finally:
        os.umask(old)
    assert stat.S_IMODE(run.scores_path.stat().st_mode) == 0o644


def test_pictures_and_panel(tmp_path):
    run = RunDir(tmp_path)
    picture = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    path = run.save_picture(picture, epoch=3, case="case_7", label="nodule")
    assert path == run.path / "epochs" / "0003" / "case_7_nodule.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)
    test = run.save_picture(picture, epoch=3, case="case_7", label="nodule", split="test")
    assert test.parent == path.parent / "test"
    odd = run.save_picture(picture, epoch=3, case="../../a b", label="x/y")
    assert odd.parent == path.parent
    assert run.read_panel() is None
    run.write_panel({"cases": ["a"], "scale": {"nodule": 0.5}})
    assert run.read_panel() == {"cases": ["a"], "scale": {"nodule": 0.5}}
    run.panel_path.write_text("{")
    with pytest.raises(InputError, match="not readable as JSON"):
        run.read_panel()


@given(st.lists(st.text(max_size=12), unique=True, max_size=8))
def test_different_names_keep_different_files(texts):
    stems = [file_stem(t) for t in texts]
    assert len(set(stems)) == len(stems)
    assert all(s and "/" not in s and not s.startswith(".") and "\0" not in s for s in stems)


def test_distinct_keeps_names_apart():
    assert distinct(["a", "a_2", "a", "a"]) == ["a", "a_2", "a_3", "a_4"]
