"""The organ mask loss: evidence for a finding should lie in the organs where the finding can be."""

from camtrain.losses.forms import FORMS, Cells, Form
from camtrain.losses.organ_mask import MaskLossParts, OrganMaskLoss, organ_mask_loss
from camtrain.losses.schedule import Ramp

__all__ = ["FORMS", "Cells", "Form", "MaskLossParts", "OrganMaskLoss", "Ramp", "organ_mask_loss"]
