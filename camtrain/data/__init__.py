"""Where batches come from: the chest phantom, simulated subtomograms, and real files named in a CSV.

Public names load on first use, so that one data module does not pay for the imports of another.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "CryoETDataModule": "camtrain.data.cryoet_module",
    "PhantomDataModule": "camtrain.data.phantom_module",
    "ManifestDataModule": "camtrain.data.manifest_module",
}

__all__ = ["CryoETDataModule", "ManifestDataModule", "PhantomDataModule"]

if TYPE_CHECKING:
    from camtrain.data.cryoet_module import CryoETDataModule
    from camtrain.data.manifest_module import ManifestDataModule
    from camtrain.data.phantom_module import PhantomDataModule


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'camtrain.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
