"""Where batches come from: phantom, simulated subtomograms, files named in a CSV, CT-RATE, RAD-ChestCT, PASCAL VOC.

Public names load on first use, so that one data module does not pay for the imports of another.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "CTRateDataModule": "camtrain.data.ct_rate_module",
    "CryoETDataModule": "camtrain.data.cryoet_module",
    "PhantomDataModule": "camtrain.data.phantom_module",
    "ExactLoader": "camtrain.data.exact_loader",
    "ManifestDataModule": "camtrain.data.manifest_module",
    "PascalVOCDataModule": "camtrain.data.voc_module",
    "RadChestCTDataModule": "camtrain.data.rad_chestct_module",
    "OrganShareSampler": "camtrain.data.organ_share",
    "make_ct_rate_tree": "camtrain.data.ct_rate_tree",
    "make_rad_chestct_tree": "camtrain.data.rad_chestct_tree",
    "make_voc_tree": "camtrain.data.voc_tree",
    "organ_report": "camtrain.data.organ_reporting",
}

__all__ = [
    "CTRateDataModule",
    "CryoETDataModule",
    "ExactLoader",
    "ManifestDataModule",
    "OrganShareSampler",
    "PascalVOCDataModule",
    "PhantomDataModule",
    "RadChestCTDataModule",
    "make_ct_rate_tree",
    "make_rad_chestct_tree",
    "make_voc_tree",
    "organ_report",
]

if TYPE_CHECKING:
    from camtrain.data.cryoet_module import CryoETDataModule
    from camtrain.data.ct_rate_module import CTRateDataModule
    from camtrain.data.ct_rate_tree import make_ct_rate_tree
    from camtrain.data.exact_loader import ExactLoader
    from camtrain.data.manifest_module import ManifestDataModule
    from camtrain.data.organ_reporting import organ_report
    from camtrain.data.organ_share import OrganShareSampler
    from camtrain.data.phantom_module import PhantomDataModule
    from camtrain.data.rad_chestct_module import RadChestCTDataModule
    from camtrain.data.rad_chestct_tree import make_rad_chestct_tree
    from camtrain.data.voc_module import PascalVOCDataModule
    from camtrain.data.voc_tree import make_voc_tree


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'camtrain.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
