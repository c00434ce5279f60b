"""The report in a real browser: scroll, switch label, move the epoch, switch signs; pixels as Python draws them."""

from __future__ import annotations

import base64
import io
import time

import numpy as np
import pytest
from browser import Browser, needs_browser
from PIL import Image
from run_report_tools import LABELS, make_run
from test_run_report import EVIL

from camtrain.reporting import RunReport, write_run_comparison
from camtrain.reporting.overlays import blend, enlarge, section
from camtrain.reporting.panel_files import read_maps, read_volume
from camtrain.reporting.report_blocks import on_screen
from camtrain.reporting.slices import NORMAL, cut

pytestmark = [needs_browser, pytest.mark.slow]
READY = """return document.querySelectorAll('#legend canvas').length > 0
&& document.querySelectorAll('#fn p, #fn .card').length > 0"""
SAID = "return [...document.querySelectorAll('#said > :not(.paper)')].map((each) => each.textContent).join(' ')"
EPOCH = "return document.getElementById('epoch-out').textContent"
PLACE = "return document.querySelector('#plane-axial .place').textContent"
PIXELS = "return document.querySelector('#plane-axial canvas').toDataURL('image/png')"
CASES = ["case 1", EVIL, "case 3"]
SHADES = """
const colour = (of) => getComputedStyle(of).backgroundColor.match(/[0-9]+/g).slice(0, 3).map(Number);
const cell = document.createElement('td');
document.body.append(cell);
const shades = ['h1', 'h2', 'h3', 'h4'].map((name) => { cell.className = name; return colour(cell); });
cell.remove();
return [colour(document.body), ...shades];
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = make_run(tmp_path_factory.mktemp("a b ü"), cases=CASES, layers=("layer3", "layer4"), axes="LPS")
    RunReport(made.path).write()
    return made


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("downloads")) as opened:
        yield opened


def open_page(browser, path):
    browser.open(path.as_uri())
    wait(browser, READY)


def wait(browser, script, value=True):
    for _ in range(100):
        if (found := browser.run(script)) == value:
            return
        time.sleep(0.05)
    raise AssertionError(f"{script}: {found!r} instead of {value!r}")


def choose(browser, ident, value):
    browser.run(
        "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
        "s.dispatchEvent(new Event(s.tagName === 'SELECT' ? 'change' : 'input'))",
        ident,
        value,
    )


def pixels(browser):
    time.sleep(0.15)
    return picture(browser.run(PIXELS)).reshape(-1, 3)


def picture(address):
    """(H, W, 3) of a data URI."""
    content = base64.b64decode(address.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(np.int16)


def test_it_opens_at_the_worst_label_in_the_newest_epoch(run, browser):
    open_page(browser, run.report_path)
    # `effusion` went astray, and the second case shows it.
    assert browser.run("return document.getElementById('label').value") == "effusion"
    assert browser.run("return document.getElementById('case').selectedOptions[0].textContent") == EVIL
    assert browser.run(EPOCH) == "3"
    assert browser.run(SAID) == "present, p = 0.90, 0.25 of the evidence inside"
    assert browser.run("return document.title") == f"{run.id} – where the network looks"
    assert browser.console() == []


def test_scroll_by_slider_key_wheel_and_click(run, browser):
    open_page(browser, run.report_path)
    choose(browser, "slice-axial", 4)
    wait(browser, PLACE, "5 / 16")
    before = pixels(browser)
    wait(browser, "return document.getElementById('live').textContent", "axial slice 5 of 16")
    browser.run("document.querySelector('#plane-axial canvas').focus()")
    browser.press("ArrowUp", "ArrowUp", "ArrowDown")
    wait(browser, PLACE, "6 / 16")
    assert (pixels(browser) != before).any()
    browser.run("document.querySelector('#plane-axial canvas').dispatchEvent(new WheelEvent('wheel', {deltaY: 10}))")
    wait(browser, PLACE, "5 / 16")
    browser.run("document.getElementById('slice-axial').focus()")
    browser.press("ArrowRight")
    wait(browser, PLACE, "6 / 16")
    browser.click("#plane-axial canvas")  # its middle
    time.sleep(0.2)
    for plane, middle in (("sagittal", ("12 / 24", "13 / 24")), ("coronal", ("10 / 20", "11 / 20"))):
        assert browser.run(f"return document.querySelector('#plane-{plane} .place').textContent") in middle
    assert browser.console() == []


def test_label_epoch_method_and_case_change_what_is_said_and_drawn(run, browser):
    open_page(browser, run.report_path)
    first = pixels(browser)
    choose(browser, "label", "nodule")
    wait(browser, SAID, "absent, p = 0.95, 0.25 of the evidence inside")
    second = pixels(browser)
    assert (first != second).any()
    browser.run("document.getElementById('epoch').focus()")
    browser.press("ArrowLeft", "ArrowLeft")
    wait(browser, EPOCH, "1")
    third = pixels(browser)
    assert (second != third).any()
    choose(browser, "map", "counterfactual")
    wait(browser, SAID, "absent, p = 0.95")
    assert (pixels(browser) != third).any()
    browser.click("#case-next")
    wait(browser, "return document.getElementById('case').selectedOptions[0].textContent", "case 3")
    assert browser.run("return document.getElementById('label').value") == "nodule"
    assert browser.run(EPOCH) == "1"
    assert browser.console() == []


def test_signs_opacity_and_outline(run, browser):
    open_page(browser, run.report_path)
    browser.run("document.getElementById('outline').click()")
    both = pixels(browser)
    warm, cool = ((both[:, 0] - both[:, 2]) > 20), ((both[:, 2] - both[:, 0]) > 20)
    assert warm.any()
    assert cool.any()
    browser.click("input[value=for]")
    only = pixels(browser)
    assert ((only[:, 0] - only[:, 2]) > 20).any()
    assert not ((only[:, 2] - only[:, 0]) > 20).any()
    browser.run("document.querySelector('input[value=for]').focus()")
    browser.press("ArrowRight")
    only = pixels(browser)
    assert not ((only[:, 0] - only[:, 2]) > 20).any()
    assert ((only[:, 2] - only[:, 0]) > 20).any()
    choose(browser, "opacity", 0)
    bare = pixels(browser)
    assert (np.ptp(bare, axis=1) < 6).all()  # no colour is left
    browser.run("document.getElementById('outline').click()")
    assert (pixels(browser) == (70, 240, 110)).all(axis=1).any()
    assert browser.console() == []


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_pixels_are_those_that_python_draws(run, browser, plane):
    open_page(browser, run.report_path)
    index, size = 7, (60, 48)
    script = """const [plane, index, height, width] = arguments;
    const canvas = document.createElement('canvas');
    Object.assign(canvas, {width, height});
    return sceneOf(RUNS[0], {split: 'val', name: 'case 1'}, 'stent', 'gradcam', 2).then((scene) => {
      drawPlane(canvas, plane, index, scene, {opacity: 1, sign: 'both', outline: false, end: 2.5});
      return canvas.toDataURL('image/png');
    })"""
    drawn = picture(browser.run(script, plane, index, *size))
    volume = read_volume(run.volume_path("case 1"))
    _, maps = read_maps(run.maps_path(2))
    wanted = ("case 1", "stent", "gradcam")
    values = next(m for m in maps if (m.case, m.label, m.method) == wanted).values()
    image = on_screen(volume.image, "LPS").astype(np.float32)
    grey = np.rint(enlarge(cut(image, plane, index), size)).astype(np.uint8)
    axis = NORMAL[plane]
    flat = section(on_screen(values, "LPS"), axis, (index + 0.5) / image.shape[axis])
    expected = blend(grey, enlarge(flat.T[::-1, ::-1], size), 2.5)
    assert np.abs(drawn - expected).max() <= 2


def test_depth_and_errors(run, browser):
    open_page(browser, run.report_path)
    layers = "return [...document.querySelectorAll('#strip b')].map((each) => each.textContent)"
    wait(browser, layers, ["layer3", "layer4"])
    strip = "return [...document.querySelectorAll('#strip canvas')].map((each) => each.toDataURL('image/png'))"
    full = browser.run(strip)
    choose(browser, "opacity", 0)
    time.sleep(0.3)
    bare = browser.run(strip)
    assert all(now != before for now, before in zip(bare, full, strict=True))
    choose(browser, "opacity", 100)
    cards = """return [...document.querySelectorAll(arguments[0] + ' .card-head')]
    .map((card) => [...card.children].slice(0, 3).map((each) => each.textContent))"""
    assert browser.run(cards, "#fn") == [["stent", "p = 0.20", "case 3"]]
    assert browser.run(cards, "#fp") == [["nodule", "p = 0.95", EVIL]]
    titles = "return [...document.querySelectorAll('#fn figcaption')].map((each) => each.textContent)"
    assert browser.run(titles) == ["hirescam", "counterfactual"]
    browser.click("#fn button")
    wait(browser, SAID, "present, p = 0.20, 0.25 of the evidence inside")
    assert browser.run("return document.getElementById('case').selectedOptions[0].textContent") == "case 3"
    assert browser.console() == []


def test_curves_tables_and_sorting(run, browser):
    open_page(browser, run.report_path)
    names = "return [...document.querySelectorAll('#curves .name')].map((each) => each.textContent)"
    assert browser.run(names)[0] == "effusion"
    label = "return document.querySelector('#curves svg').getAttribute('aria-label')"
    assert browser.run(label) == "effusion: from 0.90 in epoch 0 to 0.20 in epoch 3"
    choose(browser, "measure", "auroc")
    assert browser.run(names) == LABELS  # the lowest AUROC first
    choose(browser, "method", "gradcam")
    shown = "return [...document.querySelectorAll('.heat:not([hidden])')].map((each) => each.dataset.method)"
    assert browser.run(shown) == ["gradcam"]
    rows = "return [...document.querySelectorAll('.heat:not([hidden]) tbody th')].map((each) => each.textContent)"
    assert browser.run(rows)[0] == "effusion"
    browser.run("document.querySelector('.heat:not([hidden]) th:nth-child(4) button').focus()")
    browser.press("Enter", "Enter")
    assert browser.run(rows) == LABELS[::-1]  # the highest AUROC first
    assert browser.run("return document.querySelector('.heat:not([hidden]) th:nth-child(4)').ariaSort") == "descending"
    assert browser.console() == []


def test_two_runs_move_together(run, browser, tmp_path):
    other = make_run(tmp_path / "b", cases=CASES, good=True, epochs=3, axes="LPS")
    open_page(browser, write_run_comparison(run.path, other.path, tmp_path / "two.html", ["plain", "mask loss"]))
    assert browser.run("return document.querySelectorAll('#plane-axial canvas').length") == 2
    assert browser.run(SAID).count("present, p = 0.90") == 2
    assert "(its epoch 2)" in browser.run(SAID)
    both = "return [...document.querySelectorAll('#plane-axial canvas')].map((c) => [c.width, c.height, c.toDataURL()])"
    first = browser.run(both)
    assert first[0][:2] == first[1][:2]
    assert first[0][2] != first[1][2]
    choose(browser, "slice-axial", 3)
    wait(browser, PLACE, "4 / 16")
    time.sleep(0.1)
    second = browser.run(both)
    assert second[0] != first[0]
    assert second[1] != first[1]
    choose(browser, "epoch", 1)
    wait(browser, EPOCH, "1")
    assert "its epoch" not in browser.run(SAID)
    assert browser.run("return document.querySelectorAll('#curves .last')[0].children.length") == 2
    assert browser.console() == []


def test_cases_of_one_run_are_named_and_shown(browser, tmp_path):
    names = [f"case {i}" for i in range(9)]
    apart = "const p = document.getElementById('apart'); return p.checkVisibility() ? p.textContent : ''"
    cases = "return [...document.querySelectorAll('#case option')].map((each) => each.textContent)"
    first = make_run(tmp_path / "a", cases=names[:8], epochs=1).path
    both = make_run(tmp_path / "b", cases=["case 7", "<i>"], epochs=1).path
    open_page(browser, write_run_comparison(first, both, tmp_path / "some.html"))
    said = browser.run(apart)
    assert said.startswith(
        "1 case in both runs; 7 cases only in A: case 0, case 1, case 2, case 3, case 4 and 2 more; "
    )
    assert "1 case only in B: <i>." in said
    assert "nifti_cases=" in said
    assert browser.run(cases)[::7] == ["case 7", "case 6 (A only)"]
    other = make_run(tmp_path / "c", cases=["case 8"], epochs=1).path
    open_page(browser, write_run_comparison(first, other, tmp_path / "none.html"))
    assert browser.run(apart).startswith("The runs show no case in common")
    choose(browser, "case", "8")
    wait(browser, SAID, "A not a case of this run B present, p = 0.90, 0.25 of the evidence inside")
    time.sleep(0.2)
    coloured = []
    for i in range(2):
        drawn = f"return document.querySelectorAll('#plane-axial canvas')[{i}].toDataURL('image/png')"
        browser.run("document.getElementById('outline').checked && document.getElementById('outline').click()")
        time.sleep(0.2)
        coloured.append(np.ptp(picture(browser.run(drawn)).reshape(-1, 3), axis=1).max() > 20)
    assert coloured == [False, True]
    same = make_run(tmp_path / "d", cases=["case 8"], epochs=1).path
    open_page(browser, write_run_comparison(other, same, tmp_path / "all.html"))
    assert browser.run(apart) == ""
    assert browser.console() == []


def test_light_dark_narrow_and_paper(run, browser, tmp_path):
    open_page(browser, run.report_path)
    brightness = {}
    for look in ("light", "dark"):
        browser.click(f"[data-theme-to={look}]")
        path = tmp_path / f"{look}.png"
        browser.screenshot(path)
        brightness[look] = np.asarray(Image.open(path).convert("L"))[:, :20].mean()
        # In the dark what is bad is bright: the words must hold for both.
        ground, *shades = browser.run(SHADES)
        away = [np.abs(np.subtract(shade, ground)).sum() for shade in shades]
        assert away == sorted(set(away))
    caption = browser.run("return document.querySelector('.heat caption').textContent")
    assert caption.endswith("the stronger the colour, the worse.")
    assert brightness["light"] > 240
    assert brightness["dark"] < 40
    open_page(browser, run.report_path)
    assert browser.run("return document.documentElement.dataset.theme") == "dark"  # it stays
    browser.click("[data-theme-to=auto]")
    browser.devtools("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=False)
    open_page(browser, run.report_path)
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    browser.devtools("Emulation.clearDeviceMetricsOverride")
    browser.devtools("Emulation.setEmulatedMedia", media="print")
    assert browser.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.run("return document.querySelector('#plane-axial canvas').offsetWidth") > 100
    browser.devtools("Emulation.setEmulatedMedia", media="")
    assert browser.console() == []
    assert (
        browser.run("return performance.getEntriesByType('resource').filter((e) => !e.name.startsWith('data:'))") == []
    )


def test_everything_has_a_name_for_screen_readers(run, browser):
    open_page(browser, run.report_path)
    named = {}
    for node in browser.devtools("Accessibility.getFullAXTree")["nodes"]:
        if not node.get("ignored"):
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("button", "combobox", "slider", "checkbox", "radio", "image", "heading", "table", "columnheader"):
        assert named.get(role), role
        # The head of the bars has no words for the eye; it has for the ear.
        assert all(named[role]), (role, named[role])
    assert "axial slice" in " ".join(named["image"])
    assert {"both", "for", "against"} <= set(named["radio"])


def test_a_page_without_cases_has_scores_only(browser, tmp_path):
    run = make_run(tmp_path, cases=[])
    browser.open(RunReport(run.path).write().as_uri())
    assert browser.run("return document.querySelectorAll('#curves svg').length") == 3
    assert browser.run("return document.getElementById('panel').offsetHeight") == 0
    assert browser.console() == []
