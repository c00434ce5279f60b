"""The stand-in for ImageNet weights: organ labels by hand, and a trunk that only its own net takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from camtrain import InputError

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import pretrain_slices

    yield pretrain_slices
    sys.modules.pop("pretrain_slices")


def test_labels_of_pictures(recipe):
    organs = torch.zeros(1, 2, 2, 9, dtype=torch.uint8)
    organs[0, 0, :, 0:3] = 1  # half of the first picture
    organs[0, 0, 0, 3] = 1  # one voxel of twelve of the second
    organs[0, 1, 1, 6:9] = 2
    case = {"image": torch.arange(36.0).reshape(1, 2, 2, 9), "organs": organs}
    pictures = recipe.OrganPictures([case], organs=2)
    assert len(pictures) == 3
    assert torch.equal(pictures[1]["image"], case["image"][..., 3:6])
    # There: organ 1, organ 2; more of it than usual: organ 1, organ 2.
    assert pictures.labels.tolist() == [[1, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0]]
    assert recipe.OrganPictures([case], 2, usual=torch.zeros(2)).labels.tolist()[1] == [1, 0, 1, 0]


@pytest.mark.slow
def test_tiny(recipe, tmp_path, monkeypatch, capsys):
    from camtrain.models import AxialNet, BodyCAM

    arguments = ["pretrain_slices.py", "--cases", "6", "--epochs", "1", "--size", "24", "24", "18"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path)])
    recipe.main()
    assert "mean AUROC over organ labels" in capsys.readouterr().out
    for net in (AxialNet(3, "small", (24, 24), 2), BodyCAM(3, "small", (24, 24), 2)):
        kept = net.trunk.convs[0].weight.clone()
        recipe.load_trunk(net, tmp_path / "trunk.pt")
        assert torch.equal(net.trunk.convs[0].weight, kept)
        state = torch.load(tmp_path / "trunk.pt", weights_only=True)
        assert all(torch.equal(value, state[key]) for key, value in net.trunk.state_dict().items() if key in state)
    torch.save({"other": torch.zeros(1)}, tmp_path / "trunk.pt")
    with pytest.raises(InputError, match="does not fit"):
        recipe.load_trunk(net, tmp_path / "trunk.pt")
