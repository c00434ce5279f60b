"""A disk that is full: no half file takes the place of a whole one, and what is only ours does not end the run."""

from __future__ import annotations

import csv

import pytest
import torch


@pytest.mark.slow
def test_a_disk_that_fills_up_in_a_run(runs, tmp_path):
    """The child can write no file beyond so many bytes from the middle of the second epoch on."""
    without = [c for c in runs.callbacks() if "ModelCheckpoint" not in c["class_path"]]
    ending = runs.ending(step=7, bytes_left=12000)
    failed, resumed, ours = runs(
        runs.fit("saving", *ending),
        runs.fit("saving", "--ckpt_path", "last"),
        runs.fit("ours", *ending, enable_checkpointing=False, callbacks=without),
    )
    assert failed[0] == [2], failed[1][-3000:]
    (sentence,) = [line for line in failed[1].splitlines() if line.startswith("error: ")]
    first, second = sorted((tmp_path / "saving").glob("r/version_*/checkpoints/"))
    assert "File too large" in sentence
    assert "the checkpoint that was there before is whole" in sentence or "nothing was written there" in sentence
    assert "--ckpt_path last" in sentence
    assert not list(first.glob(".*"))
    assert torch.load(first / "last.ckpt", weights_only=True)["global_step"] == 5
    assert resumed[0] == [0], resumed[1][-3000:]
    assert torch.load(second / "last.ckpt", weights_only=True)["global_step"] == 15

    assert ours[0] == [0], ours[1][-3000:]
    assert ours[1].count("camtrain: writing to") + ours[1].count("camtrain: the report is not complete") == 1
    assert "Training goes on" in ours[1]
    (run,) = (tmp_path / "ours").glob("r/version_0/camtrain/*")
    assert not list(run.rglob(".*"))
    with (run / "scores.csv").open() as file:
        assert {row["epoch"] for row in csv.DictReader(file)} == {"0", "1", "2"}  # pictures fail, tables are small
    assert (run / "report.html").read_text().rstrip().endswith("</html>")
