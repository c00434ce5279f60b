"""Activations and logits in, maps of all wanted labels out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from camtrain._errors import InputError
from camtrain.cam.affine_head import is_source, slopes
from camtrain.cam.by_cells import cheaper_by_cells, hires_cam_by_cells
from camtrain.cam.capture import reading_graph
from camtrain.cam.method_table import Method, find_method
from camtrain.cam.selection import Labels, Selection, select

Reshape = Callable[[Any], Tensor]


def attention_maps(
    source: Tensor,
    logits: Tensor,
    method: str = "hirescam",
    labels: Labels = None,
    create_graph: bool = True,
    reshape: Reshape | None = None,
) -> Tensor:
    """Signed maps of the wanted labels of a batch.

    Args:
        source: What the layer returned: (B, K, *S'), or anything that `reshape` brings into that shape.
        logits: (B, L), with a graph down to `source`.
        method: A name of `ct.methods()`.
        labels: See `camtrain.cam.selection.select`.
        create_graph: Keep the graph, for a loss on the maps.
        reshape: Linear callable (permute, drop a token, unflatten) applied to activations and gradients alike.

    Returns:
        (B, n, *S'), or (B, L, *S') with NaN where a bool mask per sample left a label out. float64 for float64
        models, else float32: ratios and sums over many cells do not fit half precision.

    Raises:
        InputError: The logits do not depend on the activations, or the method does not suit the head.
    """
    return attention_maps_by(source, logits, [method], labels, create_graph, reshape)[find_method(method).name]


def attention_maps_by(
    source: Tensor,
    logits: Tensor,
    methods: Sequence[str],
    labels: Labels = None,
    create_graph: bool = True,
    reshape: Reshape | None = None,
    samples: slice | None = None,
) -> dict[str, Tensor]:
    """Maps of several methods of the gradient family, which share one backward pass per label.

    Other arguments and errors are those of `attention_maps`.

    Args:
        source: What the layer returned, of the whole batch.
        logits: (B, L), of the whole batch.
        methods: Names of the methods.
        labels: For whole batches as in `attention_maps`; with `samples` a bool mask (b, L) of those samples.
        create_graph: Keep the graph.
        reshape: Makes (B, K, *S') of a layer's output.
        samples: Make maps of these samples alone: for many labels the maps of a batch are larger than all else.

    Returns:
        Method -> its maps.
    """
    rows = [_of_gradients(method) for method in methods]
    with gradients_on(logits.device):
        whole = labels if samples is None else _of_all(labels, samples, logits)
        passes = select(whole, logits.shape[0], logits.shape[1], logits.device)
        chosen = passes if samples is None else select(labels, len(logits[samples]), logits.shape[1], logits.device)
        activations = precise(spatial(source, reshape))
        if activations.shape[0] != logits.shape[0]:
            raise InputError(
                f"the tapped layer gives {tuple(activations.shape)} for {logits.shape[0]} rows of logits: if it works "
                "on slices or patches, bring them back to (B, K, *S) with reshape="
            )
        weights = _weights(logits, source) if reshape is None else None
        if any(row.name == "cam" for row in rows):
            weights = _checked_pool(weights)
        activations = activations if samples is None else activations[samples]
        if weights is not None:
            weights = weights if samples is None or len(weights) == 1 else weights[samples]
            maps = {row.name: _closed_form(activations, weights.to(activations), row, chosen) for row in rows}
        else:
            cheap = not create_graph and reshape is None and {row.name for row in rows} == {"hirescam"}
            found = _cell_by_cell(source, logits, chosen, samples) if cheap else None
            if found is None:
                found = _label_by_label(source, logits, activations, rows, passes, create_graph, reshape, samples)
            maps = {name: chosen.arrange(each) for name, each in found.items()}
    return maps if create_graph else {name: each.detach() for name, each in maps.items()}


def _cell_by_cell(source: Tensor, logits: Tensor, chosen: Selection, samples: slice | None) -> dict[str, Tensor] | None:
    """HiResCAM where few cells make it cheap and certain; None elsewhere."""
    if not cheaper_by_cells(source, logits, chosen.picks.shape[1]):
        return None
    maps = hires_cam_by_cells(source, logits, chosen, samples)
    return None if maps is None else {"hirescam": maps}


def _label_by_label(
    source: Tensor,
    logits: Tensor,
    activations: Tensor,
    rows: Sequence[Method],
    passes: Selection,
    create_graph: bool,
    reshape: Reshape | None,
    samples: slice | None,
) -> dict[str, Tensor]:
    """One backward pass per label, which all methods share; `activations` and maps are those of `samples`."""
    if create_graph:
        _refuse_compiled(logits, source)
    each = {row.name: _Stack(passes.picks.shape[1], create_graph) for row in rows}
    for gradient in label_gradients(logits, source, passes, create_graph):
        on_grid = precise(spatial(gradient, reshape))
        on_grid = on_grid if samples is None else on_grid[samples]
        for row in rows:
            each[row.name].append(row.function()(activations, on_grid))
    return {name: found.whole(activations) for name, found in each.items()}


def _of_all(labels: Labels, samples: slice, logits: Tensor) -> Tensor:
    """(B, L) bool: the mask of some samples, and nothing of the others."""
    mask = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    mask[samples] = torch.as_tensor(labels, dtype=torch.bool, device=logits.device)
    return mask


def _of_gradients(method: str) -> Method:
    row = find_method(method)
    if row.family != "gradient":
        raise InputError(
            f"method {row.name!r} needs a forward of its own and cannot be read off one that has run: call ct.explain"
        )
    return row


def column_of(scores: Any, batch: int) -> Tensor:
    """What `target=` returned, as the one column (B, 1) of scores.

    Raises:
        InputError: It is not one score per sample.
    """
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (batch,):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(f"target= must return one score per sample, shape ({batch},), got {got}")
    with gradients_on(scores.device):
        return scores.as_subclass(Tensor)[:, None]


@contextmanager
def gradients_on(device: torch.device) -> Iterator[None]:
    """Full precision and gradients, whatever mode the caller is in (Trainer.test runs under inference mode)."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type=device.type, enabled=False):
        yield


def spatial(source: Tensor, reshape: Reshape | None) -> Tensor:
    """What a layer returned, as a plain (B, K, *S') tensor with the same graph.

    Raises:
        InputError: No spatial axes, or `reshape` fails.
    """
    plain = source.as_subclass(Tensor)
    plain = plain if reshape is None else _reshaped(plain, reshape)
    if plain.ndim < 3:
        raise InputError(
            f"the tapped layer gives {tuple(plain.shape)}, expected (B, K, *S) with spatial axes: choose an earlier "
            "layer (camtrain layers, or ct.layers, lists them) or pass reshape="
        )
    return plain


def _reshaped(plain: Tensor, reshape: Reshape) -> Tensor:
    try:
        found: Any = reshape(plain)
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # It is the user's code: whatever it raises says how it does not fit the layer.
        raise InputError(f"reshape= failed on {tuple(plain.shape)}: {str(error) or type(error).__name__}") from error
    if not isinstance(found, Tensor):
        raise InputError(f"reshape= returned a {type(found).__name__} of {tuple(plain.shape)}, expected a tensor")
    return found


def precise(tensor: Tensor) -> Tensor:
    """float64 stays, anything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _weights(logits: Tensor, source: Tensor) -> Tensor | None:
    with reading_graph():
        try:
            return slopes(logits, source)
        except RuntimeError as error:
            raise (explained(error) or error) from None


def takes_backward(logits: Tensor, source: Tensor, reshape: Reshape | None = None) -> bool:
    """Do maps need a backward pass per label, or is the head affine in the activations, so that they need none?

    Example:
        >>> A = torch.rand(2, 3, 4, requires_grad=True)
        >>> head = torch.nn.Linear(3, 7)
        >>> takes_backward(head(A.mean(dim=2)), A), takes_backward(head(A.mean(dim=2).tanh()), A)
        (False, True)
    """
    return reshape is not None or _weights(logits, source) is None


def require_pool_head(logits: Tensor, source: Tensor, reshape: Reshape | None) -> None:
    """Is the head global average pooling and one FC layer, which CAM is defined for?

    Raises:
        InputError: It is not.
    """
    with gradients_on(logits.device):
        _checked_pool(_weights(logits, source) if reshape is None else None)


def _checked_pool(weights: Tensor | None) -> Tensor:
    if weights is None or len(weights) != 1 or any(size != 1 for size in weights.shape[3:]):
        raise InputError(
            "method 'cam' needs global average pooling and one FC layer right behind the tapped layer; "
            "use 'hirescam', which is the same there and holds for other heads too"
        )
    return weights


def _closed_form(activations: Tensor, weights: Tensor, row: Method, chosen: Selection) -> Tensor:
    """No backward pass: d logit / d activations is `weights` (n, L, K, *S' or 1), n = 1 the same for every sample."""
    pooled = all(size == 1 for size in weights.shape[3:])
    cells = activations[0, 0].numel()
    if chosen.columns is not None and not chosen.everything:
        weights = weights.index_select(1, chosen.columns)
    if row.name == "gradcam" or (pooled and row.name in ("hirescam", "cam")):
        flat = weights.flatten(3).mean(dim=3) * (cells if row.name == "cam" else 1)
        maps = _contracted(flat, activations)
    elif row.name == "hirescam":
        maps = _contracted(weights, activations)
    else:
        formula = row.function()
        maps = _stack([formula(activations, w.expand_as(activations)) for w in weights.unbind(1)], activations)
    return maps if chosen.columns is not None else chosen.take(maps)


def _contracted(weights: Tensor, activations: Tensor) -> Tensor:
    """Sum over channels of weights (n, L, K, *some axes) x activations (B, K, *S'): (B, L, *S').

    Axes along which the weight is the same everywhere (size 1) are left out of the product and never written out:
    AxialNet has 135 slices of them.
    """
    axes = "uvwxyz"[: activations.ndim - 2]
    own = "".join(axis for axis, size in zip(axes, weights.shape[3:], strict=False) if size > 1)
    kept = weights.reshape(*weights.shape[:3], *(size for size in weights.shape[3:] if size > 1))
    samples = "b" if len(weights) > 1 else ""
    return torch.einsum(f"{samples}lk{own},bk{axes}->bl{axes}", kept if samples else kept[0], activations)


def label_gradients(logits: Tensor, source: Tensor, chosen: Selection, create_graph: bool) -> Iterator[Tensor]:
    """One partial backward pass per selected label: sample i's j-th label in pass j, for all samples at once."""
    if logits.grad_fn is None and chosen.picks.shape[1]:
        raise InputError(NO_LINK)
    for j in range(chosen.picks.shape[1]):
        pick, wanted = chosen.picks[:, j : j + 1], torch.zeros_like(logits)
        # What a pass starts with, instead of a score for each: a gather and a sum, forward and backward, saved.
        if chosen.valid is None:
            wanted.scatter_(1, pick, 1.0)
        else:
            wanted.scatter_(1, pick, chosen.valid[:, j : j + 1].to(logits.dtype))
        yield _gradient(logits, source, wanted, create_graph)


def _gradient(logits: Tensor, source: Tensor, wanted: Tensor, create_graph: bool) -> Tensor:
    start = start_of(logits, source)
    try:
        if start == 1:
            return _slope(logits, source, wanted, create_graph)
        gradient = precise(_slope(logits, source, wanted * start, create_graph)) / start
        if bool(gradient.isfinite().all()):
            return gradient
        return _slope(logits, source, wanted, create_graph)
    except RuntimeError as error:
        raise (explained(error) or error) from None


def _slope(logits: Tensor, source: Tensor, wanted: Tensor, create_graph: bool) -> Tensor:
    (gradient,) = torch.autograd.grad(
        logits, source, wanted, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    if gradient is None:
        raise InputError(NO_LINK)
    return gradient


def start_of(score: Tensor, source: Tensor) -> float:
    """What a backward pass to the layer starts with: 1, in float16 a power of two that keeps small slopes.

    The slope behind a mean over many cells is small: at 128^3 cells half of them fall under float16's least number,
    and the map was wrong by more than its own size. The caller divides it out again in float32.

    Example:
        >>> start_of(torch.zeros(()), torch.zeros(1, 1, 64, 64, 64))
        1.0
        >>> start_of(torch.zeros(()), torch.zeros(1, 1, 64, 64, 64, dtype=torch.float16))
        4096.0
    """
    if torch.float16 not in (score.dtype, source.dtype):
        return 1.0
    cells = source.shape[2:].numel()
    return 2.0 ** min(12, cells.bit_length() - 1)


class _Stack:
    """Maps of one label after the other as (B, n, *S'); without a graph they are never held twice."""

    def __init__(self, count: int, graph: bool) -> None:
        self._count, self._graph = count, graph
        self._maps: list[Tensor] = []
        self._whole: Tensor | None = None
        self._filled = 0

    def append(self, maps: Tensor) -> None:
        if self._graph:
            self._maps.append(maps)
            return
        if self._whole is None:
            self._whole = maps.new_empty(len(maps), self._count, *maps.shape[1:])
        self._whole[:, self._filled] = maps.detach()
        self._filled += 1

    def whole(self, activations: Tensor) -> Tensor:
        return _stack(self._maps, activations) if self._whole is None else self._whole


def _stack(maps: list[Tensor], activations: Tensor) -> Tensor:
    if maps:
        return torch.stack(maps, dim=1)
    # No label at all: no map, but with a graph, so that a loss over nothing is a zero that can be sent backward.
    return activations[:, :0]


def explained(error: RuntimeError) -> InputError | None:
    """In the user's words what torch says of its graph; None for what has nothing to do with it (memory)."""
    text = str(error)
    if "second time" in text:
        return InputError("the graph of this forward is gone: ask for maps before backward(), or use retain_graph=True")
    if "use_reentrant" in text:
        return InputError(f"{NO_LINK} (torch says: {text})")
    return None


def _refuse_compiled(logits: Tensor, source: Tensor) -> None:
    """A loss on maps needs double backward through the head, which compiled code lacks."""
    if "torch._dynamo" not in sys.modules:
        return
    above: dict[Any, list[Any]] = {}
    reached: list[Any] = []
    stack = [logits.grad_fn]
    while stack:
        node = stack.pop()
        if is_source(node, source):
            reached.append(node)
            continue
        for operand, _ in () if node is None else node.next_functions:
            if operand is not None and operand not in above:
                stack.append(operand)
            above.setdefault(operand, []).append(node)
    seen = set(reached)
    while reached:
        for node in above.get(reached.pop(), []):
            if type(node).__name__.startswith("CompiledFunction"):
                raise InputError(_COMPILED)
            if node not in seen:
                seen.add(node)
                reached.append(node)


_COMPILED = (
    "the part between the tapped layer and the logits is compiled by torch.compile, and compiled code cannot be "
    "differentiated twice: compile the part before the layer, leave the head eager (ct.compile_backbone does so)"
)
NO_LINK = (
    "the logits do not depend on the tapped layer's output: the layer must lie between the image and the logits, in "
    "the same forward (maps() takes what the last one returned), outside torch.no_grad, inference mode, detach, "
    "reentrant checkpointing and whole-model torch.compile (compile the part before the layer, leave the head eager)"
)
