"""`layers`: which layers a map can be taken of, how coarse they are, and how much of the scan their cells have seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.cam.capture import LayerCapture, run_eagerly
from camtrain.cam.layer_lookup import default_layer, find_layer, is_map, plain_name, untouched

# Above this share, attention inside the organ does not show that the evidence lay there.
SEEN_SHARE_LIMIT = 0.5
# So many backward passes to the image take more than a moment.
_QUIET = 4


@dataclass(frozen=True)
class LayerRow:
    """One candidate layer.

    Attributes:
        name: What `layer=` takes.
        kind: Class of the module.
        shape: (K, *S') of its output.
        cell: Image voxels per cell and axis.
        cell_mm: The same in mm, where the affine is known.
        seen: Share of the input that a central cell depends on; None if not asked for, or if the layer sees no image.
        default: Is it the one that `layer=None` takes?
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    cell: tuple[float, ...]
    cell_mm: tuple[float, ...] | None
    seen: float | None
    default: bool


class LayerTable(tuple[LayerRow, ...]):
    """What `ct.layers()` returns: rows that print as a table and can be looped over."""

    __slots__ = ()

    def __str__(self) -> str:
        width = max([len(row.name) for row in self] + [5])
        lines = [f"  {'layer':<{width}}  {'output':<22} {'cell (voxels)':<18} {'cell (mm)':<18} seen share"]
        lines += [_line(row, width) for row in self]
        lines.append("* = taken by layer=None. Seen share: part of the image that a central cell depends on.")
        return "\n".join(lines)

    __repr__ = __str__


def _line(row: LayerRow, width: int) -> str:
    def by(values: Sequence[float] | None) -> str:
        return "-" if values is None else " x ".join(f"{v:.3g}" for v in values)

    shape = " x ".join(map(str, row.shape))
    seen = "-" if row.seen is None else f"{row.seen:.0%}"
    mark = "*" if row.default else " "
    return f"{mark} {row.name:<{width}}  {shape:<22} {by(row.cell):<18} {by(row.cell_mm):<18} {seen}"


def layers(
    model: nn.Module, image: Tensor, *, depth: int | None = 2, affine: Tensor | None = None, seen: bool = True
) -> LayerTable:
    """Candidate layers of a model, in the order in which they finish.

    Args:
        model: The model.
        image: (B, C, *S); the first sample is used.
        depth: List modules at most so deep below the first branching (None = all). Every row costs a backward pass to
            the image for its seen share.
        affine: (4, 4) or (B, 4, 4) voxel to world in mm; a MetaTensor image brings its own.
        seen: Compute the seen share.

    Returns:
        Rows that print as a table; the one that `layer=None` takes is marked.

    Raises:
        InputError: No layer gives a tensor with spatial axes.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 3))
        >>> [(row.name, row.cell, round(row.seen, 2), row.default) for row in layers(model, torch.rand(1, 1, 8, 8))]
        [('0', (1.0, 1.0), 0.14, False), ('1', (1.0, 1.0), 0.14, True)]
    """
    affine = _affine(image, affine)
    plain = image.detach().as_subclass(Tensor)[:1].clone()
    chosen, _ = default_layer(model, plain)
    names = [name for name, _ in listed_layers(model, depth)]
    if chosen not in names:
        names.append(chosen)
    shapes = _output_shapes(model, plain, names)
    rows: Iterable[tuple[str, tuple[int, ...]]] = shapes.items()
    if seen and len(shapes) > _QUIET:
        # On stderr: what is printed of the table may go into a file.
        console = Console(stderr=True)
        rows = track(shapes.items(), "seen share per layer", console=console, transient=True)
    return LayerTable(_row(model, plain, name, shape, affine, seen, name == chosen) for name, shape in rows)


def _affine(image: Tensor, affine: Tensor | None) -> Tensor | None:
    given = getattr(image, "affine", None) if affine is None else affine
    if given is None:
        return None
    given = torch.as_tensor(given).as_subclass(Tensor).double()
    return given if given.ndim == 2 else given[0]


def listed_layers(model: nn.Module, depth: int | None) -> list[tuple[str, nn.Module]]:
    """Modules by name, at most so deep below the first branching (None = all)."""
    named = [(n, m) for n, m in model.named_modules() if n]
    if depth is None:
        return named
    # Wrappers with one child (a LightningModule around a net) do not count as depth.
    base, root = 0, model
    while len(children := [c for c in root.children() if any(True for _ in c.parameters())]) == 1:
        base, root = base + 1, children[0]
    return [(n, m) for n, m in named if n.count(".") < base + depth]


def _output_shapes(model: nn.Module, image: Tensor, names: list[str]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if is_map(output, image):
                shapes.pop(name, None)
                shapes[name] = tuple(output.shape[1:])

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(record(name)) for name in names]
    try:
        with untouched(model, {image.device}), torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _row(
    model: nn.Module, image: Tensor, name: str, shape: tuple[int, ...], affine: Tensor | None, seen: bool, default: bool
) -> LayerRow:
    cell = tuple(full / small for full, small in zip(image.shape[2:], shape[1:], strict=True))
    voxel = None if affine is None else torch.linalg.vector_norm(affine[:-1, :-1], dim=0).tolist()
    return LayerRow(
        name=plain_name(name),
        kind=type(dict(model.named_modules())[name]).__name__,
        shape=shape,
        cell=cell,
        cell_mm=None if voxel is None else tuple(c * mm for c, mm in zip(cell, voxel, strict=False)),
        seen=_seen(model, image, name) if seen else None,
        default=default,
    )


def seen_share(
    model: nn.Module,
    image: Tensor,
    layer: str | nn.Module,
    run: Callable[[Tensor], object] | None = None,
) -> float:
    """Share of the image's positions that a central cell of a layer depends on (gradient support, eval mode).

    Args:
        model: The model.
        image: (B, C, *S); the first sample is used.
        layer: Name or module.
        run: How to call the model; default `model(image)`.

    Returns:
        A number in 0..1.

    Raises:
        InputError: The layer does not run, or does not depend on the image.
    """
    share = _seen(model, image, layer, run)
    if share is None:
        raise InputError(f"layer {find_layer(model, layer)[0]!r} does not depend on the image")
    return share


def _seen(
    model: nn.Module, image: Tensor, layer: str | nn.Module, run: Callable[[Tensor], object] | None = None
) -> float | None:
    name, module = find_layer(model, layer)
    capture = LayerCapture(name)
    try:
        with untouched(model, {image.device}), torch.enable_grad(), run_eagerly():
            capture.attach(module)
            probe = image[:1].detach().clone().requires_grad_()
            (run or model)(probe)
            if not capture.outputs:
                raise InputError(f"layer {name!r} did not run in the model's forward")
            support = _central_support(capture.outputs[-1].as_subclass(Tensor), probe)
    finally:
        capture.detach()
    return None if support is None else float(support.float().mean())


_Cell = tuple[int | slice, ...]


def _central_support(output: Tensor, image: Tensor) -> Tensor | None:
    """Positions of the image that the central cell depends on; None when the layer never saw the image."""
    centre: _Cell = (0, slice(None), *(size // 2 for size in output.shape[2:]))
    # A rectified cell that is silent on this image has no gradient; then the liveliest cell stands in.
    # Different weights per channel: behind a LayerNorm the plain sum over channels is constant.
    weights = torch.linspace(1, 2, output.shape[1], dtype=output.dtype, device=output.device)
    for cell in (centre, _liveliest(output)):
        score = (output[cell] * weights).sum()
        gradient: Tensor | None = torch.autograd.grad(score, image, retain_graph=True, allow_unused=True)[0]
        if gradient is None:
            return None
        support = (gradient[0] != 0).any(dim=0)
        if bool(support.any()):
            break
    return support


def _liveliest(output: Tensor) -> _Cell:
    strength = output[0].detach().abs().sum(dim=0)
    index = torch.unravel_index(strength.argmax(), strength.shape)
    return (0, slice(None), *(int(i) for i in index))
