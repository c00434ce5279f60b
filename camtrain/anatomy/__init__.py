"""Which organs each label may be read from, and where they lie on the map's grid."""

from __future__ import annotations

from camtrain.anatomy.organ_table import OrganTable
from camtrain.anatomy.rules import Rule, spacing_of

__all__ = ["OrganTable", "Rule", "spacing_of"]
