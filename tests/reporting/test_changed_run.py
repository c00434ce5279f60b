"""A run's folder that somebody or a crash has changed: the report comes all the same and says what it leaves out."""

from __future__ import annotations

import json
import math
import random
import shutil

import numpy as np
import pytest
from run_report_tools import make_run

from camtrain.reporting import write_run_report
from camtrain.reporting.run_record import read_run

CASES = "epoch,step,split,case,label,truth,probability,method,organ_iou,energy_inside,threshold,kind\n"
CASE = "1,1,val,case 1,nodule,1,0.9,hirescam,{},0.25,0.1,positive\n"
ALARMS = "epoch,split,alarm,label,value,threshold,state,sentence\n1,val,reliance,stent,1.2,1.0,raised,Look.\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("base"), epochs=2, cases=["case 1"], layers=("layer3", "layer4"))
    (run.path / "cases.csv").write_text(CASES + CASE.format(0.5))
    (run.path / "alarms.csv").write_text(ALARMS)
    return run.path


@pytest.fixture
def folder(base, tmp_path):
    return shutil.copytree(base, tmp_path / "run")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400"])
def test_a_score_that_is_not_finite_is_a_row_that_cannot_be_read(folder, value):
    whole = read_run(folder)
    assert not [note for note in whole.notes if "csv" in note]
    with (folder / "scores.csv").open("a") as file:
        file.write(f"1,1,val,hirescam,nodule,organ_iou,{value}\n1,1,val,,stent,auroc,0.875\n")
    record = read_run(folder)
    (note,) = [note for note in record.notes if note.startswith("scores.csv, line ")]
    assert f"got {value}" in note
    assert "the other" in note
    assert record.curves.last("val", "hirescam", "organ_iou", "nodule") == whole.curves.last(
        "val", "hirescam", "organ_iou", "nodule"
    )
    assert record.curves.last("val", "", "auroc", "stent") == 0.875
    assert "scores.csv, line " in write_run_report(folder).read_text()


@pytest.mark.parametrize("value", ["nan", "inf", "-1e400", "x"])
def test_a_case_that_is_not_finite_costs_no_other_row(folder, value):
    (folder / "cases.csv").write_text(
        CASES + CASE.format(0.5) + CASE.format(value) + CASE.format(0.25) + CASE.format("")
    )
    record = read_run(folder)
    assert [row[5] for row in record.cases] == [0.5, 0.25, None]
    (note,) = [note for note in record.notes if note.startswith("cases.csv, line 3")]
    assert value in note
    write_run_report(folder)


def test_an_alarm_that_cannot_be_read_costs_no_other(folder):
    more = (
        "x,val,drifting,nodule,1,1,raised,\n2,val,drifting,nodule,1,1,up,\n1,val\n2,val,reliance,nodule,1,1,raised,S\n"
    )
    (folder / "alarms.csv").write_text(ALARMS + more)
    record = read_run(folder)
    assert [(alarm.alarm, alarm.label) for alarm in record.alarms] == [("reliance", "stent"), ("reliance", "nodule")]
    (note,) = [note for note in record.notes if note.startswith("alarms.csv, line 3")]
    assert "and 2 more lines" in note


@pytest.mark.parametrize("value", ["x", None, [], {}, math.inf, math.nan, 10**400, "1e400"])
def test_a_scale_that_is_no_number_is_left_out(folder, value):
    (folder / "panel.json").write_text(json.dumps({"scale": {"hirescam": value, "gradcam": 2.5}}))
    record = read_run(folder)
    assert record.scale == {"gradcam": 2.5}
    assert sum("panel.json: scale" in note for note in record.notes) == 1
    write_run_report(folder)


@pytest.mark.parametrize("value", ["x", None, 3, []])
def test_a_scale_that_is_no_table_is_left_out(folder, value):
    (folder / "panel.json").write_text(json.dumps({"scale": value}))
    record = read_run(folder)
    assert record.scale == {}
    assert sum("panel.json: scale" in note for note in record.notes) == 1


VALUES = [None, -1, 0, 1e308, math.nan, math.inf, "x", [], {}, True, [[]], {"a": None}, "</script>", 10**30]
CELLS = ["", "x", "-1", "nan", "inf", "1e400", "9" * 20, '"', "\x00", "1e308"]


def changed_json(rnd, content):
    """One value, wherever it lies, is another or gone."""
    place, here = None, content
    while isinstance(here, dict | list) and here and (place is None or rnd.random() < 0.75):
        key = rnd.choice(list(here)) if isinstance(here, dict) else rnd.randrange(len(here))
        place, here = (here, key), here[key]
    if isinstance(place[0], dict) and rnd.random() < 0.2:
        del place[0][place[1]]
    else:
        place[0][place[1]] = rnd.choice(VALUES)
    return content


def change(rnd, path):
    """What a crash, a disk or an editor may have made of a file."""
    data, kind = path.read_bytes(), rnd.choice(["cut", "flip", "value", "value"])
    if kind == "cut":
        path.write_bytes(data[: rnd.randrange(len(data))])
    elif kind == "flip":
        spoilt = bytearray(data)
        for _ in range(rnd.choice([1, 3, 30])):
            spoilt[rnd.randrange(len(spoilt))] = rnd.randrange(256)
        path.write_bytes(bytes(spoilt))
    elif path.suffix == ".json":
        path.write_text(json.dumps(changed_json(rnd, json.loads(data))))
    elif path.suffix == ".npz":
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        header = changed_json(rnd, json.loads(arrays.pop("header").tobytes()))
        np.savez(path, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
    else:
        lines = data.decode().splitlines()
        row = rnd.randrange(len(lines))
        cells = lines[row].split(",")
        cells[rnd.randrange(len(cells))] = rnd.choice(CELLS)
        lines[row] = ",".join(cells)
        path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("epochs/0001/maps.npz", "epoch", math.inf),
        ("epochs/0001/maps.npz", "maps", {"a": None}),
        ("volumes/*.npz", "region_of", []),
        ("volumes/*.npz", "size", 10**30),
        ("volumes/*.npz", "shape", [math.inf] * 3),
    ],
)
def test_a_header_that_makes_no_sense_costs_one_file(folder, name, old, new):
    (path,) = folder.glob(name)
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    header = json.loads(arrays.pop("header").tobytes()) | {old: new}
    np.savez(path, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
    write_run_report(folder)


@pytest.mark.parametrize("value", ["1e308", "-1e308"])
def test_a_score_of_any_size_has_a_shade(folder, value):
    scores = (folder / "scores.csv").read_text()
    (folder / "scores.csv").write_text(
        scores + f"1,1,val,,stent,auroc,{value}\n1,1,val,hirescam,stent,pointing_game,{value}\n"
    )
    write_run_report(folder)


@pytest.mark.parametrize("seed", range(6))
def test_no_change_of_a_file_makes_the_report_fail(base, tmp_path, seed):
    rnd = random.Random(seed)
    files = sorted(p.relative_to(base) for p in base.rglob("*") if p.suffix in (".csv", ".json", ".npz"))
    assert {path.name for path in files} >= {"scores.csv", "cases.csv", "alarms.csv", "run.json", "maps.npz"}
    for number in range(10):
        folder = shutil.copytree(base, tmp_path / str(number))
        change(rnd, folder / rnd.choice(files))
        write_run_report(folder)
