"""Lets torchvision be imported beside a CPU build of torch. Not a benchmark; tests/parity uses it too."""

from __future__ import annotations

import importlib
import sys

import torch

_declared: list[torch.library.Library] = []
"""What is declared lasts as long as this."""


def load_torchvision() -> None:
    """Import it.

    grad-cam, medcam and zennit import torchvision for names that nothing here uses. Its wheel on PyPI is built for
    CUDA: beside a CPU torch its compiled operators do not load, and the import stops at two names that nobody declared.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")
