"""Is there a login that W&B would find? Without one a run is offline, and nobody is asked for a key."""

from __future__ import annotations

import configparser
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

# One server under two names: `wandb login` of W&B 0.31 writes the second, earlier ones wrote the first.
_CLOUD = ("api.wandb.ai", "api.forge.coreweave.com")


def logged_in_to_wandb() -> bool:
    """Would W&B find credentials: in the environment, in its settings, or in the netrc file that `wandb login` writes?

    W&B is not imported, and no server is asked.

    Example:
        >>> os.environ["WANDB_API_KEY"] = "0" * 40
        >>> logged_in_to_wandb()
        True
        >>> del os.environ["WANDB_API_KEY"]
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = _settings()
    if settings.get("api_key"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or f"https://{_CLOUD[0]}")
    # W&B keeps the port of a server of one's own with its name; versions before that did not.
    names = _CLOUD if server.hostname in _CLOUD else (server.netloc, server.hostname or "")
    return any(_in_netrc(name) for name in names)


def wandb_mode() -> str | None:
    """What the user has said W&B should be: `WANDB_MODE`, or what `wandb offline` and `wandb disabled` have written."""
    return os.environ.get("WANDB_MODE") or _settings().get("mode")


def _settings() -> dict[str, str]:
    """W&B's settings files: those of the user, and over them those of the working directory."""
    user = os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb"
    root = Path(os.environ.get("WANDB_DIR") or ".")
    folder = ".wandb" if (root / ".wandb").exists() else "wandb"
    read = configparser.ConfigParser(interpolation=None)
    try:
        read.read([Path(user).expanduser() / "settings", root / folder / "settings"], encoding="utf-8")
    except (OSError, UnicodeDecodeError, configparser.Error):
        return {}
    return dict(read["default"]) if read.has_section("default") else {}


def _in_netrc(host: str) -> bool:
    named = os.environ.get("NETRC")
    files = [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    file = next((file for file in files if file.exists()), files[0])
    try:
        return netrc.netrc(str(file)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
