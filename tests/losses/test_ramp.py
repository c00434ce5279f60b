"""The ramp is a pure function of the optimizer step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camtrain._errors import InputError
from camtrain.losses import Ramp


def test_values():
    ramp = Ramp(warmup_steps=3, ramp_steps=5)
    values = [ramp.weight_at(step) for step in range(11)]
    assert values == pytest.approx([0, 0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1])


def test_by_default_it_acts_from_the_first_step():
    assert [Ramp().weight_at(step) for step in (0, 1, 10**9)] == [1.0, 1.0, 1.0]


def test_a_warm_up_without_a_ramp_switches():
    assert [Ramp(warmup_steps=2).weight_at(step) for step in range(4)] == [0.0, 0.0, 1.0, 1.0]


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 200))
def test_between_zero_and_one_and_never_falling(warmup, ramp_steps, step):
    ramp = Ramp(warmup, ramp_steps)
    assert 0 <= ramp.weight_at(step) <= ramp.weight_at(step + 1) <= 1
    assert ramp.weight_at(warmup + ramp_steps) == 1


@pytest.mark.parametrize("arguments", [{"warmup_steps": -1}, {"ramp_steps": -5}, {"warmup_steps": 1.5}])
def test_no_negative_or_broken_steps(arguments):
    with pytest.raises(InputError, match=f"expected {next(iter(arguments))} as a number of optimizer steps"):
        Ramp(**arguments)
