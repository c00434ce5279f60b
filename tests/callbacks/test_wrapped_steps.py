"""WrappedStep: any order of leaving, any kind of step, and Lightning still sees what the user wrote."""

from __future__ import annotations

import functools
import itertools

import pytest
import pytorch_lightning as pl
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature

from camtrain._errors import InputError
from camtrain.callbacks._steps import WrappedStep, batch_of


class Plain(pl.LightningModule):
    def training_step(self, batch, batch_idx):
        return [batch]


def adding(mark):
    return lambda original, *args, **kwargs: [*original(*args, **kwargs), mark]


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
@pytest.mark.parametrize("own", [False, True])
def test_any_order_of_leaving(order, own):
    module = Plain()
    if own:
        module.training_step = given = lambda batch, batch_idx: [batch]
    wrapped = [WrappedStep(module, "training_step", adding(mark)) for mark in range(3)]
    assert module.training_step("b", 0) == ["b", 0, 1, 2]
    here = [0, 1, 2]
    for mark in order:
        wrapped[mark].undo()
        wrapped[mark].undo()
        here.remove(mark)
        assert module.training_step("b", batch_idx=0) == ["b", *here]
    if own:
        assert module.training_step is given
    else:
        assert "training_step" not in vars(module)


def test_somebody_elses_wrapper_in_between_stays():
    module = Plain()
    ours = WrappedStep(module, "training_step", adding("ours"))
    inner = module.training_step
    module.training_step = theirs = lambda *args: [*inner(*args), "theirs"]
    assert module.training_step("b", 0) == ["b", "ours", "theirs"]
    ours.undo()
    assert module.training_step is theirs
    assert module.training_step("b", 0) == ["b", "theirs"]


def test_what_lightning_sees():
    module = Plain()
    for _ in range(2):
        WrappedStep(module, "training_step", adding(0))
        WrappedStep(module, "validation_step", adding(0))
    assert is_overridden("training_step", module)
    assert not is_overridden("validation_step", module)
    assert is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)

    class Decorated(pl.LightningModule):
        @functools.wraps(Plain.training_step)
        def training_step(self, *args):
            return None

    other = Decorated()
    before = is_param_in_hook_signature(other.training_step, "batch_idx", min_args=2)
    WrappedStep(other, "training_step", adding(0))
    assert is_param_in_hook_signature(other.training_step, "batch_idx", min_args=2) == before


def test_dataloader_iter_is_refused():
    module = Plain()
    module.training_step = lambda dataloader_iter: None
    with pytest.raises(InputError, match="training_step takes dataloader_iter"):
        WrappedStep(module, "training_step", adding(0))


def test_the_batch_of_a_step():
    batch = {"image": 1}
    assert batch_of((batch, 0), {}) == batch
    assert batch_of((batch,), {}) is not batch
    assert batch_of((), {"batch": batch, "batch_idx": 0}) == batch
    assert batch_of(([1, 2], 0), {}) == [1, 2]
