"""What ran: labels, methods, layers, organ table, settings, command: plain values for `run.json` and for loggers."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from camtrain import __version__
from camtrain.callbacks._context import RunContext
from camtrain.callbacks._layers import layer_names
from camtrain.cam.asked import Asked
from camtrain.cam.layer_lookup import LayerSpec
from camtrain.cam.several import Layers
from camtrain.reporting.panel_files import LAYOUT

_PACKAGES = ("torch", "pytorch-lightning", "lightning", "monai", "torchmetrics", "numpy")
_SECRET = re.compile(r"key|token|password|secret|credential", re.IGNORECASE)
_HIDDEN = "(not shown)"
_TRAINER = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val", "num_devices")
_LONGEST = 400


def run_facts(
    trainer: Any,
    pl_module: Any,
    context: RunContext,
    methods: Sequence[str],
    layers: Sequence[str],
    seen: Mapping[str, float],
) -> dict[str, Any]:
    """The content of `run.json`.

    Args:
        trainer: The Trainer.
        pl_module: The user's module.
        context: What the monitor has read of the run.
        methods: Attention methods, the first with the plain keys first.
        layers: Tapped layers.
        seen: Layer -> seen share.
    """
    return {
        "layout": LAYOUT,
        "labels": list(context.names or []),
        "methods": list(methods),
        "layers": list(layers),
        "seen": dict(seen),
        "table": context.selected.to_dict() if context.has_table else None,
        "config": {
            "model": {"class": type(pl_module).__qualname__, **_hparams(pl_module)},
            "data": _data(getattr(trainer, "datamodule", None)),
            "trainer": {name: plain(getattr(trainer, name, None)) for name in _TRAINER},
            "callbacks": {type(callback).__qualname__: _settings(callback) for callback in trainer.callbacks},
        },
        "command": shlex.join(_without_secrets(sys.orig_argv or sys.argv)),
        "versions": {"camtrain": __version__, "python": sys.version.split()[0], **_versions()},
    }


def monitor_facts(
    context: RunContext, layer: LayerSpec | Layers, asked: Sequence[Asked], name: str | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What was asked of a monitor, for the config of a logger: plain values, and the organ table of its labels or None.

    Args:
        context: What the monitor has found out about the run.
        layer: As given.
        asked: The methods.
        name: Name of the monitor.
    """
    facts = {
        "version": __version__,
        "name": name,
        "layers": layer_names(layer),
        "methods": [{"name": each.name, **{k: str(v) for k, v in each.options.items()}} for each in asked],
        "labels": list(context.names or []),
        "mode": context.mode,
    }
    return facts, context.selected.to_dict() if context.has_table else None


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
        return {str(k): _HIDDEN if _SECRET.search(str(k)) else plain(v, depth - 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set) and depth:
        return [plain(each, depth - 1) for each in value]
    return str(value)[:_LONGEST]


def _hparams(owner: Any) -> dict[str, Any]:
    found = getattr(owner, "hparams_initial", None) or getattr(owner, "hparams", None)
    return dict(plain(dict(found))) if isinstance(found, Mapping) else {}


def _data(datamodule: Any) -> dict[str, Any]:
    return {} if datamodule is None else {"class": type(datamodule).__qualname__, **_hparams(datamodule)}


def _settings(callback: Any) -> Any:
    """Constructor arguments that the callback keeps under their own names, where they are plain values."""
    try:
        names = list(inspect.signature(type(callback).__init__).parameters)[1:]
    except (TypeError, ValueError):
        return {}
    loss = getattr(callback, "loss_fn", None)  # MaskLossCallback keeps form, weight and scale there
    found = {name: getattr(callback, name, getattr(loss, name, None)) for name in names}
    return {n: plain(v) for n, v in found.items() if isinstance(v, bool | int | float | str | list | tuple)}


def _without_secrets(words: Sequence[str]) -> list[str]:
    """`--x.api_key=abc` and `--x.api_key abc` without what follows."""
    shown: list[str] = []
    hide = False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = name.startswith("-") and bool(_SECRET.search(name))
        shown.append(
            _HIDDEN if hide and not word.startswith("-") else f"{name}={_HIDDEN}" if secret and equals else word
        )
        hide = secret and not equals
    return shown


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
