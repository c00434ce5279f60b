"""What is said once of cells that have seen most of the scan."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.utilities import rank_zero_info
from torch import nn

from camtrain.callbacks._context import tell_once
from camtrain.cam.call import Call
from camtrain.cam.layer_lookup import find_layer, plain_name
from camtrain.cam.layer_table import SEEN_SHARE_LIMIT, seen_share


def tell_seen_share(trainer: Any, name: str, entry: nn.Module | None, inputs: Any) -> None:
    """Say once that cells which have seen most of the scan cannot show where the evidence lay.

    Args:
        trainer: The Trainer.
        name: Dotted name of the layer.
        entry: The module that the step called.
        inputs: What it was called with.
    """
    layer = plain_name(name)
    call = None if entry is None or inputs is None else Call.of(entry, *inputs)
    if call is None:
        rank_zero_info(
            f"camtrain: how much of the image a cell of {layer!r} has seen is shown by ct.layers(model, image)"
        )
        return
    one = call.rows([0])
    share = seen_share(one.entry, one.image, find_layer(trainer.lightning_module, name)[1], one)
    if share > SEEN_SHARE_LIMIT:
        tell_once(
            trainer,
            f"camtrain: a central cell of {layer!r} depends on {share:.0%} of the image, so its maps locate cells, not "
            "evidence: the mask loss governs where cells look, not what the network uses. For that, replace what lies "
            "outside the organs while training (OutsideSwap), or tap a layer that has seen less.",
        )
