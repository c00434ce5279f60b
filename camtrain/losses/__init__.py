"""The organ mask loss (evidence for a finding should lie in its organs), and losses of the findings themselves."""

from camtrain.losses.classification import AsymmetricLoss, CrossEntropyLoss, FocalLoss
from camtrain.losses.forms import FORMS, Cells, Form
from camtrain.losses.organ_mask import MaskLossParts, OrganMaskLoss, organ_mask_loss
from camtrain.losses.schedule import Ramp

__all__ = [
    "FORMS",
    "AsymmetricLoss",
    "Cells",
    "CrossEntropyLoss",
    "FocalLoss",
    "Form",
    "MaskLossParts",
    "OrganMaskLoss",
    "Ramp",
    "organ_mask_loss",
]
