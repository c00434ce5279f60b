"""What lies under the evaluation page: sentences, rules, numbers and charts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from camtrain.reporting import evaluation_page as room
from camtrain.reporting.evaluation_digest import first_look, undecided
from camtrain.reporting.evaluation_forest import Marks, Panel, forest_figure
from camtrain.reporting.evaluation_numbers import interval, number, p_value, percent, score_cell
from camtrain.reporting.evaluation_page import ComparisonRow, EvaluationMeta, EvaluationPage, ScoreRow, evaluation_html
from camtrain.reporting.evaluation_plots import comparison_plot, forest_plot, shortcut_plot
from camtrain.reporting.evaluation_scores import Scores
from camtrain.reporting.evaluation_svg import COLOURS, figure_svg, fitted
from camtrain.reporting.evaluation_tables import clear_winner, comparison_grid, label_grid, summary

CSS = (Path(room.__file__).parent / "templates" / "evaluation.css").read_text(encoding="utf-8")


def scores_of(labels, methods):
    """Scores at one layer of one split."""
    rng = np.random.default_rng(0)
    rows = []
    for label in [*labels, "macro", "micro", "group:lung"]:
        free = [f"{m}/{r}" for m in ("outside_effect", "inside_effect", "shortcut_reliance") for r in ("case", "air")]
        series = [("", "", m) for m in ("auroc", *free)]
        series += [
            (a, "l4", m) for a in methods for m in ("organ_iou", "energy_inside", "energy_inside_chance", "mask_iou")
        ]
        for method, layer, measure in series:
            mean = float(rng.uniform(0.1, 0.9))
            rows.append(ScoreRow("test", method, layer, label, measure, 40, mean, mean - 0.05, mean + 0.05, 0.1))
    return Scores(rows, {})


def html_of(rows):
    return evaluation_html(EvaluationPage(meta=EvaluationMeta(title="A net"), rows=rows))


def test_first_look_names_the_worst_with_numbers():
    def row(label, measure, mean, method="cam", layer="l4"):
        return ScoreRow("test", method, layer, label, measure, 30, mean, mean - 0.1, mean + 0.1)

    iou = {"a": 0.9, "b": 0.2, "c": 0.5, "d": 0.3, "macro": 0.1}
    rows = [row(label, "organ_iou", v) for label, v in iou.items()]
    rows += [row("b", "energy_inside", 0.25), row("a", "energy_inside", 0.9)]
    rows += [row("b", "energy_inside_chance", 0.2), row("a", "energy_inside_chance", 0.2)]
    rows += [
        row(label, f"shortcut_reliance/{r}", v, "", "")
        for label, r, v in (("a", "air", 0.3), ("a", "blur", 0.8), ("b", "air", 0.4))
    ]
    rows += [ScoreRow("test", "", "", "d", f"shortcut_reliance/{r}", 30, None, undefined=1.0) for r in ("air", "blur")]
    found = {entry.title: entry for entry in first_look(Scores(rows, {}), "test")}
    assert [item.label for item in found["Lowest OrganIoU"].items] == ["b", "d", "c"]
    assert found["Lowest OrganIoU"].items[0].text == (
        "OrganIoU 0.20 [0.10, 0.30], n = 30; energy inside 0.25 [0.15, 0.35], chance 0.20"
    )
    assert [i.label for i in found["Energy inside not shown to be above chance"].items] == ["b"]
    shortcut = found["Highest shortcut reliance"].items
    assert [(i.label, i.text) for i in shortcut] == [
        ("a", "share 0.80 [0.70, 0.90], n = 30 (blur); the whole interval lies above 0.5"),
        ("b", "share 0.40 [0.30, 0.50], n = 30 (air)"),
    ]
    assert "1 of 4 labels: d" in found["Shortcut reliance undefined under every replacement"].items[0].text
    assert undecided(Scores(rows, {}), "test") == {"d": ["air", "blur"]}


def test_a_region_that_covers_everything_is_no_finding():
    rows = [
        ScoreRow("t", "cam", "l", "anywhere", m, 9, 1.0, 1.0, 1.0) for m in ("energy_inside", "energy_inside_chance")
    ]
    assert "not shown" not in " ".join(entry.title for entry in first_look(Scores(rows, {}), "t"))


@pytest.mark.parametrize(
    ("means", "half", "better", "winner"),
    [
        ((0.2, 0.5, 0.8), 0.1, True, 2),
        ((0.2, 0.5, 0.8), 0.1, False, 0),
        ((0.2, 0.5, 0.8), 0.1, None, None),
        ((0.2, 0.7, 0.8), 0.1, True, None),  # touching is overlapping
        ((0.2, 0.7, 0.8), None, True, None),
        ((0.2, None, 0.8), 0.1, True, 2),
        ((None, None, 0.8), 0.1, True, None),
    ],
)
def test_bold_only_without_overlap(means, half, better, winner):
    def row(mean):
        if mean is None:
            return ScoreRow("t", "m", "l", "macro", "organ_iou", 9, None)
        ends = (None, None) if half is None else (round(mean - half / 2, 6), round(mean + half / 2, 6))
        return ScoreRow("t", "m", "l", "macro", "organ_iou", 9, mean, *ends)

    assert clear_winner([row(mean) for mean in means], better) == winner


def test_summary_shows_the_winner_in_bold():
    rows = [ScoreRow("t", m, "l", "macro", "organ_iou", 9, v, v - 0.1, v + 0.1) for m, v in (("a", 0.2), ("b", 0.8))]
    assert [[c.best for c in line.cells] for line in summary(Scores(rows, {}), "t").lines] == [[False], [True]]
    assert "<b>0.80</b> <i>[0.70, 0.90]</i>" in html_of(rows)


@pytest.mark.slow
def test_very_many_comparisons_are_cut_with_a_sentence():
    row = ComparisonRow("t", "", "", "x", "auroc", 9, 0.5, 0.6, 0.1, 0.0, 0.2, 0.5, 1.0)
    rows = [replace(row, label=str(i), p_holm=0.01 if i == 7 else 1.0) for i in range(1500)] + [
        replace(row, label="macro")
    ]
    grid, note = comparison_grid(rows)
    assert [line.name for line in grid.lines] == ["7", "mean over labels"]
    assert note.startswith("2 of 1501 comparisons")


def test_averages_stay_at_the_foot():
    grid = label_grid(scores_of(["nodule", "effusion", "mass"], ["cam"]), "test", ("cam", "l4"))
    assert [line.name for line in grid.lines] == ["nodule", "effusion", "mass"]
    assert [line.name for line in grid.foot] == ["mean over labels", "mean over cases and labels", "group lung"]


def test_numbers():
    assert [number(v) for v in (0.714, 0.0714, 1e-5, 12.34, 1234.5, -0.2, -1e-20, 0.0, None)] == [
        "0.71", "0.071", "1e−05", "12.3", "1234", "−0.20", "−1e−20", "0.00", "–",
    ]  # fmt: skip
    assert number(-0.0001, 2) == "0.00"
    assert interval(0.5, None) == ""
    assert p_value(0.0004) == "< 0.001"
    assert percent(1.0) == "100 %"
    assert score_cell(None).why == "not measured"


def contrast(one, other):
    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def themes():
    light, dark, paper = (
        dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    )
    return {"light": light, "dark": dark, "paper": paper}


@pytest.mark.parametrize("theme", ["light", "dark", "paper"])
def test_contrast_is_enough(theme):
    colours = themes()[theme]
    assert set(colours) == {*COLOURS, "ground", "card", "link"}
    for ground in ("ground", "card", "band"):
        for text in ("ink", "faint", "link"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for mark in ("warm", "cool", *(f"s{i}" for i in range(6))):
            assert contrast(colours[mark], colours[ground]) >= 3, (mark, ground)


def test_every_colour_of_a_chart_has_its_class():
    light = themes()["light"]
    assert {name: light[name] for name in COLOURS} == COLOURS
    for name in COLOURS:
        assert f".f-{name} {{ fill: var(--{name}); }}" in CSS
        assert f".l-{name} {{ stroke: var(--{name}); }}" in CSS


def test_marks_lie_where_the_numbers_say():
    marks = Marks("m", "s0", "o", {"a": (0.0, None, None), "b": (1.0, 0.5, 1.0)})
    svg = figure_svg(
        forest_figure(["a", "b"], [Panel("p", [marks], (0.0, 1.0))]), title="t", description="d", ident="x"
    )
    at = [(float(x), float(y)) for x, y in re.findall(r'<use href="#x-\d+" x="([\d.]+)" y="([\d.]+)"', svg)]
    (left, upper), (right, lower) = at[-2:]
    assert lower - upper == pytest.approx(16.0, abs=0.2)
    assert right - left == pytest.approx(300.0, abs=0.2)
    start, end = re.findall(
        r'class="l-s0" stroke-width="1.6" d="M([\d.]+) [\d.]+L([\d.]+) ', svg.replace(' fill="none"', "")
    )[-1]
    assert (float(start), float(end)) == (pytest.approx((left + right) / 2, abs=0.2), pytest.approx(right, abs=0.2))


def test_intervals_beyond_the_axis_are_clipped():
    marks = Marks("m", "s0", "o", {"a": (5.0, -9.0, 9.0)})
    svg = figure_svg(forest_figure(["a"], [Panel("p", [marks], (0.0, 1.0))]), title="t", description="d", ident="x")
    numbers = [float(v) for d in re.findall(r' d="([^"]*)"', svg) for v in re.findall(r"-?[\d.]+", d)]
    assert max(map(abs, numbers)) < 500
    assert len(re.findall("<use", svg)) == 1  # only the legend's; the mean lies outside


def test_eighty_labels_keep_rows_apart_and_one_label_is_enough():
    labels = [f"finding_{i}" for i in range(80)]
    scores = scores_of(labels, ["a", "b", "c", "d"])
    figure = forest_plot(scores, "test", "l4", ["a", "b", "c", "d"]).figure
    assert figure.get_size_inches()[1] * 72 > 80 * 30
    assert figure.get_size_inches()[0] * 72 < 1250
    one = scores_of(["only"], ["a"])
    assert forest_plot(one, "test", "l4", ["a"]) is not None
    shares = [one.get("test", ("", ""), "only", f"shortcut_reliance/{r}").mean for r in ("case", "air")]
    assert shortcut_plot(one, "test").description == (
        f"1 of 1 labels have a share; the highest is {number(max(shares))} for only."
    )


def test_long_names_are_shortened_and_kept_as_tooltip():
    name = "a very long name " * 6 + "left"
    assert fitted(name, 11, 230).endswith("left")
    assert len(fitted(name, 11, 230)) < 45
    text = html_of([ScoreRow("test", "", "", name, "auroc", 9, 0.5, 0.4, 0.6)])
    assert f"<title>{name}</title>" in text
    assert f'<th scope="row" title="{name}">' in text


def test_worse_and_better_follow_the_direction():
    row = ComparisonRow("t", "", "", "x", "loss", 9, 0.5, 0.6, 0.1, 0.0, 0.2, 0.01, 0.01)

    def legend(better, p):
        plot = comparison_plot([replace(row, p_holm=p)], "t", ("", ""), lambda _: better)
        return figure_svg(plot.figure, title="t", description="d", ident="x")

    assert ">B better<" in legend(True, 0.01)
    assert ">B worse<" in legend(False, 0.01)
    assert ">B different<" in legend(None, 0.01)
    assert ">no clear difference<" in legend(True, 0.2)
    assert ">no clear difference<" in legend(True, None)
