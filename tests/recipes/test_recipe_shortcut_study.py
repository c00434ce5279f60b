"""The shortcut study in a tiny form: every arm trains, finished runs are kept, poor masks are what they are called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from camtrain.data import PhantomDataModule

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = ["--seeds", "1", "--cases", "16", "--test-cases", "12", "--epochs", "1", "--out"]


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import _shortcut_data

    return _shortcut_data


def study(folder, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RECIPES / "shortcut_study.py"), *arguments, *TINY, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_every_arm_and_an_interruption(tmp_path):
    arms = ["arms", "--nets", "flatten", "--places", "co-occurring"]
    text = study(tmp_path, *arms)
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 11
    for arm in ("plain", "masked pooling", "masked input", "swap + mask loss", "gradcam loss"):
        assert f"| {arm} |" in text
    assert "Spearman" in text
    run = json.loads(lines[0])
    assert set(run["result"]["scores"]) == {"test", "shift_free", "shift_random", "shift_reversed"}
    assert set(run["result"]["reliance"]) == {"case", "air", "blur", "mean"}
    # A line that was cut off in the middle is done again, the others are not.
    (tmp_path / "runs.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    study(tmp_path, *arms)
    again = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert again[:10] == lines[:10]
    assert {json.loads(line)["job"]["arm"] for line in [*again[:10], again[-1]]} == {
        json.loads(x)["job"]["arm"] for x in lines
    }


@pytest.mark.slow
def test_the_resnet_under_organ_pooling(tmp_path):
    text = study(tmp_path, "arms", "--nets", "resnet18q", "--places", "skin", "--arms", "masked pooling")
    assert "resnet18q, shortcut at skin" in text


def test_organs_on_a_share_of_the_cases(data):
    organs = {"organs": torch.ones(1, 2, 2, 2, dtype=torch.uint8), "has_organs": torch.tensor(True)}
    for share in (1.0, 0.3, 0.1, 0.03, 0.01):
        kept = sum(bool(data.some_organs(organs, index, share)["has_organs"]) for index in range(500))
        assert kept == pytest.approx(500 * share, abs=1)


def test_poor_masks(data):
    phantom = PhantomDataModule(cases=4, size=24)
    case = phantom.train_dataloader().dataset[1]
    before = {key: value.clone() for key, value in case.items() if isinstance(value, torch.Tensor)}
    organs = case["organs"]
    grown = data.dilated(case, 1)["organs"]
    assert torch.equal(grown[organs > 0], organs[organs > 0])
    assert (grown > 0).sum() > (organs > 0).sum()
    moved = data.shifted(case, 1)["organs"]
    assert torch.equal(torch.bincount(moved.flatten()), torch.bincount(organs.flatten()))
    assert not torch.equal(moved, organs)
    boxed = data.boxes(case, 1)["organs"]
    for organ in (1, 2, 3):
        place = (organs[0] == organ).nonzero()
        low, high = place.amin(dim=0), place.amax(dim=0) + 1
        assert bool((boxed[0][tuple(slice(a, b) for a, b in zip(low, high, strict=True))] > 0).all())
    assert data.one_site(case, 0) is case
    other = data.one_site(case, 1)
    assert not other["has_organs"]
    assert not torch.equal(other["image"], case["image"])
    for key, value in before.items():
        assert torch.equal(case[key], value)


def test_inputs_with_organs(data):
    phantom = PhantomDataModule(cases=4, size=24)
    case = phantom.train_dataloader().dataset[0]
    masked = data.masked_image(case, 0, phantom.table)["image"]
    allowed = phantom.table.allowed(case["organs"][None])[0].any(dim=0)
    assert torch.equal(masked[0][allowed], case["image"][0][allowed])
    assert not masked[0][~allowed].any()
    both = data.image_with_organs(case, 0)["image"]
    assert torch.equal(both[1], case["organs"][0].float())
