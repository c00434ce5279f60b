"""What a recipe refuses before it trains, and what an interruption leaves: one sentence, and nothing half done."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest
import torch
from recipe_tools import RECIPES, started

from camtrain import InputError

sys.path.insert(0, str(RECIPES))
import _runs
import _start

RUN = {"job": {"seed": 0}, "result": {"auroc": 0.5}, "seconds": 1.0}


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_a_count_is_a_whole_number_from_one_on(text):
    with pytest.raises(_start.argparse.ArgumentTypeError, match=f"at least 1, got '{text}'"):
        _start.count(text)
    assert _start.count("12") == 12


def test_out_must_be_a_folder_that_can_be_written_to(tmp_path):
    taken = tmp_path / "taken"
    taken.touch()
    for wrong in (taken, taken / "below", "/proc/nope/out"):
        with pytest.raises(_start.argparse.ArgumentTypeError, match=r"expects a folder.*: choose another"):
            _start.out_folder(str(wrong))
    assert _start.out_folder(str(tmp_path / "a" / "b")).is_dir()


def test_a_mistyped_tree_is_refused_and_not_filled(tmp_path):
    with pytest.raises(_start.argparse.ArgumentTypeError, match="without JPEGImages: name the folder"):
        _start.voc_tree(str(tmp_path / "VOC2021"))
    assert not (tmp_path / "VOC2021").exists()
    with pytest.raises(_start.argparse.ArgumentTypeError, match="models/"):
        _start.with_networks(str(tmp_path))


def test_a_tree_is_whole_or_not_there(tmp_path, monkeypatch):
    def interrupted(root, **settings):
        (root / "JPEGImages").mkdir(parents=True)
        raise KeyboardInterrupt

    small = {"train": 2, "val": 1, "test": 0, "size": 32}
    with monkeypatch.context() as patch:
        patch.setattr(_start, "make_voc_tree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _start.drawn_tree(tmp_path / "tree", **small)
    assert not (tmp_path / "tree").exists()
    assert len(list((_start.drawn_tree(tmp_path / "tree", **small) / "JPEGImages").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_weights_are_whole_or_not_there(tmp_path, monkeypatch):
    _start.keep({"a": torch.ones(1)}, tmp_path / "models" / "net.pt")

    def torn(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(_start.torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        _start.keep({"a": torch.zeros(1)}, tmp_path / "models" / "net.pt")
    assert torch.load(tmp_path / "models" / "net.pt", weights_only=True)["a"].item() == 1


@pytest.mark.parametrize("damage", [b'{"job": {"se', b"[]\n42\n{}\n", b'{"job": {"seed": 0}}\n', b"\xff\xfe\x00bad\n"])
def test_damaged_lines_are_done_again_and_swallow_nothing(tmp_path, damage):
    (tmp_path / "runs.jsonl").write_bytes(json.dumps(RUN).encode() + b"\n" + damage)
    with pytest.warns(UserWarning, match="line 2: cut off or damaged"):
        runs = _runs.finish([{"seed": 0}, {"seed": 1}], lambda job: {"auroc": 1.0}, tmp_path)
    assert runs[0] == RUN
    with pytest.warns(UserWarning, match="unless a later line"):
        assert _runs.finished(tmp_path)[-1]["result"] == {"auroc": 1.0}


def end_this_process(job):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told_in_a_sentence(tmp_path):
    with pytest.raises(InputError, match=r"ended from outside.*start the same command again"):
        _runs.finish([{"seed": 0}], end_this_process, tmp_path, workers=2)


@pytest.mark.slow
def test_a_refusal_is_one_line_and_code_two(tmp_path):
    small = ("--cases", 16, "--seeds", 0, "--arms", "FlattenNet", "--out", tmp_path / "out")
    done = started(RECIPES / "hirescam_paper.py", *small, "--size", 8, 24, 18, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: size expects three whole numbers of at least 16")
    assert "Traceback" not in done.stderr


def test_a_study_has_one_trunk(tmp_path):
    import pretrain_slices

    wanted, path = {"size": [24, 24, 18], "cases": 6, "epochs": 1}, tmp_path / "trunk.pt"
    assert not pretrain_slices.same_trunk(path, wanted)
    path.touch()
    path.with_suffix(".json").write_text(json.dumps(wanted | {"auroc": 0.5}))
    assert pretrain_slices.same_trunk(path, wanted)
    with pytest.raises(InputError, match="name another --out, or delete"):
        pretrain_slices.same_trunk(path, wanted | {"cases": 8})
