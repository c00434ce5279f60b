"""One place that knows that Lightning exists under two names.

`pytorch_lightning` and `lightning.pytorch` are two copies of one source with different classes. A callback or data
module that derives from both works under both Trainers and in both command lines; `lightning` is optional.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytorch_lightning as pl

if TYPE_CHECKING:
    Callback = pl.Callback
    LightningDataModule = pl.LightningDataModule
else:
    try:
        import lightning.pytorch as lp
    except ImportError:
        Callback = pl.Callback
        LightningDataModule = pl.LightningDataModule
    else:

        class Callback(pl.Callback, lp.Callback):
            """A callback that both Trainers accept."""

        class LightningDataModule(pl.LightningDataModule, lp.LightningDataModule):
            """A data module that both Trainers accept."""


__all__ = ["Callback", "LightningDataModule"]
