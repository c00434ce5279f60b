"""Opening W&B before a run: offline where its server does not take it."""

from __future__ import annotations

import os

import pytest

from camtrain.reporting import open_loggers


class CommError(Exception):
    """As W&B's own."""


CommError.__module__ = "wandb.errors"


class WandbLogger:
    def __init__(self, error=None):
        self.error, self._wandb_init, self.opened = error, {"mode": "online"}, 0

    @property
    def experiment(self):
        if self.error is not None and self._wandb_init["mode"] == "online":
            raise self.error
        self.opened += 1
        return self


@pytest.mark.parametrize("error", [CommError("timed out"), ConnectionRefusedError("nobody there")])
def test_a_server_that_cannot_be_reached_makes_it_an_offline_run(monkeypatch, error):
    monkeypatch.setenv("WANDB_MODE", "online")
    logger, well, other = WandbLogger(error), WandbLogger(), object()
    with pytest.warns(UserWarning, match=rf"cannot be opened online \({type(error).__name__}: .*wandb sync"):
        open_loggers([other, logger, well])
    assert (logger._wandb_init["mode"], well._wandb_init["mode"]) == ("offline", "online")
    assert os.environ["WANDB_MODE"] == "offline"
    assert logger.opened
    assert well.opened


def test_what_is_not_the_servers_fault_stays_an_error(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(TypeError, match="no project"):
        open_loggers([WandbLogger(TypeError("no project"))])


@pytest.mark.parametrize(("given", "opened"), [(None, "first"), ("mine", "mine")])
def test_the_run_of_the_checkpoint_goes_on(given, opened):
    logger, second = WandbLogger(), WandbLogger()
    logger._wandb_init["id"] = given
    states = {"ModelCheckpoint": {"best": 1}, "AttentionMonitor[]": {"wandb": ["first"]}, "Other": 5}
    open_loggers([object(), logger, second], {"callbacks": states})
    assert logger._wandb_init["id"] == opened
    assert second._wandb_init.get("id") is None
    open_loggers([second], {"callbacks": {"AttentionMonitor[]": {}}})
    assert second._wandb_init.get("id") is None
