"""The pictures are drawn in test_recipe_relevance_cam.py, from the study's networks; here only where they cut."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))


def test_slice_goes_through_the_finding():
    import relevance_pictures

    lesions = torch.zeros(2, 9, 8, 7, dtype=torch.bool)
    lesions[1, 1:3, 2, 4] = lesions[1, 6:9, 5, 4] = True  # two parts: the middle between them is in neither
    case = {"image": torch.rand(1, 9, 8, 7), "lesions": lesions, "affine": torch.eye(4)}
    made = relevance_pictures.row(case, 1, [], "x")
    assert lesions[1][tuple(made.point)]
    assert relevance_pictures.row(case, 0, [], "x").point is None
