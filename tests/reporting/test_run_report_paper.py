"""The report for those who print it and for those who hear it, in a real browser."""

from __future__ import annotations

import pytest
from browser import Browser, needs_browser
from run_report_tools import LABELS, make_run, maps_of
from test_run_report_browser import CASES, choose, open_page, wait

from camtrain.reporting import RunReport, Score, write_run_comparison
from camtrain.reporting.panel_files import write_maps
from camtrain.reporting.report_digest import MEASURES

pytestmark = [needs_browser, pytest.mark.slow]
MANY = ["a_label_name_without_any_space_that_is_rather_long", *(f"finding {i}" for i in range(29))]
# What reaches beyond the right edge, cells that hide a part of their own words, names that are cut with dots.
BEYOND = """const seen = (e) => e.checkVisibility() && !e.closest('.vh, .skip');
const shown = [...document.body.querySelectorAll('*')].filter(seen);
const words = (e) => `${e.tagName} ${e.className} ${e.textContent.slice(0, 30)}`;
return [...shown.filter((e) => e.getBoundingClientRect().right > arguments[0] + 1).map(words),
  ...shown.filter((e) => e.matches('th, td, .name, b, .scroll')).filter((e) => e.clientWidth)
    .filter((e) => e.scrollWidth > e.clientWidth + 1).map(words)]"""
# (The tree of the DevTools protocol leaves `aria-valuetext` out, also of the simplest slider.)
HEARD = """return ['epoch', 'slice-axial', 'slice-coronal', 'slice-sagittal', 'opacity']
.map((id) => document.getElementById(id).getAttribute('aria-valuetext'))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("downloads")) as opened:
        yield opened


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Two runs of 30 labels with every measure that there is."""
    runs = []
    for good in (False, True):
        runs.append(make_run(tmp_path_factory.mktemp("wide"), epochs=2, labels=MANY, cases=CASES[:2], good=good))
        runs[-1].write_scores(
            Score(1, 1, "val", "hirescam", label, name, 0.25) for label in MANY for name in MEASURES if name != "auroc"
        )
    return runs


@pytest.mark.parametrize("several", [False, True])
def test_all_of_it_is_on_paper(wide, browser, tmp_path, several):
    first, second = (run.path for run in wide)
    page = write_run_comparison(first, second, tmp_path / "two.html") if several else RunReport(first).write()
    open_page(browser, page)
    try:
        browser.devtools("Emulation.setEmulatedMedia", media="print")
        browser.run("dispatchEvent(new Event('beforeprint'))")
        for width in (703, 725):  # A4 and Letter without their margins of 12 mm
            browser.devtools(
                "Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False
            )
            assert browser.run(BEYOND, width) == []
        heads = (
            "return [...document.querySelectorAll(arguments[0])].filter((e) => e.checkVisibility() && e.offsetWidth)"
        )
        table = ".difference thead tr:first-child th:not(.t)" if several else ".heat:not([hidden]) thead th:not(.t)"
        assert browser.run(f"{heads}.map((e) => e.textContent)", table) == [each.title for each in MEASURES.values()]
        assert browser.run(f"{heads}.length", "#curves figure") == len(MANY)
        said = browser.run("return document.getElementById('curves-of').innerText")
        assert said.startswith("energy inside, hirescam, val: 30 labels, the ")
        around = "return getComputedStyle(document.querySelector('.viewer:has(#epoch-out):has(#planes)')).breakInside"
        assert browser.run(around) == "avoid"
    finally:
        browser.run("dispatchEvent(new Event('afterprint'))")
        browser.devtools("Emulation.setEmulatedMedia", media="")
        browser.devtools("Emulation.clearDeviceMetricsOverride")
    assert browser.run("return document.querySelectorAll('#curves svg').length") == 24  # as it was
    assert browser.run("return document.querySelectorAll('.difference').length") == several
    assert browser.console() == []


@pytest.mark.parametrize("several", [False, True])
def test_sliders_say_what_is_shown(browser, tmp_path, several):
    runs = []
    for name in "ab"[: 1 + several]:
        made = make_run(tmp_path / name, epochs=1, cases=CASES[:1])
        for epoch in (5, 10, 15):
            write_maps(made.maps_path(epoch), maps_of(epoch, CASES[:1], LABELS), epoch=epoch, step=epoch)
        runs.append(made.path)
    open_page(browser, write_run_comparison(*runs, tmp_path / "two.html") if several else RunReport(runs[0]).write())
    assert browser.run(HEARD)[0] == "epoch 15"
    for ident, value in (
        ("epoch", 2),
        ("slice-axial", 4),
        ("slice-coronal", 0),
        ("slice-sagittal", 23),
        ("opacity", 45),
    ):
        choose(browser, ident, value)
    wait(browser, HEARD, ["epoch 10", "5 of 16", "1 of 20", "24 of 24", "45 %"])
    browser.run("document.querySelector('#plane-axial canvas').focus()")
    browser.press("ArrowUp")
    wait(browser, f"{HEARD}[1]", "6 of 16")
