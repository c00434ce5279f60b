"""Maps of all labels of a batch as users of other libraries get them. Not a benchmark.

Each maker returns a function without arguments, or None where its library is not installed. All maps are Grad-CAM's,
which every library has; ours are HiResCAM's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from _torchvision import load_torchvision
from torch import Tensor, nn

import camtrain as ct

Piece = Callable[[], object]


def ours(model: nn.Module, image: Tensor, layer: str, labels: int) -> Piece:
    """One call, one forward, all labels; of a module that runs several times (EfficientNet) the last run."""
    return lambda: ct.explain(model, image, layer=layer, call=-1)


def loop(model: nn.Module, image: Tensor, layer: str, labels: int) -> Piece:
    """Plain PyTorch: one forward, then one `autograd.grad` per label."""

    def piece() -> list[Tensor]:
        kept: list[Tensor] = []
        handle = model.get_submodule(layer).register_forward_hook(lambda m, a, out: kept.append(out))
        logits = model(image)
        handle.remove()
        maps = []
        for label in range(labels):
            (gradient,) = torch.autograd.grad(logits[:, label].sum(), kept[0], retain_graph=True)
            maps.append((gradient * kept[0]).sum(dim=1).detach())
        return maps

    return piece


def torchcam(model: nn.Module, image: Tensor, layer: str, labels: int) -> Piece | None:
    """One forward, one call per label."""
    if not importlib.util.find_spec("torchcam"):
        return None
    from torchcam.methods import GradCAM

    def piece() -> list[list[Tensor]]:
        with GradCAM(model, target_layer=layer) as cam:
            logits = model(image)
            return [cam(label, logits, retain_graph=True) for label in range(labels)]

    return piece


def captum(model: nn.Module, image: Tensor, layer: str, labels: int) -> Piece | None:
    """A forward and a backward per label."""
    if not importlib.util.find_spec("captum"):
        return None
    from captum.attr import LayerGradCam

    tool = LayerGradCam(model, model.get_submodule(layer))
    return lambda: [tool.attribute(image, target=label) for label in range(labels)]


def monai(model: nn.Module, image: Tensor, layer: str, labels: int) -> Piece | None:
    """A forward and a whole backward per label."""
    from monai.visualize import GradCAM

    tool = GradCAM(nn_module=model, target_layers=layer)
    return lambda: [tool(image, class_idx=label) for label in range(labels)]


def grad_cam(model: nn.Module, image: Tensor, layer: str, labels: int) -> Piece | None:
    """A forward and a whole backward per label (its library needs torchvision)."""
    if not importlib.util.find_spec("pytorch_grad_cam"):
        return None
    load_torchvision()
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    tool = GradCAM(model=model, target_layers=[model.get_submodule(layer)])
    batch = len(image)
    return lambda: [
        tool(input_tensor=image, targets=[ClassifierOutputTarget(label)] * batch) for label in range(labels)
    ]


def medcam(model: nn.Module, image: Tensor, layer: str, labels: int) -> Piece | None:
    """A forward and a whole backward per label, of a copy of the network (it installs beside grad-cam only)."""
    if not importlib.util.find_spec("medcam"):
        return None
    load_torchvision()
    from medcam import medcam as tool

    watched = tool.inject(model, layer=layer, label=0, return_attention=True, save_maps=False, backend="gcam")
    return lambda: [watched(image, label=label) for label in range(labels)]


PEERS = {
    "autograd loop": loop,
    "torchcam": torchcam,
    "captum": captum,
    "MONAI": monai,
    "grad-cam": grad_cam,
    "medcam": medcam,
}
SLOW = ("captum", "MONAI", "grad-cam", "medcam")
"""At least one forward per label."""


def pieces(model: nn.Module, image: Tensor, layer: str, labels: int, peers: list[str]) -> dict[str, Piece]:
    """Plain forward first, then ours, then the peers that are installed."""

    def forward(grad: bool) -> Tensor:
        with torch.set_grad_enabled(grad):
            out: Tensor = model(image)
            return out

    made: dict[str, Piece | None] = {
        "forward": partial(forward, False),
        "camtrain": ours(model, image, layer, labels),
    }
    for name in peers:
        made[name] = PEERS[name](model, image, layer, labels)
    return {name: piece for name, piece in made.items() if piece is not None}
