"""Scores of maps against organs, as torchmetrics classes with a functional twin in the same file.

| class | function | what it says |
|---|---|---|
| `OrganIoU` | `organ_iou` | share of the attended cells inside, thresholds per label (the paper's score) |
| `EnergyInside` | `energy_inside` | share of the positive evidence inside |
| `PointingGame` | `pointing_game` | is the strongest cell inside? |
| `PointingRecall` | `pointing_recall` | the same, where a map may also reject an absent label |
| `MaskIoU` | `mask_iou` | overlap of attended cells and organ, both ways |
| `RelevanceRank` | `relevance_rank` | of as many strongest cells as the region has, the share inside |
| `EmptyMapRate` | `empty_map_rate` | maps without positive evidence |
| `SamePlace` | `same_place` | maps that all peak at one place outside their regions |
| `OcclusionCorrelation` | `occlusion_correlation` | does a map rank places as hiding them does? |
| `ClassSensitivity` | `class_sensitivity` | correlation between the maps of one case's labels |
| `SumToScore` | `sum_to_score` | does the sum of a map give its logit? |
| `WrongPlace` | `wrong_place` | share of a map on cells that did not raise the logit |
| `ChannelSparseness` | `channel_sparseness` | few channels or all of them behind a label |
| `AverageDrop` | `average_drop` | probability lost when only what the map shows is left |
| `AverageIncrease` | `average_increase` | is the network surer of that? |
| `InsertionAUC` | `insertion_auc` | probability while voxels are revealed, the highest first |
| `DeletionAUC` | `deletion_auc` | probability while voxels are replaced, the highest first |
| `ShortcutReliance` | `shortcut_reliance` | does the network use what lies outside the label's organs? |
| `LabelAUROC` | `label_auroc` | how well the logits rank cases |
| - | `region_preference` | of two findings in one volume, does a label's map point at its own? |
| `ChannelConcepts` | `channel_concepts` | which organ or HU band each channel responds to |
"""

from __future__ import annotations

from camtrain.metrics.average_drop import AverageDrop, average_drop
from camtrain.metrics.average_increase import AverageIncrease, average_increase
from camtrain.metrics.channel_concepts import ChannelConcepts, ConceptTable, channel_concepts
from camtrain.metrics.channel_sparseness import ChannelSparseness, channel_sparseness
from camtrain.metrics.class_sensitivity import ClassSensitivity, class_sensitivity
from camtrain.metrics.deletion_auc import DeletionAUC, deletion_auc
from camtrain.metrics.empty_map_rate import EmptyMapRate, empty_map_rate
from camtrain.metrics.energy_inside import EnergyInside, energy_inside
from camtrain.metrics.insertion_auc import InsertionAUC, insertion_auc
from camtrain.metrics.label_auroc import LabelAUROC, label_auroc
from camtrain.metrics.mask_iou import MaskIoU, mask_iou
from camtrain.metrics.occlusion_correlation import OcclusionCorrelation, occlusion_correlation
from camtrain.metrics.organ_iou import DEFAULT_THRESHOLD, THRESHOLDS, OrganIoU, organ_iou, organ_iou_curve
from camtrain.metrics.pointing_game import PointingGame, pointing_game
from camtrain.metrics.pointing_recall import PointingRecall, pointing_recall, rejection_thresholds
from camtrain.metrics.region_preference import region_preference
from camtrain.metrics.relevance_rank import RelevanceRank, relevance_rank
from camtrain.metrics.same_place import SamePlace, same_place
from camtrain.metrics.shortcut_reliance import Reliance, ShortcutReliance, shortcut_reliance
from camtrain.metrics.sum_to_score import SumAgreement, SumToScore, sum_to_score
from camtrain.metrics.wrong_place import WrongPlace, wrong_place

__all__ = [
    "DEFAULT_THRESHOLD",
    "THRESHOLDS",
    "AverageDrop",
    "AverageIncrease",
    "ChannelConcepts",
    "ChannelSparseness",
    "ClassSensitivity",
    "ConceptTable",
    "DeletionAUC",
    "EmptyMapRate",
    "EnergyInside",
    "InsertionAUC",
    "LabelAUROC",
    "MaskIoU",
    "OcclusionCorrelation",
    "OrganIoU",
    "PointingGame",
    "PointingRecall",
    "RelevanceRank",
    "Reliance",
    "SamePlace",
    "ShortcutReliance",
    "SumAgreement",
    "SumToScore",
    "WrongPlace",
    "average_drop",
    "average_increase",
    "channel_concepts",
    "channel_sparseness",
    "class_sensitivity",
    "deletion_auc",
    "empty_map_rate",
    "energy_inside",
    "insertion_auc",
    "label_auroc",
    "mask_iou",
    "occlusion_correlation",
    "organ_iou",
    "organ_iou_curve",
    "pointing_game",
    "pointing_recall",
    "region_preference",
    "rejection_thresholds",
    "relevance_rank",
    "same_place",
    "shortcut_reliance",
    "sum_to_score",
    "wrong_place",
]
