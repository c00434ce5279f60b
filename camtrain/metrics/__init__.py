"""Scores of maps against organs, as torchmetrics classes with a functional twin in the same file.

| class | function | what it says |
|---|---|---|
| `OrganIoU` | `organ_iou` | share of the attended cells inside, thresholds per label (the paper's score) |
| `EnergyInside` | `energy_inside` | share of the positive evidence inside |
| `PointingGame` | `pointing_game` | is the strongest cell inside? |
| `MaskIoU` | `mask_iou` | overlap of attended cells and organ, both ways |
| `EmptyMapRate` | `empty_map_rate` | maps without positive evidence |
| `LabelAUROC` | `label_auroc` | how well the logits rank cases |
| `ChannelConcepts` | `channel_concepts` | which organ or HU band each channel responds to |
"""

from __future__ import annotations

from camtrain.metrics.channel_concepts import ChannelConcepts, ConceptTable, channel_concepts
from camtrain.metrics.empty_map_rate import EmptyMapRate, empty_map_rate
from camtrain.metrics.energy_inside import EnergyInside, energy_inside
from camtrain.metrics.label_auroc import LabelAUROC, label_auroc
from camtrain.metrics.mask_iou import MaskIoU, mask_iou
from camtrain.metrics.organ_iou import DEFAULT_THRESHOLD, THRESHOLDS, OrganIoU, organ_iou
from camtrain.metrics.pointing_game import PointingGame, pointing_game

__all__ = [
    "DEFAULT_THRESHOLD",
    "THRESHOLDS",
    "ChannelConcepts",
    "ConceptTable",
    "EmptyMapRate",
    "EnergyInside",
    "LabelAUROC",
    "MaskIoU",
    "OrganIoU",
    "PointingGame",
    "channel_concepts",
    "empty_map_rate",
    "energy_inside",
    "label_auroc",
    "mask_iou",
    "organ_iou",
    "pointing_game",
]
