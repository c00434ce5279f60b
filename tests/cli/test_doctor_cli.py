"""`camtrain doctor`: every option, exit codes, the page, and that nothing is written but it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from camtrain.data.phantom_export import export_phantom
from camtrain.doctor import CHECKS

CT = Path(__file__).parents[2].parent / "shared" / "data" / "ct_abdomen"
SIZE = [24, 18, 30]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Twelve phantom cases as files."""
    monkeypatch.chdir(tmp_path)
    manifest = export_phantom(
        "files", {"train": 6, "val": 3, "test": 3}, size=tuple(SIZE), labels=["effusion", "nodule"]
    )
    return Path(manifest)


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def config_of(manifest: Path, **changes) -> Path:
    data = {"manifest": str(manifest), "table": "phantom", "spacing": [13.3, 13.3, 10.0], "size": SIZE} | changes
    mask = {"class_path": "camtrain.callbacks.MaskLossCallback", "init_args": {"layer": "net.relu"}}
    net = {"class_path": "camtrain.models.FlattenNet", "init_args": {"size": SIZE, "widths": [4, 6, 8, 5]}}
    content = {
        "data": {"class_path": "camtrain.data.ManifestDataModule", "init_args": data},
        "model": {"init_args": {"net": net}},
        "trainer": {
            "callbacks": [mask],
            "logger": {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": "runs"}},
        },
    }
    path = Path("config.yaml")
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_a_sound_manifest(run, files, tmp_path):
    before = everything(tmp_path)
    result = run("doctor", "--manifest", files, "--table", "phantom", "--workers", 2, "--out", "page.html")
    assert result.code == 0, result.err
    assert "12 cases" in result.out
    assert "a full read takes" in result.out
    assert set(everything(tmp_path)) - set(before) == {str(tmp_path / "page.html")}
    page = Path("page.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert run("doctor", "--manifest", files, "--table", "phantom", "--out", "page.html").code == 0


def test_headers_only(run, files):
    result = run("doctor", "--manifest", files, "--table", "phantom", "--headers-only", "--labels", "nodule")
    assert result.code == 0, result.err
    assert "not looked at: volumes were not read" in result.out
    run("doctor", "--manifest", files, "--table", "phantom", "--headers-only", "--out", "page.html")
    asked = Path("page.html").read_text().split('id="asked"')[1]
    assert "<code>grids</code>" in asked
    assert "<code>sides</code>" not in asked  # three cases say nothing of all


@pytest.mark.slow
def test_a_config_and_its_network(run, files, tmp_path):
    config = config_of(files)
    before = everything(tmp_path)
    result = run("doctor", "--config", config)
    assert result.code == 0, result.err
    assert everything(tmp_path) == before  # not even the folders of the logger
    assert "time of a step with the mask loss" in result.out
    assert "net.relu" in result.out
    without = run("doctor", "--config", config, "--no-network", "--headers-only")
    assert "time of a step" not in without.out


def test_faults_of_data_and_config_at_once(run, files):
    rows = files.read_text().splitlines()
    rows[1] = rows[1].replace("train-00000_ct", "gone")
    files.write_text("\n".join([rows[0].replace("nodule", "nodul"), *rows[1:]]))
    organs = files.parent / "train-00001_organs.nii.gz"
    image = nib.load(organs)
    affine = image.affine.copy()
    affine[1, 3] += 30
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), organs)
    result = run("doctor", "--config", config_of(files), "--out", "page.html")
    assert result.code == 2
    assert "Training would fail." in result.out
    page = Path("page.html").read_text()
    for words in (
        "label &#39;nodul&#39; has no rule",
        "nearest: nodule",
        "gone.nii.gz",
        "shifted by 0.0, 30.0, 0.0 mm",
    ):
        assert words in page
    assert result.err == ""


