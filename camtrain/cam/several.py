"""Several layers of one forward: as the user lists them, and a map of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.cam.affine_head import is_source
from camtrain.cam.engine import Reshape, attention_maps_by
from camtrain.cam.layer_lookup import INPUT, LayerSpec, find_layer, plain_name
from camtrain.cam.selection import Labels

# What `layer=` takes for several layers; list[Any], because list[str] is no list[str | None].
Layers = list[Any] | tuple[LayerSpec, ...]


def listed(layer: LayerSpec | Layers) -> list[LayerSpec]:
    """One layer or several, as a list.

    Raises:
        InputError: An empty list.

    Example:
        >>> listed("layer4"), listed(["layer3", "layer4"]), listed(None)
        (['layer4'], ['layer3', 'layer4'], [None])
    """
    wanted: list[LayerSpec] = list(layer) if isinstance(layer, list | tuple) else [layer]
    if not wanted:
        raise InputError("layer= is an empty list: name at least one layer")
    return wanted


def one_layer(layer: LayerSpec) -> LayerSpec:
    """The layer, where only one can be taken.

    Raises:
        InputError: A list of them.

    Example:
        >>> one_layer("layer4")
        'layer4'
    """
    if isinstance(layer, list | tuple):
        raise InputError(f"layer= expects one layer, got a list of {len(layer)}: call it once for each layer")
    return layer


def key_of(layer: LayerSpec, name: str) -> str:
    """Under which name the maps of a layer are handed out: as the user wrote it, else its dotted name.

    Example:
        >>> key_of("layer4", "net._orig_mod.layer4"), key_of(None, "net._orig_mod.layer4")
        ('layer4', 'net.layer4')
    """
    return plain_name(layer if isinstance(layer, str) else name)


def find_layers(model: nn.Module, wanted: Iterable[LayerSpec]) -> list[tuple[str, nn.Module]]:
    """Those layers of a list that can be named now: neither the input nor None.

    Raises:
        InputError: No such layer, or one named twice.

    Example:
        >>> model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU())
        >>> find_layers(model, ["input", "1", None])
        [('1', ReLU())]
    """
    found = [find_layer(model, one) for one in wanted if one is not None and one != INPUT]
    refuse_repeats(found)
    return found


def refuse_repeats(found: Iterable[tuple[str, nn.Module]]) -> None:
    """A layer that counts twice has twice the weight in a mean, silently.

    Raises:
        InputError: A module is there twice.
    """
    seen: set[int] = set()
    for name, module in found:
        if id(module) in seen:
            raise InputError(f"layer= lists {plain_name(name)!r} twice: name every layer once")
        seen.add(id(module))


def maps_of_layers(
    sources: Mapping[str, Tensor],
    logits: Tensor,
    method: str = "hirescam",
    labels: Labels = None,
    create_graph: bool = True,
    reshape: Reshape | None = None,
) -> dict[str, Tensor]:
    """Maps of every layer; arguments as in `camtrain.cam.engine.attention_maps`.

    Args:
        sources: Name -> what the layer returned. `reshape` is applied to all but the input.
        logits: (B, L), with a graph down to each of them.
        method: A name of `ct.methods()`.
        labels: See `camtrain.cam.selection.select`.
        create_graph: Keep the graph.
        reshape: Makes (B, K, *S') of a layer's output.

    Returns:
        Name -> (B, n, *S'), each on the grid of its layer.

    Raises:
        InputError: As `attention_maps`; of several layers it says which one.
    """
    found = maps_of_layers_by(sources, logits, [method], labels, create_graph, reshape)
    return {key: maps for key, each in found.items() for maps in each.values()}


def maps_of_layers_by(
    sources: Mapping[str, Tensor],
    logits: Tensor,
    methods: Sequence[str],
    labels: Labels = None,
    create_graph: bool = True,
    reshape: Reshape | None = None,
    samples: slice | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Maps of every layer by several methods, which share their backward passes; otherwise as `maps_of_layers`.

    `samples` as in `camtrain.cam.engine.attention_maps_by`.

    Returns:
        Layer -> method -> maps.
    """
    each = {}
    for key, source in sources.items():
        shape = None if key == INPUT else reshape
        try:
            each[key] = attention_maps_by(source, logits, methods, labels, create_graph, shape, samples)
        except InputError as error:
            if len(sources) == 1:
                raise
            raise InputError(f"layer {key!r}: {error}") from error
    return each


def unreached(sources: Mapping[str, Tensor], results: Sequence[Tensor]) -> list[str]:
    """Layers that no result depends on: they lie in another branch, or behind detach or torch.no_grad.

    Args:
        sources: Name -> what the layer returned.
        results: Logits or other outputs; the graph is walked from them down until every layer is met.

    Example:
        >>> import torch
        >>> used, aside = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> unreached({"used": used, "aside": aside}, [used.sum()])
        ['aside']
    """
    missing = dict(sources)
    stack: list[Any] = [result.grad_fn for result in results]
    seen = set(stack)
    while stack and missing:
        node = stack.pop()
        for key in [key for key, source in missing.items() if is_source(node, source)]:
            del missing[key]
        for operand, _ in () if node is None else node.next_functions:
            if operand is not None and operand not in seen:
                seen.add(operand)
                stack.append(operand)
    return list(missing)
