"""The reader-study recipe in a tiny form: two nets, two pages, two scripted readers, two analyses."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from recipe_tools import RECIPES, run_recipe

SIZES = {"cases": 16, "epochs": 1, "test-cases": 12, "shown": 2, "seeds": 1, "guessers": 1, "cut": 0.01}
TINY = [*(word for name, n in SIZES.items() for word in (f"--{name}", str(n))), "--size", "24", "24", "24"]


@pytest.mark.slow
def test_reader_study(tmp_path):
    out = tmp_path / "out"
    printed = run_recipe("reader_study", *TINY, "--out", out, folder=tmp_path)
    text = (out / "reader_study.md").read_text()
    assert text.strip() in printed
    for phrase in ("| rule: accuracy | A hirescam | 4 |", "| guess: accuracy | B gradcam | 4 |", "A = mask loss"):
        assert phrase in text
    folder = out / "seed0"
    key = json.loads((folder / "test" / "key.json").read_text())
    (path,) = (folder / "test").glob("answers_*_rule.csv")
    with path.open(newline="") as file:
        answers = list(csv.DictReader(file))
    assert {row["task"] for row in answers} == set(key["tasks"])
    tasks = {name: t for name, t in key["tasks"].items() if t["sources"] == ["A hirescam"]}
    right = [row["answer"] == tasks[row["task"]]["label"] for row in answers if row["task"] in tasks]
    said = json.loads((folder / "rule" / "analysis.json").read_text())["rows"]
    (row,) = [r for r in said if (r["part"], r["subject"], r["label"]) == ("accuracy", "A hirescam", "all")]
    assert row["value"] == np.mean(right)
    assert len((out / "runs.jsonl").read_text().splitlines()) == 1


def test_without_a_browser_the_same_answers_are_written(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import _scripted_reader as scripted

    monkeypatch.setattr(scripted, "find_browser", lambda: None)
    said = {"t1": "nodule, left", "t2": "5"}
    path = scripted.answer(tmp_path / "study.html", "abc", "rule", said)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["task"]: row["answer"] for row in rows} == said
    assert {(row["reader"], row["study"], row["seconds"]) for row in rows} == {("rule", "abc", "")}


def test_the_rule_reads_the_pictures(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import _scripted_reader as scripted

    scan = np.zeros((60, 90, 3))
    scan[5:55, 10:80] = 120.0
    inside, edge = scan.copy(), scan.copy()
    inside[25:35, 30:40, 0] = edge[25:35, :8, 0] = 255.0
    trust = {"id": "t1", "kind": "trust", "choices": [], "pictures": [scan, edge, inside]}
    asked = {"id": "t2", "kind": "discrimination", "choices": ["b", "a"], "pictures": [scan, inside]}
    practice = [
        {"id": name, "kind": "discrimination", "choices": [], "pictures": [scan, picture]}
        for name, picture in (("p1", inside), ("p2", edge))
    ]
    key = {"tasks": {"p1": {"label": "a"}, "p2": {"label": "b"}}}
    assert scripted.by_rule([trust, asked], practice, key) == {"t1": "5", "t2": "a"}
