"""The evaluation page: valid, escaped, self-contained, honest about what is not there."""

from __future__ import annotations

import csv
import io
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camtrain._errors import InputError
from camtrain.reporting.evaluation_page import (
    ComparisonRow,
    Curve,
    EvaluationMeta,
    EvaluationPage,
    Measure,
    SanityRow,
    ScoreRow,
    evaluation_html,
    write_evaluation,
)
from camtrain.reporting.evaluation_plots import forest_plot
from camtrain.reporting.evaluation_scores import Scores
from camtrain.reporting.evaluation_tables import undefined_grid

EVIL = '<script>alert(1)</script> & "quoted" $x_1$ \'n'
MAPS = ["organ_iou", "energy_inside", "energy_inside_chance", "pointing_game", "empty_map_rate", "class_sensitivity"]
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Reads a page and complains about what a browser would have to repair."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.ids, self.refs, self.problems = [], [], [], [], []
        self.text, self.tables, self.links = [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"
        assert self.problems == []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        assert len(named) == len(attrs), f"attribute twice in {tag}"
        self.tags.append((tag, named))
        self.ids += [named["id"]] if "id" in named else []
        self.refs += named.get("aria-labelledby", "").split()
        self.refs += [named["href"][1:]] if named.get("href", "").startswith("#") else []
        self.links += [named[k] for k in ("href", "src", "action", "xlink:href") if k in named]
        if tag == "tr":
            self.tables[-1].append(0)
        if tag in ("td", "th"):
            self.tables[-1][-1] += 1
        if tag == "table":
            self.tables.append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.problems.append(f"</{tag}> inside {self.open[-1:]}")
        else:
            self.open.pop()

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def scores_of(labels, methods, layers, splits, seed=0):
    """Rows as evaluate would make them, with undefined ones among them."""
    rng = np.random.default_rng(seed)
    rows = []
    for split in splits:
        for label in [*labels, "macro", "micro", "group:lung"]:
            free = [
                "auroc",
                *(
                    f"{m}/{r}"
                    for m in ("outside_effect", "inside_effect", "shortcut_reliance")
                    for r in ("case", "air")
                ),
            ]
            series = [("", "", m) for m in free] + [(a, b, m) for a in methods for b in layers for m in MAPS]
            for method, layer, measure in series:
                mean = float(rng.uniform(0.1, 0.9))
                rows.append(ScoreRow(split, method, layer, label, measure, 40, mean, mean - 0.05, mean + 0.05, 0.1))
    return rows


META = EvaluationMeta(
    title="A net",
    checkpoints=("a.ckpt", "b.ckpt"),
    command="camtrain evaluate --out DIR",
    cases={"test": 120},
    patients={"test": 100},
    bootstrap_repeats=1000,
    bootstrap_unit="patients",
    seed=3,
    thresholds={"nodule": 0.5},
    notes=("Two cases had no organs.",),
    versions={"camtrain": "0.1"},
    date="2026-01-01",
)


def full_page(
    labels=("nodule", "effusion", "mass"), methods=("hirescam", "gradcam"), layers=("layer4",), splits=("test",)
):
    comparison = [
        ComparisonRow(split, "", "", label, "auroc", 40, 0.8, 0.9, 0.1, 0.05, 0.15, 0.001, 0.004)
        for split in splits
        for label in ("macro", *labels)
    ]
    curves = [
        Curve(kind, split, m, layer, (0.0, 0.5, 1.0), (0.1, 0.6, 0.9))
        for kind in ("insertion", "deletion")
        for split in splits
        for m in methods
        for layer in layers
    ]
    return EvaluationPage(
        meta=META,
        rows=scores_of(labels, methods, layers, splits),
        measures={m: Measure(f"Says {m}.", m != "class_sensitivity") for m in [*MAPS, "auroc"]},
        comparison=comparison,
        curves=curves,
        sanity=[SanityRow(str(i), f"layer{i}", m, 0.5 / i, 0.4 / i) for i in (1, 2) for m in methods],
    )


def minimal(**more):
    row = ScoreRow("test", "", "", "nodule", "auroc", 40, 0.8, 0.7, 0.9)
    return EvaluationPage(**{"meta": EvaluationMeta(title="A net"), "rows": [row], **more})


@pytest.fixture(scope="module")
def text():
    return evaluation_html(full_page())


def sections(page):
    return [attrs["id"] for attrs in page.all("section")]


# --- the page as a document -------------------------------------------------------------------------------------------


def test_the_page_is_balanced_and_its_references_resolve(text):
    page = Page(text)
    assert len(page.ids) == len(set(page.ids)), "an id twice"
    assert set(page.refs) <= set(page.ids)
    assert all(len(set(table)) == 1 for table in page.tables), "a table with ragged lines"


def test_sections_come_in_the_order_of_reading(text):
    wanted = "first summary shortcuts labels tables curves comparison sanity undefined notes again definitions"
    assert sections(Page(text)) == wanted.split()


def test_the_page_says_whose_scores_these_are(text):
    said = " ".join("".join(Page(text).text).split())
    assert "Evaluation of b.ckpt (B) against a.ckpt (A): 3 labels, 2 methods (hirescam, gradcam) at layer4" in said
    assert "All scores are those of B" in said
    one = evaluation_html(minimal(meta=EvaluationMeta(title="A net", checkpoints=("a.ckpt",))))
    assert "those of B" not in one


def test_nothing_is_fetched(text):
    page = Page(text)
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(
        r"(?i)https?:|//[a-z]|url\(|@import",
        text.replace("// Sorting", "").replace("// What", "").replace("// Paper", ""),
    )
    assert not page.all("img") + page.all("link") + page.all("iframe")


def test_only_the_pages_own_script_may_run(text):
    import base64
    import hashlib

    (policy,) = [m["content"] for m in Page(text).all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert not [k for _, attrs in Page(text).tags for k in attrs if k.startswith("on")]


def test_tables_and_charts_speak(text):
    page = Page(text)
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(attrs.get("scope") in ("row", "col") for attrs in page.all("th"))
    charts = page.all("svg")
    assert charts
    assert all(attrs["role"] == "img" and len(attrs["aria-labelledby"].split()) == 2 for attrs in charts)
    assert len(page.all("title")) >= 1 + len(charts)
    assert len(page.all("desc")) == len(charts)
    assert page.all("html")[0]["lang"] == "en"
    assert all(attrs.get("tabindex") == "0" for attrs in page.all("div") if "scroll" in attrs.get("class", ""))


def test_same_input_same_bytes(text):
    assert evaluation_html(full_page()) == text


@pytest.mark.slow
def test_threads_and_user_settings_do_not_matter():
    page = full_page(labels=("a",), methods=("gradcam",))
    whole = evaluation_html(page)
    before = dict(mpl.rcParams)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(evaluation_html, [page, page])) == [whole, whole]
    assert dict(mpl.rcParams) == before
    others = {
        "text.usetex": True,
        "svg.fonttype": "none",
        "axes.facecolor": "red",
        "axes.grid": True,
        "axes.autolimit_mode": "round_numbers",
        "figure.autolayout": True,
        "figure.dpi": 200,
        "font.size": 30,
        "lines.linewidth": 9,
        "lines.linestyle": ":",
        "lines.marker": "x",
    }
    with mpl.rc_context(others):
        assert evaluation_html(page) == whole


@pytest.mark.slow
def test_write_replaces_the_file(tmp_path):
    path = tmp_path / "new" / "evaluation.html"
    assert write_evaluation(minimal(), path) == path
    write_evaluation(minimal(meta=EvaluationMeta(title="Größe")), path)
    assert "Größe" in path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["evaluation.html"]


# --- what users write -------------------------------------------------------------------------------------------------


def test_whatever_users_write_is_text():
    page = full_page(labels=(EVIL, "a"), methods=(EVIL + "m",), layers=(EVIL + "l",), splits=(EVIL + "s",))
    meta = EvaluationMeta(
        title=EVIL, checkpoints=(EVIL, EVIL), command=EVIL, case_filter=EVIL, bootstrap_unit=EVIL, bootstrap_repeats=3,
        cases={EVIL: 1}, thresholds={EVIL: 0.1}, notes=(EVIL,), versions={EVIL: EVIL}, date=EVIL,
    )  # fmt: skip
    page = replace(page, meta=meta, measures={"auroc": Measure(EVIL, True)})
    text = evaluation_html(page)
    read = Page(text)
    assert len(read.all("script")) == 1
    assert "<script>alert" not in text
    assert EVIL in "".join(read.text)
    assert {attrs.get("title") for attrs in read.all("th")} >= {EVIL}


@settings(max_examples=6, deadline=None)
@given(st.text(min_size=1, max_size=40))
def test_any_label_leaves_the_page_whole(label):
    rows = [ScoreRow("test", "", "", label, m, 9, 0.4, 0.3, 0.5) for m in ("auroc", "shortcut_reliance/air")]
    Page(evaluation_html(minimal(rows=rows)))


def test_scripts_of_other_alphabets_raise_no_warning(recwarn):
    rows = [ScoreRow("test", "", "", label, "auroc", 9, 0.4, 0.3, 0.5) for label in ("肺结节", "رئة", "узелок")]
    assert "肺结节</text>" in evaluation_html(minimal(rows=rows))
    assert [str(w.message) for w in recwarn] == []


# --- what is not there ------------------------------------------------------------------------------------------------


def test_sections_without_rows_are_absent():
    page = Page(evaluation_html(minimal()))
    assert sections(page) == ["labels", "tables", "again"]
    assert {a["href"] for a in page.all("a")} == {"#main", "#labels", "#tables", "#again"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drop", "gone"),
    [
        ({"comparison": (), "measures": {}}, {"comparison", "definitions"}),
        ({"curves": (), "sanity": (), "meta": EvaluationMeta(title="A net")}, {"curves", "sanity", "notes"}),
    ],
)
def test_missing_parts_take_their_sections_away(text, drop, gone):
    left = sections(Page(evaluation_html(replace(full_page(), **drop))))
    assert left == [section for section in sections(Page(text)) if section not in gone]


def test_missing_numbers_are_dashes_that_say_why():
    rows = [
        ScoreRow("test", "cam", "l4", "a", "organ_iou", 12, None, None, None, 1.0),
        ScoreRow("test", "cam", "l4", "b", "organ_iou", 0, float("nan"), float("nan"), float("nan"), float("nan")),
        ScoreRow("test", "cam", "l4", "c", "organ_iou", 1, 0.5, None, None, 0.0),
        ScoreRow("test", "cam", "l4", "c", "mask_iou", 1, 0.25, 0.0, 1.0, 0.0),
    ]
    text = evaluation_html(minimal(rows=rows))
    titles = [attrs.get("title") for attrs in Page(text).all("abbr")]
    assert titles[0] == "not given"  # the number of cases
    assert titles[1:5] == ["undefined in all of 12 counted", "not measured", "no case counted", "not measured"]
    assert "0.50</td>" in text, "a mean without an interval"
    assert not re.search(r"\b(nan|None|inf)\b", text)


def test_all_undefined_still_makes_a_page():
    rows = [
        replace(row, mean=None, low=None, high=None, undefined=1.0)
        for row in scores_of(["a"], ["cam"], ["l4"], ["test"])
    ]
    page = EvaluationPage(meta=META, rows=rows)
    assert "undefined" in sections(Page(evaluation_html(page)))
    assert forest_plot(page.scores, "test", "l4", ["cam"]) is None


def test_undefined_counts_add_up():
    rows = [
        ScoreRow("test", "cam", "l4", "a", "organ_iou", 30, 0.5, 0.4, 0.6, 0.1),
        ScoreRow("test", "cam", "l4", "b", "organ_iou", 10, 0.5, 0.4, 0.6, 0.7),
        ScoreRow("test", "cam", "l4", "macro", "organ_iou", 40, 0.5, 0.4, 0.6, 0.9),
        ScoreRow("test", "cam", "l4", "a", "mask_iou", 30, 0.5, 0.4, 0.6, 0.0),
    ]
    (line,) = undefined_grid(Scores(rows, {})).lines
    assert [cell.text for cell in line.cells] == ["test", "cam at l4", "40", "25 %", "2 of 2", "b: 70 % of 10"]


# --- what comes in ----------------------------------------------------------------------------------------------------


def test_rows_from_a_csv_make_the_same_page(text):
    page = full_page()
    file = io.StringIO()
    writer = csv.DictWriter(file, [*asdict(page.rows[0]), "unit"])
    writer.writeheader()
    writer.writerows({**asdict(row), "unit": "1"} for row in page.rows)
    read = list(csv.DictReader(io.StringIO(file.getvalue())))
    mapped = replace(
        page, rows=read, comparison=[asdict(r) for r in page.comparison], sanity=[asdict(r) for r in page.sanity]
    )
    assert evaluation_html(mapped) == text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: minimal(rows=[]), "needs rows, got none"),
        (lambda: minimal(rows=[{"split": "test"}]), "needs the column 'method', got split"),
        (
            lambda: minimal(rows=[{**asdict(minimal().rows[0]), "mean": "high"}]),
            "mean of an evaluation row .* got 'high'",
        ),
        (lambda: minimal(rows=[{**asdict(minimal().rows[0]), "n": "many"}]), "n of an evaluation row .* got 'many'"),
        (lambda: minimal(rows=[minimal().rows[0]] * 2), "one row per split.*'nodule', 'auroc'"),
        (lambda: Curve("insertion", "t", "m", "l", (0.0, 1.0), (0.5,)), "got 2 shares and 1 means"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


# --- size ------------------------------------------------------------------------------------------------------------


def test_eighty_labels_stay_small():
    rows = scores_of([f"h_great_vessel_finding_{i}" for i in range(80)], ["a", "b"], ["l4"], ["test"])
    assert 100_000 < len(evaluation_html(minimal(rows=rows)).encode()) < 400_000


@pytest.mark.slow
def test_the_largest_page_stays_under_a_few_megabytes():
    labels = [f"h_great_vessel_finding_{i}" for i in range(80)]
    page = full_page(labels, ("a", "b", "c", "d"), ("l4", "l3", "l2"), ("val", "test", "external"))
    text = evaluation_html(page)
    assert len(text.encode()) < 4_000_000
    Page(text)
