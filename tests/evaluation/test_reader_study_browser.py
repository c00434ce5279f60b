"""A scripted reader answers a whole study by keyboard in a real browser, and the analysis says what it played."""

from __future__ import annotations

import csv
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from browser import Browser, needs_browser
from PIL import Image
from test_reader_study_making import LABELS, two

from camtrain.cli.main import main
from camtrain.evaluation.reader_study import read_key
from camtrain.evaluation.reader_study_analysis import analyse_study, trust_score
from camtrain.evaluation.reader_study_answers import collect_answers
from camtrain.evaluation.reader_study_making import make_study, save_study

pytestmark = [needs_browser, pytest.mark.slow]
NAME = 'Zoë "Q", <i>jr</i>'
CHOICES = "return [...document.querySelectorAll('#choices .choice span')].map((each) => each.textContent)"
CHOSEN = "return [...document.querySelectorAll('#choices input')].findIndex((each) => each.checked)"
TASK = "return order[state.place]"
SHOWN = "return ['start', 'ask', 'end'].filter((id) => !document.getElementById(id).hidden)"
LOADED = "return [...document.images].every((each) => each.complete && each.naturalWidth > 100)"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    made = make_study(two(), methods=["hirescam", "gradcam"], cases=3, width=240)
    save_study(made, folder)
    return folder


@pytest.fixture(scope="module")
def browser(study):
    with Browser(study / "downloads") as opened:
        yield opened


def start(browser, study, name=NAME):
    browser.open((study / "study.html").as_uri())
    browser.press("Tab")
    browser.run("document.activeElement.value = ''")
    browser.press(*name, "Enter")
    assert browser.run(SHOWN) == ["ask"]


def downloaded(folder):
    for _ in range(50):
        found = list(folder.glob("*.csv"))
        if found:
            return found[0]
        time.sleep(0.1)
    raise AssertionError("no file was saved")


def answer(browser, value, choices, way):
    """Choose by a digit, or walk there by arrows."""
    at = choices.index(value)
    if way % 3 == 0:
        browser.press(str(at + 1))
    elif way % 3 == 1:
        browser.press(*["ArrowDown"] * (at + 1))
    else:
        browser.press(*["ArrowLeft"] * (len(choices) - at))
    assert browser.run(CHOSEN) == at


def test_a_whole_study_by_keyboard(study, browser, capsys):
    key = read_key(study / "key.json")
    rng = np.random.default_rng(0)
    played = {
        name: str(rng.choice(task.choices)) if task.kind == "trust" or rng.random() < 0.4 else task.label
        for name, task in key.tasks.items()
    }
    start(browser, study)
    seen = []
    for number in range(len(key.tasks)):
        name = browser.run(TASK)
        seen.append(name)
        task, choices = key.tasks[name], browser.run(CHOICES)
        trust = task.kind == "trust"
        assert choices == (
            ["clearly left", "rather left", "both alike", "rather right", "clearly right"]
            if trust
            else list(task.choices)
        )
        assert browser.run("return document.images.length") == (3 if trust else 2)
        assert browser.run(LOADED)
        words = choices if not trust else list(task.choices)
        if number == 2:  # a wrong answer first, then back to correct it
            answer(browser, next(w for w in words if w != played[name]), words, 0)
            time.sleep(0.3)
            browser.press("Enter", "Backspace")
            assert browser.run(TASK) == name
            browser.press(str(words.index(played[name]) + 1))
        elif number == 4:  # left out, and found again at the end
            browser.click("#next")
            continue
        elif number == 5:  # the tab is closed after the answer, before going on
            answer(browser, played[name], words, 0)
            start(browser, study)
            assert browser.run(TASK) == name
            assert browser.run(CHOSEN) == words.index(played[name])
            assert browser.run("return document.getElementById('count').textContent") == "5 answered"
        else:
            answer(browser, played[name], words, number)
        browser.press("Enter")
    assert browser.run(SHOWN) == ["end"]
    assert "1 of" in browser.run("return document.getElementById('summary').textContent")
    browser.click("#open")
    left_out = browser.run(TASK)
    words = list(key.tasks[left_out].choices)
    answer(browser, played[left_out], words, 0)
    while browser.run(SHOWN) == ["ask"]:
        browser.press("Enter")
    browser.click("#save")
    saved = downloaded(study / "downloads")
    assert browser.run("return document.getElementById('text').value").encode() == saved.read_bytes().replace(
        b"\r\n", b"\n"
    )
    assert browser.console() == []
    assert (
        browser.run("return performance.getEntriesByType('resource').filter((e) => !e.name.startsWith('data:'))") == []
    )

    with saved.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == seen
    assert {row["reader"] for row in rows} == {NAME}
    assert {row["task"]: row["answer"] for row in rows} == played
    assert float(rows[2]["seconds"]) >= 0.3
    result = analyse_study(key, collect_answers(key, [saved]), repeats=50)
    for source in key.sources():
        names = [n for n, t in key.tasks.items() if t.kind == "discrimination" and t.sources == (source,)]
        assert result.row("accuracy", source).value == np.mean([played[n] == key.tasks[n].label for n in names])
    contests = {t.contest for t in key.tasks.values() if t.kind == "trust"}
    for contest in contests:
        names = [n for n, t in key.tasks.items() if t.contest == contest]
        expected = np.mean([trust_score(key.tasks[n], played[n]) for n in names])
        assert result.row("trust", contest).value == pytest.approx(expected)
    assert result.readers[0].missing == 0
    assert main(["study", "analyse", "--key", str(study / "key.json"), str(saved), "--repeats", "50"]) == 0
    assert "A hirescam" in capsys.readouterr().out


