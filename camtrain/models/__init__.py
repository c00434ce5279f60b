"""Networks and the classifier around them: AxialNet and its baseline, small nets, `LitClassifier`.

Names load on first use, so that reading this package's list costs neither torch nor Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "AxialNet": "camtrain.models.axial_net",
    "BodyCAM": "camtrain.models.body_cam",
    "FlattenNet": "camtrain.models.flatten_net",
    "PoolNet": "camtrain.models.pool_net",
    "VGGNet": "camtrain.models.vgg_net",
    "SubtomogramCNN": "camtrain.models.subtomogram_cnn",
    "LitClassifier": "camtrain.models.lit_classifier",
}

__all__ = ["AxialNet", "BodyCAM", "FlattenNet", "LitClassifier", "PoolNet", "SubtomogramCNN", "VGGNet"]

if TYPE_CHECKING:
    from camtrain.models.axial_net import AxialNet
    from camtrain.models.body_cam import BodyCAM
    from camtrain.models.flatten_net import FlattenNet
    from camtrain.models.lit_classifier import LitClassifier
    from camtrain.models.pool_net import PoolNet
    from camtrain.models.subtomogram_cnn import SubtomogramCNN
    from camtrain.models.vgg_net import VGGNet


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'camtrain.models' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
