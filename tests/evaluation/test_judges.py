"""A model that was trained with one replacement is judged with another."""

from __future__ import annotations

import pytest

from camtrain import InputError
from camtrain.evaluation.reliance import judge_with, trained_replacements


@pytest.mark.parametrize(
    ("callbacks", "found"),
    [
        (None, set()),
        ({}, set()),
        ({"ModelCheckpoint{'monitor': None}": {}}, set()),
        ({"OutsideSwap": {}}, {"case"}),
        ({"OutsideSwap[]": None}, {"case"}),
        ({"OutsideSwap{'p': 0.5}": {"seen": 3}}, {"case"}),
        ({"OutsideSwap[a]": {"replacement": "air"}, "OutsideSwap[b]": {"replacement": "blur"}}, {"air", "blur"}),
        ({"camtrain.callbacks.OutsideSwap": {}}, {"case"}),
        ({"NotAnOutsideSwap": {}, "OutsideSwapper[]": {}, "Timer[OutsideSwap]": {}}, set()),
    ],
)
def test_what_a_checkpoint_says_of_its_training(callbacks, found):
    checkpoint = {"state_dict": {}} | ({} if callbacks is None else {"callbacks": callbacks})
    assert trained_replacements(checkpoint) == found


def test_a_model_is_judged_with_what_it_was_not_trained_with():
    assert judge_with(["case", "air", "blur"], set()) == (("case", "air", "blur"), "")
    left = judge_with(["blur", "case", "air", "blur"], {"case"})
    assert left.replacements == ("blur", "air")
    assert left.dropped.startswith("Replacement 'case' is left out: the model was trained with it")
    assert judge_with(["air"], {"case"}).dropped == ""
    with pytest.raises(InputError, match="got 'case'; take air, blur, mean"):
        judge_with(["case"], {"case"})
    with pytest.raises(InputError, match="got none; take case, air"):
        judge_with([], set())
    with pytest.raises(InputError, match="got 'blurr'; nearest: blur"):
        judge_with(["blurr"], set())