def test_orders_are_of_the_reader_and_keep_scans_apart(study, browser):
    orders = {}
    for name in ("ann", "bob", "ann"):
        start(browser, study, name)
        order = browser.run("return order")
        assert orders.setdefault(name, order) == order
    assert orders["ann"] != orders["bob"]
    assert sorted(orders["ann"]) == sorted(orders["bob"])
    key = read_key(study / "key.json")
    kinds = [key.tasks[name].kind for name in orders["ann"]]
    assert kinds == sorted(kinds)
    cases = [key.tasks[name].case for name in orders["ann"] if key.tasks[name].kind == "discrimination"]
    # In every round each case comes once: a repeat can only be where one round ends and the next begins.
    assert sum(a == b for a, b in pairwise(cases)) < len(cases) / 3


def test_names_are_kept_apart(study, browser):
    start(browser, study, "ann")
    browser.press("1", "Enter")
    start(browser, study, "bob")
    assert browser.run("return Object.keys(state.answers).length") == 0
    start(browser, study, "ann")
    assert browser.run("return [Object.keys(state.answers).length, state.place]") == [1, 1]


def test_light_and_dark_and_narrow(study, browser, tmp_path):
    brightness = {}
    for look in ("light", "dark"):
        browser.dark(look == "dark")
        start(browser, study, look)
        browser.press("2")
        path = tmp_path / f"{look}.png"
        browser.screenshot(path)
        brightness[look] = np.asarray(Image.open(path).convert("L"))[-150:].mean()
    assert brightness["light"] > 200
    assert brightness["dark"] < 60
    browser.devtools("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=False)
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    browser.devtools("Emulation.clearDeviceMetricsOverride")
    assert browser.console() == []


def test_everything_has_a_name_for_screen_readers(study, browser):
    start(browser, study, "ann")
    tree = browser.devtools("Accessibility.getFullAXTree")["nodes"]
    named = {}
    for node in tree:
        if not node.get("ignored"):
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("radio", "button", "image", "heading", "radiogroup", "progressbar"):
        assert named.get(role), role
        assert all(named[role]), role
    assert named["radiogroup"] == ["Which finding does the map show?"]
    # All pictures of a kind have the same words.
    assert set(named["image"]) == {"Slices of the scan", "Slices of the scan under the map"}
    assert {" ".join(name.split()) for name in named["radio"]} <= {" ".join(label.split()) for label in LABELS}
