"""Spearman against scipy, SSIM against a slow reference, and what has no likeness."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from camtrain._errors import InputError
from camtrain.evaluation.similarity import spearman, ssim, window_sizes

GRIDS = [(9,), (5, 7), (4, 5, 6)]


def pair(grid, seed=0, levels=None):
    generator = torch.Generator().manual_seed(seed)
    make = (lambda: torch.randn(2, 3, *grid, generator=generator)) if levels is None else (
        lambda: torch.randint(-levels, levels + 1, (2, 3, *grid), generator=generator).float()
    )  # fmt: skip
    return make(), make()


def slow_ssim(a, b, window):
    """The formula of Wang et al. 2004 with a uniform window, place by place."""
    a, b = (np.abs(m.double().numpy()) / np.abs(m.double().numpy()).max() for m in (a, b))
    c1, c2, found = 0.01**2, 0.03**2, []
    for corner in itertools.product(*(range(n - w + 1) for n, w in zip(a.shape, window, strict=True))):
        where = tuple(slice(i, i + w) for i, w in zip(corner, window, strict=True))
        x, y = a[where], b[where]
        covariance = ((x - x.mean()) * (y - y.mean())).mean()
        found.append(
            (2 * x.mean() * y.mean() + c1) * (2 * covariance + c2)
            / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (x.var() + y.var() + c2))
        )  # fmt: skip
    return np.mean(found)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("absolute", [False, True])
def test_spearman_is_scipys(grid, levels, absolute):
    a, b = pair(grid, levels=levels)
    found = spearman(a, b, absolute)
    assert found.shape == (2, 3)
    for i, j in itertools.product(range(2), range(3)):
        x, y = (m[i, j].abs() if absolute else m[i, j] for m in (a, b))
        assert found[i, j].item() == pytest.approx(spearmanr(x.flatten(), y.flatten()).statistic, abs=1e-12)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30))
def test_spearman_with_many_ties(values):
    a, b = (torch.tensor(column, dtype=torch.float64)[None, None] for column in zip(*values, strict=True))
    found = spearman(a, b).item()
    if a.unique().numel() == 1 or b.unique().numel() == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(spearmanr(a.flatten(), b.flatten()).statistic, abs=1e-9)
        assert found == spearman(b, a).item()
        assert spearman(a, -b).item() == pytest.approx(-found, abs=1e-12)
        assert spearman(a, b.exp()).item() == pytest.approx(found, abs=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
def test_ssim_is_that_of_the_slow_reference(grid):
    a, b = pair(grid, seed=1)
    found = ssim(a, b)
    for i, j in itertools.product(range(2), range(3)):
        assert found[i, j].item() == pytest.approx(slow_ssim(a[i, j], b[i, j], window_sizes(grid)), abs=2e-5)
    narrow = ssim(a, b, window=2)
    assert narrow[1, 2].item() == pytest.approx(slow_ssim(a[1, 2], b[1, 2], (2,) * len(grid)), abs=2e-5)


@pytest.mark.parametrize("grid", [(2,), (3, 2), (2, 2, 2), (4, 4, 4), (3, 1, 5)])
def test_ssim_of_small_grids(grid):
    a, b = pair(grid, seed=2)
    assert torch.allclose(ssim(a, a), torch.ones(2, 3, dtype=torch.float64), atol=1e-5)
    assert bool((ssim(a, b) < 0.999).all())
    assert [w <= n for w, n in zip(window_sizes(grid), grid, strict=True)] == [True] * len(grid)


def test_scale_and_sign_do_not_count_for_ssim():
    a, b = pair((4, 4, 4))
    torch.testing.assert_close(ssim(a, -7 * b), ssim(a, b), atol=1e-6, rtol=0)
    torch.testing.assert_close(ssim(1e-9 * a, b), ssim(a, b), atol=1e-5, rtol=0)


def test_what_is_constant_or_broken_has_no_likeness_and_harms_no_other():
    a, b = pair((4, 5))
    whole = [f(a, b) for f in (spearman, ssim)]
    a[0, 0], a[0, 1, 2, 2], b[1, 1, 0, 0], b[1, 2] = 0, torch.nan, torch.inf, 3.5
    for measure, before in zip((spearman, ssim), whole, strict=True):
        found = measure(a, b)
        assert found.isnan().tolist() == [[True, True, False], [False, True, True]]
        torch.testing.assert_close(found[0, 2], before[0, 2])
        torch.testing.assert_close(found[1, 0], before[1, 0])
    both = torch.tensor([[[1.0, -1, 1, -1]]])
    assert not spearman(both, both).isnan()
    assert bool(spearman(both, both, absolute=True).isnan())
    assert bool(ssim(both, both).isnan())


def test_samples_do_not_see_each_other():
    a, b = pair((4, 3, 5))
    for measure in (spearman, ssim):
        alone = torch.stack([measure(a[i : i + 1], b[i : i + 1])[0] for i in range(2)])
        torch.testing.assert_close(measure(a, b), alone)
        assert measure(a[:0], b[:0]).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    a, b = (m.to(dtype) for m in pair((4, 4)))
    torch.testing.assert_close(spearman(a, b), spearman(a.float(), b.float()))
    torch.testing.assert_close(ssim(a, b), ssim(a.float(), b.float()), atol=1e-5, rtol=0)
    assert not spearman(a.requires_grad_(), b).requires_grad


def test_refused():
    a, _ = pair((4, 4))
    with pytest.raises(InputError, match=r"two maps of one shape.*\(2, 3, 4, 4\) and \(2, 3, 4, 3\)"):
        spearman(a, a[..., :3])
    with pytest.raises(InputError, match="two maps of one shape"):
        ssim(a[0, 0], a[0, 0])
    with pytest.raises(InputError, match="1, 2 or 3 spatial axes"):
        ssim(a[..., None, None], a[..., None, None])
    with pytest.raises(InputError, match="2 cells or more"):
        ssim(a, a, window=1)
