"""The figure of sums against logits."""

from __future__ import annotations

import numpy as np
import pytest

from camtrain import InputError
from camtrain.reporting.sums_plot import plot_sums

SCORES = np.linspace(-3, 4, 12).reshape(3, 4)
ORANGE, BLUE = (0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)


def painted(pixels, colour):
    """Rows and columns of the pixels near a colour; points are drawn a little transparent."""
    return np.argwhere(np.abs(pixels.astype(int) - colour).sum(2) < 150)


@pytest.mark.slow
def test_size_grid_and_both_methods():
    panels = {f"net {i}": {"Grad-CAM": (SCORES, -SCORES), "Respond-CAM": (SCORES, SCORES)} for i in range(3)}
    pixels = plot_sums(panels, size=(300, 260), title="sums")
    assert pixels.shape == (520, 600, 3)
    assert pixels.dtype == np.uint8
    for rows, columns in [
        (slice(0, 260), slice(0, 300)),
        (slice(0, 260), slice(300, 600)),
        (slice(260, 520), slice(0, 300)),
    ]:
        assert len(painted(pixels[rows, columns], ORANGE)) > 20
        assert len(painted(pixels[rows, columns], BLUE)) > 20
    assert (pixels[270:, 310:] == 255).all(), "a place without a panel stays empty"


def test_points_rise_with_the_logit_where_the_sum_does():
    (up,) = (painted(plot_sums({"net": {"m": (SCORES, s)}}), ORANGE) for s in [SCORES])
    (down,) = (painted(plot_sums({"net": {"m": (SCORES, s)}}), ORANGE) for s in [-SCORES])
    assert np.corrcoef(up[:, 1], -up[:, 0])[0, 1] > 0.5
    assert np.corrcoef(down[:, 1], -down[:, 0])[0, 1] < 0


def test_values_that_are_not_finite_are_left_out():
    scores = SCORES.copy()
    scores[0, 0] = np.nan
    assert plot_sums({"net": {"m": (scores, SCORES)}}).shape == (360, 400, 3)
    assert plot_sums({"net": {"m": (scores * np.nan, SCORES)}}).shape == (360, 400, 3)


@pytest.mark.parametrize("panels", [{}, {"net": {}}, {"net": {"m": (SCORES, SCORES[:2])}}])
def test_what_cannot_be_drawn_is_refused(panels):
    with pytest.raises(InputError, match="expected"):
        plot_sums(panels)
