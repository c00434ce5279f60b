"""The figure of a study."""

from __future__ import annotations

import numpy as np
import pytest

import camtrain as ct
from camtrain.reporting import plot_seeds

PANELS = {
    "OrganIoU": {
        "flatten": {"plain": [0.4, 0.5], "mask loss": [0.9, 0.8]},
        "pool": {"plain": [0.3, float("nan")], "mask loss": []},
    },
    "AUROC": {"flatten": {"plain": [0.9, 0.95]}},
}


def test_size_and_content():
    drawn = plot_seeds(PANELS, {"OrganIoU": 0.1}, title="Study", width=700, height=210)
    assert drawn.shape == (420, 700, 3)
    assert drawn.dtype == np.uint8
    higher = {**PANELS, "AUROC": {"flatten": {"plain": [0.2, 0.3]}}}
    assert (drawn != plot_seeds(higher, {"OrganIoU": 0.1}, title="Study", width=700, height=210)).any()
    # One dot less: seeds are shown, not only their mean.
    fewer = {"AUROC": {"flatten": {"plain": [0.9, 0.9]}}}
    assert (plot_seeds(fewer) != plot_seeds({"AUROC": {"flatten": {"plain": [0.85, 0.95]}}})).any()


def test_chance_and_limits_are_drawn():
    panels = {"AUROC": {"flatten": {"plain": [0.9]}}}
    plain = plot_seeds(panels)
    assert (plain != plot_seeds(panels, {"AUROC": 0.5})).any()
    assert (plain != plot_seeds(panels, limits={"AUROC": (0.5, 1.0)})).any()


def test_nothing_to_draw():
    for panels in ({}, {"AUROC": {}}):
        with pytest.raises(ct.InputError, match="at least one panel"):
            plot_seeds(panels)
