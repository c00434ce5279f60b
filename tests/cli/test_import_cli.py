"""`camtrain import`: what it says, and that wrong words end in one line and code 2."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from camtrain.data import make_rad_chestct_tree, make_voc_tree

ROOT = Path(__file__).parents[2]
CT = ROOT.parent / "shared" / "data" / "ct_abdomen"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "abcdefgh":
        for side in ("ct", "seg"):
            (tmp_path / side).mkdir(exist_ok=True)
            if side == "ct" or name in "abcd":
                volume = np.zeros((4, 4, 4), np.int16)
                nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / side / f"{name}.nii.gz")
    rows = [[f"{name}.nii.gz", int(name in "abcd"), ""] for name in "abcdefgh"]
    with (tmp_path / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["file", "emphysema", "mystery"], *rows])
    return tmp_path


SCANS = ("import", "scans", "--scans", "ct", "--organs", "seg")


def test_says_what_was_found_what_to_mind_and_what_to_run(folder, run):
    result = run(*SCANS, "--labels", "labels.csv", "--split", "1,0", "--out", "study")
    assert result.code == 0, result.err
    for part in (
        *("scans: NIfTI", "segmentations: one file", "scans without a segmentation"),
        *("train: 8 cases, 4 with organs", "warning: having organs predicts 'emphysema' in 'train'"),
        *("note: no rule for mystery", "study/manifest.csv\n", "study/table.yaml\n"),
        "camtrain fit --config configs/real_ct.yaml --data.manifest study/manifest.csv --data.table study/table.yaml",
    ):
        assert part in result.out
    text = (folder / "study" / "table.yaml").read_text()
    assert "# as in the shipped table ct_rate\n  emphysema: [lungs]\n" in text
    assert "# no shipped table knows it: write a rule\n  mystery: anywhere\n" in text


def test_refuses_to_overwrite(folder, run, refused):
    words = (*SCANS, "--labels", "labels.csv", "--out", "study")
    assert run(*words).code == 0
    before = (folder / "study" / "manifest.csv").read_bytes()
    assert "would be replaced" in refused(*words)
    assert run(*words, "--overwrite", "--seed", "5").code == 0
    assert (folder / "study" / "manifest.csv").read_bytes() != before


def test_an_own_table_is_taken_and_checked(folder, run, refused):
    words = (*SCANS, "--labels", "labels.csv", "--out", "study", "--table", "ct_rate")
    assert "a rule for every label, got none for mystery" in refused(*words)
    result = run(*words, "--labels_only", "emphysema")
    assert result.code == 0
    assert "--data.table ct_rate" in result.out
    assert not (folder / "study" / "table.yaml").exists()


def test_without_labels(folder, run):
    result = run(*SCANS, "--out", "study")
    assert result.code == 0
    assert "run this again with --labels CSV" in result.out
    result = run(*SCANS, "--out", "study", "--overwrite", "--labels_only", "mass,nodule")
    assert next(csv.reader((folder / "study" / "manifest.csv").open()))[-2:] == ["mass", "nodule"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("import",), "camtrain import expects scans, rad_chestct, voc"),
        (("import", "scnas"), "no source 'scnas'; nearest: scans"),
        ((*SCANS, "--out", "study", "--split", "most"), "expects parts such as"),
        ((*SCANS, "--out", "study", "--split", "1", "--split_file", "x"), "one source of splits"),
        ((*SCANS, "--out", "study", "--id_column", "x"), "name columns of --labels"),
        ((*SCANS, "--out", "study", "--organs_at", "x.nii.gz"), "expects a path with {id}"),
        ((*SCANS, "--out", "study", "--labels", "nowhere.csv"), "nowhere.csv: expected a CSV file"),
        (("import", "scans", "--scans", "ct", "--organs", "nowhere", "--out", "s"), "--organs expects a folder"),
        (("import", "scans", "--scans", "ct"), "--out; see camtrain import scans --help"),
        (("import", "voc", "--root", "ct", "--out", "s"), "expected a VOC tree"),
        (("import", "rad_chestct", "--root", "ct", "--out", "s"), "expected volumes"),
    ],
)
def test_wrong_words(folder, refused, words, told):
    assert told in refused(*words)


def test_ambiguous_names_are_all_in_the_message(folder, run):
    for name in ("a_seg", "b_seg", "stranger"):
        (folder / "seg" / f"{name}.nii.gz").touch()
    result = run(*SCANS, "--out", "study")
    assert result.code == 2
    for part in ("3 faults", "ct/a.nii.gz has 2", "ct/b.nii.gz has 2", "stranger.nii.gz fits no"):
        assert part in result.err
    assert not (folder / "study").exists()


@pytest.mark.slow
def test_the_other_sources(tmp_path, run):
    root = make_rad_chestct_tree(tmp_path / "rad", train=1, val=1, test=0, size=(20, 24, 24))
    result = run("import", "rad_chestct", "--root", root, "--out", tmp_path / "one", "--label_set", "plain")
    assert result.code == 0, result.err
    assert "--data.spacing null" in result.out
    root = make_voc_tree(tmp_path / "voc", train=2, val=1, test=0, size=32)
    result = run("import", "voc", "--root", root, "--out", tmp_path / "two")
    assert result.code == 0, result.err
    assert (tmp_path / "two" / "table.yaml").is_file()
    assert run("import", "--help").code == 0
    assert "next" not in run("import", "voc", "--help").out


@pytest.mark.skipif(not CT.exists(), reason="the real CT is not here")
def test_the_page_your_data_shows_what_comes(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ct_abdomen").symlink_to(CT)
    page = (ROOT / "docs" / "your_data.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(program, "your_data.md", "exec"), {})  # noqa: S102 - our own page
    (command,) = re.findall(r"^camtrain (import scans .*)$", page, flags=re.MULTILINE)
    result = run(*command.split())
    assert result.code == 0, result.err
    shown = re.search(r"```\n(what was found\n.*?)```", page, flags=re.DOTALL)[1]
    assert [line.rstrip() for line in result.out.splitlines()] == [line.rstrip() for line in shown.splitlines()]
