"""Offline work on a trained model: what its logits are made of, in the words of anatomy."""

from __future__ import annotations

from camtrain.evaluation.channel_names import ChannelNames
from camtrain.evaluation.concepts import BANDS, Band, Concepts
from camtrain.evaluation.describing import describe
from camtrain.evaluation.description import ChannelPart, Description
from camtrain.evaluation.organ_account import OrganAccount, organ_account

__all__ = [
    "BANDS",
    "Band",
    "ChannelNames",
    "ChannelPart",
    "Concepts",
    "Description",
    "OrganAccount",
    "describe",
    "organ_account",
]
