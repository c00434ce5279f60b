"""Pruning by relevance runs in its small form; its curves are those of masked networks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))


def test_channels_that_matter_are_ranked_first_and_missed_most():
    """Channel 3 of four decides alone; the others feed weights of zero."""
    import _pruning
    import prune_by_relevance

    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("layer", nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU()))
    net.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten()))
    net.add_module("head", nn.Linear(4, 2))
    image = torch.rand(12, 1, 5, 4, 6) + torch.arange(12.0).view(-1, 1, 1, 1, 1)
    with torch.no_grad():
        net.layer[0].weight.abs_()
        net.head.weight.zero_()
        net.head.weight[0, 3], net.head.weight[1, 3] = 1.0, -1.0
    label = torch.stack([(torch.arange(12) > 5).float(), (torch.arange(12) < 6).float()], dim=1)
    ranked = _pruning.importance(net.eval(), image, "layer")
    assert set(ranked) == set(prune_by_relevance.CRITERIA) - {"random"}
    assert ranked["relevance"].argmax() == ranked["Grad-CAM"].argmax() == 3
    torch.testing.assert_close(ranked["filter L1"], net.layer[0].weight.flatten(1).sum(dim=1).detach())
    with torch.no_grad():
        expected = net.layer(image).mean(dim=(0, 2, 3, 4))
    torch.testing.assert_close(ranked["activation"], expected)
    # Of 4 channels 0, 1, 2, 3 and 4 go, at shares of 0.1 to 0.9: channel 3 last, or first.
    assert _pruning.curve(net, image, label, "layer", ranked["relevance"]) == [1.0, 1.0, 1.0, 1.0, 0.5]
    wrong = _pruning.curve(net, image, label, "layer", -ranked["relevance"])
    assert wrong == [1.0, 0.5, 0.5, 0.5, 0.5]
    assert not net.layer._forward_hooks


@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_curve_is_that_of_the_network_with_a_mask_behind_the_layer(name):
    import _depth
    import _pruning

    torch.manual_seed(0)
    net, image = _depth.network(name, 4, (16, 12, 16)).eval(), torch.rand(10, 1, 16, 12, 16)
    label = (torch.rand(10, 4) < 0.5).float()
    for layer in _depth.LAYERS[name]:
        values = torch.rand(len(_pruning.output_of(net, image[:1], layer)[0]))
        got, expected = _pruning.curve(net, image, label, layer, values), []
        for share in _pruning.SHARES:
            keep = torch.ones(len(values))
            for place in sorted(range(len(values)), key=lambda k: values[k])[: round(share * len(values))]:
                keep[place] = 0
            hook = net.get_submodule(layer).register_forward_hook(
                lambda _m, _i, out, keep=keep: out * keep.view(1, -1, 1, 1, 1)
            )
            with torch.no_grad():
                expected.append(np.mean(_depth.auroc(net(image), label)))
            hook.remove()
        assert got == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_small_form(tmp_path, monkeypatch, capsys):
    import prune_by_relevance

    data = ["--cases", "24", "--test-cases", "8", "--size", "24", "20", "24", "--seeds", "1", "--ranked-on", "8"]
    words = [*data, "--epochs", "1", "--nets", "vgg", "--draws", "2", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["prune_by_relevance.py", *words])
    prune_by_relevance.main()
    assert (tmp_path / "out" / "table.md").read_text().strip() in capsys.readouterr().out
    (line,) = (tmp_path / "out" / "runs.jsonl").read_text().splitlines()
    curves = json.loads(line)["result"]["curves"]
    assert set(curves) == {"stage1", "stage2", "stage3"}
    assert all(np.shape(of[name]) == (5,) for of in curves.values() for name in of)
    assert Image.open(tmp_path / "out" / "prune_by_relevance.png").width == 900
