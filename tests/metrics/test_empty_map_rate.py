"""EmptyMapRate against numpy's max."""

from __future__ import annotations

import numpy as np
import pytest

from camtrain.metrics import EmptyMapRate, empty_map_rate


@pytest.mark.parametrize("size", [(13,), (5, 7), (4, 3, 6)])
def test_equals_the_maximum(make_case, reference, size):
    case = make_case(size=size)
    expected, counted = reference(lambda m, a: float(m.max() <= 0), *case)
    assert set(expected[~np.isnan(expected)]) == {0.0, 1.0}
    np.testing.assert_array_equal(empty_map_rate(*case), expected)
    metric = EmptyMapRate(7, "micro")
    metric.update(*case)
    assert metric.compute().item() == pytest.approx(np.nanmean(expected))
    # Only the two broken maps of the batch have no answer.
    assert metric.undefined_rate().item() == pytest.approx(2 / counted.sum())
