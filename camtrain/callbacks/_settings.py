"""What callbacks were asked for, and the config of the command line: as plain values, without secrets."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

_SECRET = re.compile(r"(api|access|private)_?keys?|key(?!s|word|point)|token|password|secret|credential", re.IGNORECASE)
HIDDEN = "(not shown)"
_LONGEST = 400


def secret(name: str) -> bool:
    """Is what stands under this name nobody's business?

    Example:
        >>> secret("wandb_api_key"), secret("max_label_keys")
        (True, False)
    """
    return bool(_SECRET.search(name))


def plain(value: Any, depth: int = 6) -> Any:
    """A value as JSON holds it: numbers, words, lists and dicts; whatever else becomes text, without secrets.

    Example:
        >>> plain({"lr": 0.1, "api_key": "x", "sizes": (1, 2), "kind": int})
        {'lr': 0.1, 'api_key': '(not shown)', 'sizes': [1, 2], 'kind': "<class 'int'>"}
    """
    if value is None or isinstance(value, bool | int | str):
        return value if not isinstance(value, str) else value[:_LONGEST]
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if isinstance(value, Mapping) and depth:
        return {str(k): HIDDEN if secret(str(k)) else plain(v, depth - 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset) and depth:
        return [plain(each, depth - 1) for each in value]
    return str(value)[:_LONGEST]


def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a constructor as plain values; its first line calls this with `locals()`.

    Modules and functions become their names; a table that was written in Python stands in `run.json` as a whole.

    Example:
        >>> given({"self": None, "layer": nn.ReLU(), "weight": 0.5, "table": {"organs": {}}})
        {'layer': 'ReLU', 'weight': 0.5, 'table': 'a mapping'}
    """
    named = {name: value for name, value in arguments.items() if name != "self" and not name.startswith("_")}
    if isinstance(named.get("table"), Mapping):
        named["table"] = "a mapping"
    return {name: plain(_named(value)) for name, value in named.items()}


def settings_of(callbacks: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """Callback -> its settings; several of one class are told apart by their names, or by numbers."""
    found: dict[str, dict[str, Any]] = {}
    for callback in callbacks:
        key = kind = type(callback).__qualname__
        if key in found and isinstance(name := getattr(callback, "name", None), str):
            key = f"{kind} {name}"
        number = 2
        while key in found:
            key, number = f"{kind} {number}", number + 1
        found[key] = settings(callback)
    return found


def settings(callback: Any) -> dict[str, Any]:
    """Constructor arguments, as far as they are known; first those that are not the defaults.

    camtrain's callbacks keep what they were given; of others it is what they hold under the same name and is plain.
    """
    try:
        parameters = list(inspect.signature(type(callback).__init__).parameters.values())[1:]
    except (TypeError, ValueError):
        return {}
    defaults = {parameter.name: plain(_named(parameter.default)) for parameter in parameters}
    kept = getattr(callback, "given", None)
    kept = kept if isinstance(kept, Mapping) else {}
    found: dict[str, Any] = dict(kept)
    for name in defaults:
        now = getattr(callback, name, None)
        # What a callback has drawn for a None, such as a seed, says more.
        if found.get(name) is None and isinstance(now, bool | int | float | str | list | tuple):
            found[name] = plain(now)
    changed = {name: value for name, value in found.items() if name not in defaults or value != defaults[name]}
    return dict(plain({**changed, **found}))


def saved_config(trainer: Any, root: str | Path) -> Path | None:
    """The whole config that LightningCLI has written for this run, or None.

    Args:
        trainer: The Trainer.
        root: Its log folder (asking the Trainer is a broadcast, and this runs on rank zero only).
    """
    for callback in trainer.callbacks:
        if any(kind.__name__ == "SaveConfigCallback" for kind in type(callback).__mro__):
            path = Path(getattr(callback, "path", None) or Path(root) / callback.config_filename)
            return path.absolute() if path.is_file() else None
    return None


def read_config(path: Path) -> dict[str, Any]:
    """A saved config as plain values, without secrets; empty where it cannot be read.

    Args:
        path: The file.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # a user's own kind of value: the file is named all the same
        return {}
    return dict(plain(content, depth=20)) if isinstance(content, dict) else {}


def _named(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_named(each) for each in value]
    if isinstance(value, nn.Module):
        return type(value).__qualname__
    return getattr(value, "__qualname__", value) if callable(value) else value
