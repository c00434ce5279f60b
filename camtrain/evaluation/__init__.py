"""Offline work on a trained model: measures with intervals, sanity checks, and what its logits are made of."""

from __future__ import annotations

from camtrain.evaluation.against import Against, set_against
from camtrain.evaluation.auditing import Audit, AuditLimits, LabelAudit, audit
from camtrain.evaluation.cell_effects import cell_effects
from camtrain.evaluation.channel_names import ChannelNames
from camtrain.evaluation.concepts import BANDS, Band, Concepts
from camtrain.evaluation.describing import describe
from camtrain.evaluation.description import ChannelPart, Description
from camtrain.evaluation.evaluating import evaluate
from camtrain.evaluation.evaluation import Evaluation
from camtrain.evaluation.layer_choice import LayerScore, rank_layers
from camtrain.evaluation.localising import Location, erode, localise
from camtrain.evaluation.measures import MEASURES, Measure
from camtrain.evaluation.occlusion import occlusion_map, pool_to_patches
from camtrain.evaluation.organ_account import OrganAccount, organ_account
from camtrain.evaluation.organ_mass import OrganMass, organ_mass
from camtrain.evaluation.sanity import sanity_check
from camtrain.evaluation.sanity_table import SanityTable
from camtrain.evaluation.saving import save_evaluation
from camtrain.evaluation.shuffled import ShuffledLabels, compare_models, shuffle_labels

__all__ = [
    "BANDS",
    "MEASURES",
    "Against",
    "Audit",
    "AuditLimits",
    "Band",
    "ChannelNames",
    "ChannelPart",
    "Concepts",
    "Description",
    "Evaluation",
    "LabelAudit",
    "LayerScore",
    "Location",
    "Measure",
    "OrganAccount",
    "OrganMass",
    "SanityTable",
    "ShuffledLabels",
    "audit",
    "cell_effects",
    "compare_models",
    "describe",
    "erode",
    "evaluate",
    "localise",
    "occlusion_map",
    "organ_account",
    "organ_mass",
    "pool_to_patches",
    "rank_layers",
    "sanity_check",
    "save_evaluation",
    "set_against",
    "shuffle_labels",
]
