"""Words on pictures: in every script that the two fonts have, and never an error."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from camtrain.reporting import _draw


def ink(text):
    return _draw.headline(text, 400, 14)


def test_letters_are_told_apart():
    names = ["Gefaess", "Gefäß", "Gefaß", "λ", "λ-Wert", "Узел", "Łódź", "3–5 mm λ", "肺"]
    shown = [ink(name).tobytes() for name in names]
    assert len(set(shown)) == len(names)
    assert np.array_equal(ink("肺"), ink("?"))
    assert np.array_equal(ink("e\u0301"), ink("é"))  # one letter in two ways
    assert np.array_equal(ink("3–5 µm"), ink("3-5 um"))  # what is nearly ASCII stays in the font of the others


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.integers(1, 120), st.booleans())
def test_any_text_is_drawn_and_fits(text, width, middle):
    assert _draw.text_width(_draw.fitted(text, 12, width, middle), 12) <= max(width, _draw.text_width("...", 12))
    assert ink(text).shape == ink("a").shape


def test_the_most_letters_that_fit_are_kept():
    text = "ä" * 100
    kept = _draw.fitted(text, 12, 200).removesuffix("...")
    assert set(kept) == {"ä"}
    assert _draw.text_width(kept + "ä...", 12) > 200
