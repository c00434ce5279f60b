"""What ran: labels, methods, layers, organ table, settings, command: plain values for `run.json` and for loggers."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from camtrain import __version__
from camtrain.callbacks._context import RunContext
from camtrain.callbacks._layers import layer_names
from camtrain.callbacks._settings import HIDDEN, plain, read_config, saved_config, secret, settings_of
from camtrain.cam.asked import Asked
from camtrain.cam.layer_lookup import LayerSpec
from camtrain.cam.several import Layers
from camtrain.reporting.panel_files import LAYOUT

_PACKAGES = ("torch", "pytorch-lightning", "lightning", "monai", "torchmetrics", "numpy")
_TRAINER = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val", "num_devices")


def run_facts(
    trainer: Any,
    pl_module: Any,
    context: RunContext,
    methods: Sequence[str],
    layers: Sequence[str],
    seen: Mapping[str, float],
    root: str | Path = ".",
) -> dict[str, Any]:
    """The content of `run.json`.

    Args:
        trainer: The Trainer.
        pl_module: The user's module.
        context: What the monitor has read of the run.
        methods: Attention methods, the first with the plain keys first.
        layers: Tapped layers.
        seen: Layer -> seen share.
        root: The Trainer's log folder.
    """
    return {
        "layout": LAYOUT,
        "labels": list(context.names or []),
        "methods": list(methods),
        "layers": list(layers),
        "seen": dict(seen),
        "table": context.selected.to_dict() if context.has_table else None,
        **how_it_ran(trainer, pl_module, root),
    }


def how_it_ran(trainer: Any, pl_module: Any, root: str | Path) -> dict[str, Any]:
    """Settings, command and versions; under LightningCLI the whole config too, and where it was saved.

    Args:
        trainer: The Trainer.
        pl_module: The user's module.
        root: The Trainer's log folder.
    """
    path = saved_config(trainer, root)
    return {
        "config": {
            "model": {"class": type(pl_module).__qualname__, **_hparams(pl_module)},
            "data": _data(getattr(trainer, "datamodule", None)),
            "trainer": {name: plain(getattr(trainer, name, None)) for name in _TRAINER},
            "callbacks": settings_of(trainer.callbacks),
        },
        "command": shlex.join(_without_secrets(sys.orig_argv or sys.argv)),
        "versions": {"camtrain": __version__, "python": sys.version.split()[0], **_versions()},
        **({} if path is None else {"saved_config": str(path), "cli_config": read_config(path)}),
    }


def monitor_facts(
    context: RunContext, layer: LayerSpec | Layers, asked: Sequence[Asked], name: str | None, trainer: Any, root: str
) -> tuple[dict[str, Any], dict[str, Any] | None, Callable[[], dict[str, Any]]]:
    """What was asked of a monitor, for the config of a logger: plain values, and the organ table of its labels or None.

    Args:
        context: What the monitor has found out about the run.
        layer: As given.
        asked: The methods.
        name: Name of the monitor.
        trainer: The Trainer.
        root: Its log folder.

    Returns:
        Facts, organ table, and what gives all that is known of the run, for who has room for it.
    """
    facts = {
        "version": __version__,
        "name": name,
        "layers": layer_names(layer),
        "methods": [{"name": each.name, **{k: str(v) for k, v in each.options.items()}} for each in asked],
        "labels": list(context.names or []),
        "mode": context.mode,
    }
    run = partial(how_it_ran, trainer, trainer.lightning_module, root)
    return facts, context.selected.to_dict() if context.has_table else None, run


def _hparams(owner: Any) -> dict[str, Any]:
    found = getattr(owner, "hparams_initial", None) or getattr(owner, "hparams", None)
    return dict(plain(dict(found))) if isinstance(found, Mapping) else {}


def _data(datamodule: Any) -> dict[str, Any]:
    return {} if datamodule is None else {"class": type(datamodule).__qualname__, **_hparams(datamodule)}


def _without_secrets(words: Sequence[str]) -> list[str]:
    """`--x.api_key=abc` and `--x.api_key abc` without what follows."""
    shown: list[str] = []
    hide = False
    for word in words:
        name, equals, _ = word.partition("=")
        hidden = name.startswith("-") and any(map(secret, name.lstrip("-").split(".")))
        shown.append(HIDDEN if hide and not word.startswith("-") else f"{name}={HIDDEN}" if hidden and equals else word)
        hide = hidden and not equals
    return shown


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
