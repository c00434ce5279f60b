"""A run that is ended from outside and started again ends where the run without interruption ends."""

from __future__ import annotations

import csv
import signal

import pytest
import torch


def checkpoints(folder):
    return sorted(folder.glob("r/version_*/checkpoints/last.ckpt"))


def load(path):
    return torch.load(path, weights_only=True)


def equal(one, other):
    """The same to the last bit, whatever it is made of."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.slow
def test_a_run_that_was_ended_twice_ends_as_the_whole_run(runs, tmp_path):
    """Draws of dropout and augmentation, order of cases, schedule, scores: by SIGTERM, then by kill -9."""
    last = ["--ckpt_path", "last"]
    whole, term, kill, end = runs(
        runs.fit("whole"),
        runs.fit("ended", *runs.ending(step=8, sent=signal.SIGTERM), *last, "--data.num_workers", 2),
        runs.fit("ended", *runs.ending(step=13, sent=signal.SIGKILL), *last),
        runs.fit("ended", *last, "--data.num_workers", 2),
    )
    assert whole[0] == [0], whole[1][-3000:]
    assert term[0] == [143], term[1][-3000:]
    assert kill[0] == [-signal.SIGKILL], kill[1][-3000:]
    assert end[0] == [0], end[1][-3000:]
    once, twice = load(checkpoints(tmp_path / "whole")[-1]), load(checkpoints(tmp_path / "ended")[-1])
    assert once["global_step"] == twice["global_step"] == 15
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert equal(once[key], twice[key]), key
    for key, state in once["callbacks"].items():
        if "ModelCheckpoint" not in key:
            assert equal(without_places(state), without_places(twice["callbacks"][key])), key
    # Three versions of the logger: the run's own folder went on from one to the next, and holds all epochs.
    assert len(checkpoints(tmp_path / "ended")) == 3
    assert scores(tmp_path / "whole") == scores(tmp_path / "ended")
    assert "SIGTERM; the run goes on from" in term[1]


def without_places(state):
    return {k: without_places(v) if isinstance(v, dict) else v for k, v in state.items() if k not in ("run_id", "root")}


def scores(folder):
    last = sorted(folder.glob("r/version_*"))[-1]
    (file,) = last.glob("camtrain/*/scores.csv")
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert {row["epoch"] for row in rows} == {"0", "1", "2"}
    assert (file.parent / "report.html").exists()
    return rows


@pytest.mark.slow
def test_one_of_two_processes_dies_and_both_are_told_to_end(runs, tmp_path):
    """Within seconds, with a sentence; the restarts end where the run without interruption ends."""
    last = ["--ckpt_path", "last"]
    two = {"processes": 2, "devices": 2, "strategy": "ddp"}
    whole, dead, told, end = runs(
        runs.fit("whole", **two),
        runs.fit("ended", *runs.ending(step=4, sent=signal.SIGKILL, rank=1), **two),
        runs.fit("ended", *runs.ending(step=5, sent=signal.SIGTERM, rank=1), *last, "--data.num_workers", 2, **two),
        runs.fit("ended", *last, **two),
        seconds=120,
    )
    assert whole[0] == end[0] == [0, 0], whole[1][-3000:] + end[1][-3000:]
    assert dead[0] == [1, -signal.SIGKILL], dead[1][-3000:]
    assert "because another process of this run has gone" in dead[1]
    assert told[0] == [143, 143], told[1][-3000:]
    assert "SIGTERM; the run goes on from" in told[1]
    once, twice = load(checkpoints(tmp_path / "whole")[-1]), load(checkpoints(tmp_path / "ended")[-1])
    assert once["global_step"] == twice["global_step"] == 9
    assert equal(once["state_dict"], twice["state_dict"])
    assert equal(once["optimizer_states"], twice["optimizer_states"])
