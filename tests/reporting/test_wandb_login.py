"""Where W&B keeps a login: what it would find is found, without W&B and without a server."""

from __future__ import annotations

import pytest

from camtrain.reporting.wandb_login import logged_in_to_wandb, wandb_mode

NAMES = ("API_KEY", "IDENTITY_TOKEN_FILE", "MODE", "BASE_URL", "CONFIG_DIR", "DIR")


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A home of somebody who has never heard of W&B."""
    for name in NAMES:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def machine(home, name, file=".netrc"):
    (home / file).write_text(f"machine {name} login user password {'0' * 40}\n")


def settings(home, text):
    folder = home / ".config" / "wandb"
    folder.mkdir(parents=True)
    (folder / "settings").write_text(f"[default]\n{text}\n")


def test_nobody_is_logged_in(home):
    assert not logged_in_to_wandb()
    assert wandb_mode() is None
    machine(home, "github.com")
    assert not logged_in_to_wandb()
    (home / ".netrc").write_text("no netrc file\n")
    assert not logged_in_to_wandb()


# W&B's own server, by the names under which its clients have written it.
@pytest.mark.parametrize("name", ["api.wandb.ai", "api.forge.coreweave.com"])
@pytest.mark.parametrize("url", [None, "https://api.wandb.ai", "https://api.forge.coreweave.com"])
def test_a_login_at_wandb(home, monkeypatch, name, url):
    machine(home, name)
    if url is not None:
        monkeypatch.setenv("WANDB_BASE_URL", url)
    assert logged_in_to_wandb()


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://localhost:8080", "localhost:8080"),
        ("http://localhost:8080", "localhost"),
        ("https://wandb.example.org", "wandb.example.org"),
    ],
)
def test_a_login_at_a_server_of_ones_own(home, monkeypatch, url, name):
    machine(home, name, "_netrc")
    assert not logged_in_to_wandb()
    monkeypatch.setenv("WANDB_BASE_URL", url)
    assert logged_in_to_wandb()
    monkeypatch.delenv("WANDB_BASE_URL")
    settings(home, f"base_url = {url}")  # as `wandb login --host` writes it
    assert logged_in_to_wandb()
    machine(home, "api.wandb.ai", "_netrc")
    assert not logged_in_to_wandb()


@pytest.mark.parametrize("name", ["API_KEY", "IDENTITY_TOKEN_FILE"])
def test_a_login_in_the_environment(home, monkeypatch, name):
    monkeypatch.setenv(f"WANDB_{name}", "x")
    assert logged_in_to_wandb()


def test_what_the_user_has_said_it_should_be(home, monkeypatch):
    settings(home, "mode = online")
    assert wandb_mode() == "online"
    (home / "wandb").mkdir()
    (home / "wandb" / "settings").write_text("[default]\nmode = offline\n")  # of this folder: it counts for more
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"
    (home / "wandb" / "settings").write_text("%no settings")
    assert not logged_in_to_wandb()
