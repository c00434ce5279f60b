"""The figure of a sanity check."""

from __future__ import annotations

import numpy as np
import pytest

from camtrain._errors import InputError
from camtrain.reporting.sanity_plot import plot_cascade

CURVES = {"Spearman": {"hirescam": [0.2, 0.0], "guided": [0.9, float("nan")]}, "SSIM": {"hirescam": [0.1, 0.1]}}


def test_size_and_what_changes_the_picture():
    plain = plot_cascade(CURVES, ["head", "conv"], width=700, height=320)
    assert (plain.shape, plain.dtype) == ((320, 700, 3), np.uint8)
    dashed = plot_cascade(CURVES, ["head", "conv"], ["guided"], width=700, height=320)
    limits = plot_cascade(CURVES, ["head", "conv"], limits={"Spearman": [(1, 0.7)]}, width=700, height=320)
    assert (plain != dashed).any()
    assert (plain != limits).any()


def test_refused():
    with pytest.raises(InputError, match="expected curves"):
        plot_cascade({}, ["head"])
    with pytest.raises(InputError, match="SSIM of hirescam has 2 values for 1 stages"):
        plot_cascade({"SSIM": {"hirescam": [0.1, 0.1]}}, ["head"])
