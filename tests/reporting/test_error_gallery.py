"""The page of errors: complete in itself, in order, escaped."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from camtrain import InputError
from camtrain.reporting import ErrorCard, error_gallery_html, write_error_gallery


def card(kind="fn", case="case 7", label="nodule", probability=0.1, **more):
    picture = np.zeros((6, 9, 3), np.uint8)
    picture[2:4, :5] = (200, 30, 90)
    return ErrorCard(kind, case, label, probability, picture, f"maps of {label}", **more)


def test_pictures_lie_in_the_page():
    page = error_gallery_html([card()], "Errors")
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    np.testing.assert_array_equal(shown, card().picture)
    assert 'alt="maps of nodule" width="9" height="6"' in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "<script" not in page
    assert "http:" not in page
    assert "default-src 'none'" in page


def test_surest_errors_come_first_and_kinds_stand_apart():
    cards = [card(case=f"fn {p}", probability=p) for p in (0.4, 0.02, 0.2)]
    cards += [card("fp", case=f"fp {p}", probability=p) for p in (0.6, 0.97, 0.7)]
    page = error_gallery_html(cards, "Errors")
    order = re.findall(r"<h3>nodule, (.*?): probability ([\d.]+)</h3>", page)
    assert [name for name, _ in order] == ["fn 0.02", "fn 0.2", "fn 0.4", "fp 0.97", "fp 0.7", "fp 0.6"]
    assert "False negatives (3)" in page
    assert "False positives (3)" in page
    assert page.index('id="fn"') < page.index("fn 0.4") < page.index('id="fp"') < page.index("fp 0.97")


def test_numbers_and_what_is_missing():
    rows = {"heart": (0.25, float("nan")), "no organ": (0.75, 1.0)}
    page = error_gallery_html([card(columns=("mass", "volume"), rows=rows, note="Truth: present.")], "Errors", "A net.")
    cells = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td>', page)
    assert cells == [("heart", "0.25", "-"), ("no organ", "0.75", "1.00")]
    assert "<figcaption>Truth: present.</figcaption>" in page
    assert "A net." in page
    assert "None was found." in page  # of the other kind


def test_names_are_escaped():
    page = error_gallery_html([card(label="<b>", case='"x"', note="<i>")], "<u>")
    assert not {"<b>", "<i>", "<u>"} & set(re.findall(r"<[biu]>", page))
    assert "&lt;b&gt;, &#34;x&#34;" in page


def test_the_same_input_gives_the_same_file(tmp_path):
    paths = [write_error_gallery(tmp_path / name, [card()], "Errors") for name in ("a.html", "b.html")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_bad_input():
    with pytest.raises(InputError, match="kind= expects fn or fp"):
        card("miss")
    with pytest.raises(InputError, match="one per heading, for 'heart'"):
        card(columns=("mass",), rows={"heart": (1.0, 2.0)})
    with pytest.raises(InputError, match="uint8"):
        ErrorCard("fn", "a", "b", 0.1, np.zeros((4, 4, 3)), "")
