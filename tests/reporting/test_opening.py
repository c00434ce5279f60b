"""Opening W&B before a run: offline where its server does not take it."""

from __future__ import annotations

import os
import sys
import warnings
from types import SimpleNamespace

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


class OnlineLogger(WandbLogger):
    """As a user makes one who says nothing of how it should be opened; it keeps what it was opened as."""

    def __init__(self, **given):
        super().__init__()
        self._wandb_init = {"project": "p", **given}

    @property
    def experiment(self):
        self.mode = self._wandb_init.get("mode", "asks for a key")
        return self


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """Nobody is logged in; gives W&B as far as it is asked."""
    for name in ("API_KEY", "IDENTITY_TOKEN_FILE", "BASE_URL"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("WANDB_MODE", "")  # and what is set here is taken back
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    wandb = SimpleNamespace(run=None, setup=lambda: SimpleNamespace(settings=SimpleNamespace(api_key=None)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


def test_without_a_login_nobody_is_asked_for_a_key(nobody):
    logger = OnlineLogger()
    with pytest.warns(UserWarning, match=r"cannot be opened online \(there is no login .*wandb sync"):
        open_loggers([logger])
    assert logger.mode == os.environ["WANDB_MODE"] == "offline"


@pytest.mark.parametrize("what", ["key", "netrc", "mode", "settings", "session", "run", "mode of the logger", "opened"])
def test_a_login_or_what_the_user_has_said_is_left_alone(nobody, monkeypatch, tmp_path, what):
    given = {"mode of the logger": {"mode": "online"}, "settings": {"settings": object()}}
    logger = OnlineLogger(**given.get(what, {}))
    if what == "opened":
        logger._experiment = object()
    if what == "key":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    if what == "netrc":
        (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'0' * 40}\n")
    if what == "mode":
        monkeypatch.setenv("WANDB_MODE", "online")
    if what == "session":
        monkeypatch.setattr(nobody, "setup", lambda: SimpleNamespace(settings=SimpleNamespace(api_key="0" * 40)))
    if what == "run":
        monkeypatch.setattr(nobody, "run", object())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_loggers([logger])
    assert logger.mode in ("asks for a key", "online")
