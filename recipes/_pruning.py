"""What `prune_by_relevance.py` does to one layer: rank its channels, and see what a network does without some.

Not a recipe.
"""

from __future__ import annotations

import copy
import itertools

import numpy as np
import torch
from _depth import auroc
from torch import Tensor, nn

import camtrain as ct

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)


class Given(nn.Module):
    """Stands where a layer stood, and gives what it is told to."""

    output: Tensor

    def forward(self, _input: Tensor) -> Tensor:
        """Whatever came in."""
        return self.output


def importance(net: nn.Module, image: Tensor, layer: str) -> dict[str, Tensor]:
    """Criterion -> how important each channel (K,) of a layer is."""
    found = {
        title: torch.cat([ct.channel_weights(net, p, name, layer) for p in image.split(16)]).abs().mean(dim=(0, 1))
        for title, name in {"relevance": "relevancecam", "Grad-CAM": "gradcam"}.items()
    }
    found["activation"] = output_of(net, image, layer).abs().flatten(2).mean(dim=(0, 2))
    # The last convolution with a real kernel; a shortcut's convolution has a kernel of 1.
    inner = net.get_submodule(layer).modules()
    convolution = [m for m in inner if isinstance(m, nn.Conv3d) and max(m.kernel_size) > 1][-1]
    found["filter L1"] = convolution.weight.detach().abs().flatten(1).sum(dim=1)
    return found


def output_of(net: nn.Module, image: Tensor, layer: str) -> Tensor:
    """(B, K, *S') of a layer."""
    seen: list[Tensor] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    with torch.no_grad():
        for part in image.split(16):
            net(part)
    handle.remove()
    return torch.cat(seen)


def curve(net: nn.Module, image: Tensor, label: Tensor, layer: str, values: Tensor) -> list[float]:
    """Mean AUROC without the least important channels, one value per share; a chain of children is expected."""
    output, rest, given, areas = output_of(net, image, layer), copy.deepcopy(net), Given(), []
    # What lies before the layer need not be computed again for every mask.
    for name in itertools.takewhile(lambda name: name != layer, dict(net.named_children())):
        setattr(rest, name, nn.Identity())
    setattr(rest, layer, given)
    for share in SHARES:
        keep = torch.ones(len(values))
        keep[values.argsort()[: round(share * len(values))]] = 0
        given.output = output * keep.view(1, -1, *[1] * (output.ndim - 2))
        with torch.no_grad():
            areas.append(float(np.mean(auroc(rest(image), label))))
    return areas
