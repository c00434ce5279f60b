"""What was asked of a monitor, in plain words: for the config of a logger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from camtrain import __version__
from camtrain.callbacks._context import RunContext
from camtrain.callbacks._layers import layer_names
from camtrain.cam.asked import Asked
from camtrain.cam.layer_lookup import LayerSpec
from camtrain.cam.several import Layers


def facts_of(
    context: RunContext, layer: LayerSpec | Layers, asked: Sequence[Asked], name: str | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Plain values: the config, and the organ table of the run's labels or None.

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