@pytest.mark.slow
def test_a_callback_whose_layer_is_not_there(run, files):
    config = config_of(files)
    config.write_text(config.read_text().replace("net.relu", "net.rely"))
    result = run("doctor", "--config", config)
    assert result.code == 2
    assert "no map can be taken of layer 'net.rely'" in result.out


@pytest.mark.slow
def test_a_network_of_another_size(run, files):
    result = run("doctor", "--config", config_of(files, size=[32, 24, 30]))
    assert result.code == 2
    assert "a training step of FlattenNet fails" in result.out


def test_a_config_with_a_misspelt_key(run, files):
    config = config_of(files)
    config.write_text(config.read_text().replace("spacing:", "spacin:"))
    result = run("doctor", "--config", config)
    assert result.code == 2
    assert "the config is refused" in result.out
    assert "spacin" in result.out


@pytest.mark.slow
def test_a_phantom_config_with_options_behind_it(run, write):
    result = run("doctor", "--config", write(), "--data.cases", 8, "--cases", 4, "--out", "page.html")
    assert result.code == 0, result.err
    assert "<code>sheet</code>" not in Path("page.html").read_text()  # there is none
    assert "all but 4 cases of each split" in result.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "expects --config, or --manifest"),
        (["--manifest", "m.csv"], "--manifest expects --table"),
        (["--manifest", "m.csv", "--table", "phantom", "--config", "c.yaml"], "one of them"),
        (["--config", "nowhere.yaml"], "does not exist"),
        (["--manifest", "m.csv", "--table", "phantom", "--data.size", "3"], "unknown option --data.size"),
        (["--manifest", "m.csv", "--table", "phantom", "--workers", "0"], "--workers expects 1 or more"),
        (["--manifest", "m.csv", "--table", "phantom", "--out", "."], "got the folder"),
        (["--manifest", "m.csv", "--table", "phantom", "--out", "precious.txt"], "choose another name"),
        (["--config", "precious.txt", "--table", "phantom"], "--data.table"),
        (["--config", "precious.txt", "--device", "abacus"], "cannot be used"),
    ],
)
def test_wrong_options(refused, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    Path("precious.txt").write_text("mine")
    assert says in refused("doctor", *words)
    assert Path("precious.txt").read_text() == "mine"


def test_a_manifest_that_is_not_there(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("doctor", "--manifest", "nowhere.csv", "--table", "phantom")
    assert result.code == 2
    assert "the manifest cannot be read" in result.out


@pytest.mark.skipif(not CT.exists(), reason="the real CT is not here")
def test_a_real_ct_and_its_segmentation(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = f"{CT / 'ct.nii.gz'},{CT / 'organs.nii.gz'}"
    Path("cases.csv").write_text(f"id,image,organs,split,liver_lesion,kidney_cyst\nA,{row},train,1,0\n")
    result = run("doctor", "--manifest", "cases.csv", "--table", "totalsegmentator_abdomen", "--out", "page.html")
    assert result.code == 2  # no validation cases: a fit would stop there
    assert [line for line in result.out.splitlines() if line.startswith("error")] == [
        "error  no case in the split 'val'  [splits]"
    ]
    assert "1,043 ml" in result.out
    assert json.dumps(str(CT))[1:-1] not in result.out


@pytest.mark.slow
def test_the_example_of_the_page_gives_what_the_page_says(run, tmp_path, monkeypatch):
    """docs/doctor.md: its Python makes the study, its command finds the six faults and no others."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "doctor.md", "exec"), {})  # noqa: S102 - our own page
    words = re.search(r"^camtrain (doctor --manifest study/\S+ .*)$", text, flags=re.MULTILINE)[1].split()
    result = run(*words)
    assert result.code == 2
    heads = re.compile(r"^(?:error|warning|note)  .*\[\w+\]$", flags=re.MULTILINE)
    assert heads.findall(result.out) == heads.findall(text)


def test_the_page_lists_every_check():
    text = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert [name for name, check in CHECKS.items() if f"| `{name}` | {check.asks} |" not in text] == []
