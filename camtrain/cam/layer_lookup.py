"""Find a layer by name, or the one that a map is usually wanted of."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from camtrain._errors import InputError, nearest
from camtrain.cam.capture import eager, note_runs, own_forward

LayerSpec = str | nn.Module | None
# Modes and hooks belong to the model and not to a thread: two threads that ask one model would see each other's.
_ONE_AT_A_TIME = threading.RLock()
# What `layer=` takes for the image itself.
INPUT = "input"
# torch.compile and DistributedDataParallel put these in front of or between the names that users know.
_WRAPPERS = ("_orig_mod", "module", "_forward_module")


def plain_name(name: str) -> str:
    """The dotted name without what torch.compile inserts.

    Example:
        >>> plain_name("net._orig_mod.layer4")
        'net.layer4'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def find_layer(model: nn.Module, layer: str | nn.Module) -> tuple[str, nn.Module]:
    """Resolve a layer of a model.

    Args:
        model: The model, or a LightningModule that holds it.
        layer: The module itself, its dotted name, or the unique end of its dotted name (`"layer4"` finds
            `"net.layer4"`).

    Returns:
        Its dotted name as `model.named_modules()` has it, and the module.

    Raises:
        InputError: No such layer, or several; the message names the nearest. Neither a name nor a module.

    Example:
        >>> model = nn.ModuleDict({"net": nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU())})
        >>> find_layer(model, "net.1")
        ('net.1', ReLU())
    """
    if not isinstance(layer, str | nn.Module):
        raise InputError(f"layer= expects a dotted name or a module of the model, got {type(layer).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(layer, nn.Module):
        for name, module in modules.items():
            if module is layer:
                return name, module
        raise InputError(f"layer= is a {type(layer).__name__} that is no part of this {type(model).__name__}")
    if layer in modules and layer:
        return layer, modules[layer]
    wanted = plain_name(layer)
    ends = {id(m): n for n, m in modules.items() if plain_name(n) == wanted or plain_name(n).endswith("." + wanted)}
    exact = [n for n in ends.values() if _without_wrappers(n) == wanted]
    found = exact if len(exact) == 1 else list(ends.values())
    if len(found) == 1:
        return found[0], modules[found[0]]
    if found:
        raise InputError(f"layer {layer!r} is ambiguous in {type(model).__name__}: write one of {', '.join(found[:6])}")
    known = [plain_name(n) for n in modules if n]
    raise InputError(
        f"{type(model).__name__} has no layer {layer!r}{nearest(layer, known)}; "
        "camtrain layers (or ct.layers) lists all"
    )


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def around(name: str) -> list[str]:
    """Names of the modules around a layer, from the smallest to the model itself.

    Example:
        >>> around("net.layer4.1")
        ['net.layer4', 'net', '']
    """
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)]


@contextmanager
def untouched(model: nn.Module, devices: set[torch.device] | None = None) -> Iterator[None]:
    """Run a model in eval mode and leave modes, RNG and grad mode as they were.

    Flags are set one by one: a user's overridden `train()` (a frozen BatchNorm) is neither called nor undone. Threads
    wait for each other.
    """
    cuda = [d for d in (devices or set()) if d.type == "cuda"]
    with _ONE_AT_A_TIME:
        yield from _untouched(model, cuda)


def _untouched(model: nn.Module, cuda: list[torch.device]) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=cuda), torch.inference_mode(False), own_forward():
        try:
            # Setting a flag goes through `nn.Module.__setattr__`: as many as a deep network has take milliseconds.
            for module, mode in modes:
                if mode:
                    module.training = False
            yield
        finally:
            for module, mode in modes:
                if module.training != mode:
                    module.training = mode


def is_map(output: object, image: Tensor) -> bool:
    """Is this a feature map: the image's rank, and more than one position?"""
    return (
        isinstance(output, Tensor)
        and output.is_floating_point()
        and output.ndim == image.ndim
        and output.shape[2:].numel() > 1
    )


def default_layer(
    model: nn.Module, image: Tensor, run: Callable[[Tensor], object] | None = None
) -> tuple[str, nn.Module]:
    """The layer that `layer=None` takes.

    The last module, in the order in which they finish, whose output has the image's rank and more than one position:
    in a CNN the last feature map, after its activation where that is a module of its own.

    Args:
        model: The model.
        image: (B, C, *S); the first sample is run once, without gradients.
        run: How to call the model; default `model(image)`.

    Raises:
        InputError: No module gives such an output.
    """
    last: list[str] = []
    ran: Counter[nn.Module] = Counter()

    def record(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def hook(module: nn.Module, _: tuple[object, ...], output: object) -> None:
            ran[module] += 1
            if is_map(output, image):
                last.append(name)

        return hook

    # A padding layer gives features on a grid of its own, wider than the image's.
    named = [(n, m) for n, m in model.named_modules() if n and type(m).__module__ != "torch.nn.modules.padding"]
    handles = [m.register_forward_hook(eager(record(n))) for n, m in named]
    try:
        with untouched(model, {image.device}), torch.no_grad():
            (run or model)(image[:1].clone())
    finally:
        for handle in handles:
            handle.remove()
    if not last:
        raise InputError(
            f"no layer of {type(model).__name__} gives a tensor of rank {image.ndim} with more than one position: "
            "name the layer with layer=, and pass reshape= if it works on tokens"
        )
    module = dict(named)[last[-1]]
    note_runs(module, ran[module])
    return last[-1], module
