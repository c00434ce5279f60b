"""Runs that meet a fault: each ends as it should, and what is started again ends as if nothing had been."""

from __future__ import annotations

import csv
import signal

import pytest
import torch

LAST = ["--ckpt_path", "last"]


@pytest.fixture(scope="module")
def alone(make_runs, tmp_path_factory):
    """Folder, and (exit statuses, output, is a process left) by name: of runs that share what the imports cost."""
    folder = tmp_path_factory.mktemp("alone")
    runs = make_runs(folder)
    full = runs.ending(step=7, bytes_left=12000)  # no file can grow beyond so many bytes from there on
    without = [c for c in runs.callbacks() if "ModelCheckpoint" not in c["class_path"]]
    planned = {
        "whole": runs.fit("whole"),
        "term": runs.fit("ended", *runs.ending(step=8, group=1), *LAST, "--data.num_workers", 2),
        "validating": runs.fit("ended", *runs.ending(step=10, group=1, validating=1), *LAST, "--data.num_workers", 2),
        "kill": runs.fit("ended", *runs.ending(step=13, sent=signal.SIGKILL), *LAST),
        "end": runs.fit("ended", *LAST, "--data.num_workers", 2),
        "failed": runs.fit("saving", *full),
        "resumed": runs.fit("saving", *LAST),
        "ours": runs.fit("ours", *full, enable_checkpointing=False, callbacks=without),
    }
    return folder, dict(zip(planned, runs(*planned.values()), strict=True))


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


def same_state(once, twice):
    """Of two checkpoints: all that a run goes on with, but where it lies."""
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert equal(once[key], twice[key]), key
    for key, state in once["callbacks"].items():
        if "ModelCheckpoint" not in key:
            assert equal(without_places(state), without_places(twice["callbacks"][key])), key


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
def test_a_run_that_was_ended_again_and_again_ends_as_the_whole_run(alone):
    """Draws of dropout and augmentation, order of cases, schedule, scores: by SIGTERM, then by kill -9."""
    folder, done = alone
    assert done["whole"][0] == [0], done["whole"][1][-3000:]
    assert done["kill"][0] == [-signal.SIGKILL], done["kill"][1][-3000:]
    assert done["end"][0] == [0], done["end"][1][-3000:]
    once, twice = load(checkpoints(folder / "whole")[-1]), load(checkpoints(folder / "ended")[-1])
    assert once["global_step"] == twice["global_step"] == 15
    same_state(once, twice)
    alarms = once["callbacks"]["AttentionMonitor[]"]["alarms"]
    assert alarms["questions"]["answers"]
    assert len(alarms["board"]["history"]["val"]) == 3
    # Four versions of the logger, of which one was killed before a checkpoint: the run's own folder went on from one to
    # the next, and holds all epochs.
    assert [file.parts[-3] for file in checkpoints(folder / "ended")] == ["version_0", "version_1", "version_3"]
    assert scores(folder / "whole") == scores(folder / "ended")


@pytest.mark.slow
def test_sigterm_to_the_workers_too_costs_no_step_and_leaves_no_process(alone):
    """As clusters send it: to the whole process group, at a step and in a validation."""
    folder, done = alone
    for name, version, step in (("term", 0, 9), ("validating", 1, 11)):
        assert done[name][0] == [143], done[name][1][-3000:]
        assert "SIGTERM; the run goes on from" in done[name][1]
        assert "worker" not in done[name][1]
        assert load(folder / f"ended/r/version_{version}/checkpoints/last.ckpt")["global_step"] == step
        assert not done[name][2]


@pytest.mark.slow
def test_a_checkpoint_on_a_full_disk_leaves_the_one_before(alone):
    folder, done = alone
    assert done["failed"][0] == [2], done["failed"][1][-3000:]
    (sentence,) = [line for line in done["failed"][1].splitlines() if line.startswith("error: ")]
    for said in ("could not be written (File too large)", "is whole" if "last.ckpt" in sentence else "nothing was"):
        assert said in sentence
    assert "--ckpt_path last" in sentence
    first, second = checkpoints(folder / "saving")
    assert not list(first.parent.glob(".*"))
    assert load(first)["global_step"] == 5
    assert done["resumed"][0] == [0], done["resumed"][1][-3000:]
    assert equal(load(second)["state_dict"], load(checkpoints(folder / "whole")[0])["state_dict"])


@pytest.mark.slow
def test_camtrains_own_files_on_a_full_disk_end_nothing(alone):
    folder, done = alone
    assert done["ours"][0] == [0], done["ours"][1][-3000:]
    assert done["ours"][1].count("camtrain: writing to") + done["ours"][1].count("the report is not complete") == 1
    (run,) = (folder / "ours").glob("r/version_0/camtrain/*")
    assert not list(run.rglob(".*"))
    with (run / "scores.csv").open() as file:
        assert {row["epoch"] for row in csv.DictReader(file)} == {"0", "1", "2"}  # pictures fail, tables are small
    assert (run / "report.html").read_text().rstrip().endswith("</html>")


@pytest.mark.slow
def test_one_of_two_processes_dies_and_both_are_told_to_end(make_runs, tmp_path):
    """Within seconds, with a sentence; the restarts end where the run without interruption ends."""
    runs = make_runs(tmp_path)
    two = {"processes": 2, "max_epochs": 2, "devices": 2, "strategy": "ddp"}
    whole, dead, first, told, end = runs(
        runs.fit("whole", **two),
        runs.fit("ended", *runs.ending(step=4, sent=signal.SIGKILL, rank=1), **two),
        runs.fit("ended", *runs.ending(step=4, sent=signal.SIGKILL, rank=0), *LAST, **two),
        runs.fit("ended", *runs.ending(step=4, sent=signal.SIGTERM, rank=1), *LAST, "--data.num_workers", 2, **two),
        runs.fit("ended", *LAST, **two),
    )
    assert whole[0] == end[0] == [0, 0], whole[1][-3000:] + end[1][-3000:]
    assert dead[0] == [1, -signal.SIGKILL], dead[1][-3000:]
    assert first[0] == [-signal.SIGKILL, 1], first[1][-3000:]
    for ended in (dead, first):
        assert "because another process of this run has gone" in ended[1]
    assert told[0] == [143, 143], told[1][-3000:]
    assert "SIGTERM; the run goes on from" in told[1]
    once, twice = load(checkpoints(tmp_path / "whole")[-1]), load(checkpoints(tmp_path / "ended")[-1])
    assert once["global_step"] == twice["global_step"] == 6
    same_state(once, twice)
