"""camtrain: train 3D CNNs so that they look at the right organ, and see every epoch where they look.

Public names load on first use, so that `import camtrain` costs nothing and the command line can print its help
without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that defines it. The order is the order of `dir(camtrain)` and of the documentation.
_PUBLIC = {
    "explain": "camtrain.cam.explaining",
    "account": "camtrain.cam.account",
    "describe": "camtrain.evaluation.describing",
    "evaluate": "camtrain.evaluation.evaluating",
    "sanity_check": "camtrain.evaluation.sanity",
    "channel_weights": "camtrain.cam.channel_weights",
    "methods": "camtrain.cam.method_table",
    "layers": "camtrain.cam.layer_table",
    "compile_backbone": "camtrain.cam.compiling",
    "LayerTap": "camtrain.cam.tap",
    "OrganTable": "camtrain.anatomy.organ_table",
    "OrganMaskLoss": "camtrain.losses.organ_mask",
    "MaskLossCallback": "camtrain.callbacks.mask_loss",
    "OutsideSwap": "camtrain.callbacks.outside_swap",
    "AttentionMonitor": "camtrain.callbacks.attention_monitor",
    "ExactResume": "camtrain.callbacks.exact_resume",
    "InputError": "camtrain._errors",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from camtrain._errors import InputError as InputError
    from camtrain.anatomy.organ_table import OrganTable as OrganTable
    from camtrain.callbacks.attention_monitor import AttentionMonitor as AttentionMonitor
    from camtrain.callbacks.exact_resume import ExactResume as ExactResume
    from camtrain.callbacks.mask_loss import MaskLossCallback as MaskLossCallback
    from camtrain.callbacks.outside_swap import OutsideSwap as OutsideSwap
    from camtrain.cam.account import account as account
    from camtrain.cam.channel_weights import channel_weights as channel_weights
    from camtrain.cam.compiling import compile_backbone as compile_backbone
    from camtrain.cam.explaining import explain as explain
    from camtrain.cam.layer_table import layers as layers
    from camtrain.cam.method_table import methods as methods
    from camtrain.cam.tap import LayerTap as LayerTap
    from camtrain.evaluation.describing import describe as describe
    from camtrain.evaluation.evaluating import evaluate as evaluate
    from camtrain.evaluation.sanity import sanity_check as sanity_check
    from camtrain.losses.organ_mask import OrganMaskLoss as OrganMaskLoss


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'camtrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
