"""Units, bootstrap multiplicities and swaps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from camtrain import InputError
from camtrain.evaluation.resampling import (
    Units,
    bootstrap_chunks,
    bootstrap_weights,
    swap_chunks,
    swaps_are_exact,
)

PATIENTS = ["p", "q", None, "p", "", "q", "p"]
IDS = list("abcdefg")


def test_units_are_patients_where_known():
    units = Units.of(IDS, PATIENTS)
    assert units.index.tolist() == [0, 1, 2, 0, 3, 1, 0]
    assert units.count == 4
    assert len(units) == 7


def test_without_patients_every_case_is_a_unit():
    assert Units.of(IDS).index.tolist() == list(range(7))


def test_a_case_named_like_a_patient_is_not_that_patient():
    assert Units.of(["p", "b"], [None, "p"]).count == 2


def test_units_having():
    mask = np.zeros((7, 2), dtype=bool)
    mask[3, 0] = mask[6, 0] = mask[4, 1] = True
    assert Units.of(IDS, PATIENTS).having(mask).tolist() == [
        [True, False],
        [False, False],
        [False, False],
        [False, True],
    ]


@pytest.mark.parametrize(
    ("ids", "patients", "says"),
    [([], None, "no cases to resample"), (["a", "b"], ["p"], "one patient for each of 2 cases, got 1")],
)
def test_units_bad_input(ids, patients, says):
    with pytest.raises(InputError, match=says):
        Units.of(ids, patients)


@pytest.mark.parametrize("repeats", [0, -3, True, 1.5])
@pytest.mark.parametrize("chunks", [bootstrap_chunks, swap_chunks])
def test_no_repeats_is_refused(chunks, repeats):
    with pytest.raises(InputError, match="at least one resampling"):
        list(chunks(Units.of(list(map(str, range(80)))), repeats))


def test_weights_draw_as_many_units_as_there_are():
    units = Units.of(IDS, PATIENTS)
    weights = bootstrap_weights(units, repeats=50, seed=3)
    first = [units.index.tolist().index(u) for u in range(units.count)]
    assert (weights[:, first].sum(axis=1) == units.count).all()
    assert (weights == weights[:, first][:, units.index]).all(), "cases of one patient are drawn together"


def test_weights_are_multinomial():
    n, repeats = 6, 20_000
    weights = bootstrap_weights(Units.of(list(map(str, range(n)))), repeats, seed=1)
    # Binomial(n, 1/n): mean 1, variance 1 - 1/n; two units: covariance -1/n.
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.03)
    np.testing.assert_allclose(np.cov(weights.T), np.eye(n) - 1 / n, atol=0.03)
    assert (weights == 0).mean() == pytest.approx((1 - 1 / n) ** n, abs=0.01)


@given(chunk=st.integers(1, 100), seed=st.integers(0, 5), patients=st.booleans())
def test_chunks_do_not_change_the_draws(chunk, seed, patients):
    units = Units.of(IDS, PATIENTS if patients else None)
    blocks = list(bootstrap_chunks(units, 11, seed, chunk))
    assert max(map(len, blocks)) <= max(1, chunk // 7)
    assert (np.concatenate(blocks) == bootstrap_weights(units, 11, seed)).all()
    random = Units.of(list(map(str, range(9))))
    whole = np.concatenate(list(swap_chunks(random, 13, seed)))
    assert (np.concatenate(list(swap_chunks(random, 13, seed, chunk))) == whole).all()


def test_seeds_differ():
    units = Units.of(IDS)
    assert (bootstrap_weights(units, 9, seed=0) != bootstrap_weights(units, 9, seed=1)).any()


@pytest.mark.parametrize("repeats", [16, 100])
def test_few_units_are_swapped_in_every_way(repeats):
    units = Units.of(IDS, PATIENTS)
    assert swaps_are_exact(units, repeats)
    swaps = np.concatenate(list(swap_chunks(units, repeats, chunk=7 * 5)))
    assert len(swaps) == len({tuple(row) for row in swaps}) == 16
    assert (swaps[0] == 0).all()
    assert (swaps[:, 0] == swaps[:, 3]).all()


def test_many_units_are_swapped_at_random():
    units = Units.of([str(i) for i in range(200)])
    assert not swaps_are_exact(units, 2000)
    swaps = np.concatenate(list(swap_chunks(units, 2000, seed=4)))
    assert swaps.shape == (2000, 200)
    assert set(np.unique(swaps)) == {0.0, 1.0}
    np.testing.assert_allclose(swaps.mean(axis=0), 0.5, atol=0.06)
