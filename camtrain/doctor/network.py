"""A network on one batch: time and memory of a step, and the layers that maps would be taken of. Nothing is trained."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from camtrain._batch import read_batch
from camtrain._errors import InputError
from camtrain.anatomy import spacing_of
from camtrain.anatomy.organ_table import OrganTable
from camtrain.cam.layer_lookup import default_layer, find_layer, plain_name
from camtrain.cam.layer_table import layers as list_layers
from camtrain.cam.tap import LayerTap
from camtrain.doctor.net_facts import BY_DEFAULT, NetFacts, StepCost, WatchedLayer
from camtrain.losses.organ_mask import OrganMaskLoss

_log = logging.getLogger(__name__)
_LONGEST = 180.0  # seconds that a step may be expected to take, else it is not tried
_SHORT = 10.0  # seconds
_MEMORY_SHARE = 0.6  # of what is free
_SLOW = 20.0  # seconds that a forward may be expected to take; beyond, shapes say all that can be said
_RATE = 2e10  # floating-point operations that a core makes in a second: of convolutions in float32, roughly
_BACKWARD = 3.0  # a step takes about so many forwards: what is expected of it before it is tried


@dataclass(frozen=True)
class Watch:
    """A callback of the config that takes maps.

    Attributes:
        name: Of its class.
        layer: What it was given.
        method: Of the mask loss.
        loss: The mask loss; None for what only looks.
    """

    name: str
    layer: Any
    method: str = "hirescam"
    loss: OrganMaskLoss | None = None


@dataclass(frozen=True)
class Trial:
    """What a network is tried on.

    Attributes:
        model: A LightningModule; a copy of it is tried.
        batch: A training batch.
        table: Organ table.
        watches: Callbacks of the config.
        train_cases: Of an epoch.
        workers: Processes that read.
        read_seconds: Per case.
        device: Where.
    """

    model: Any
    batch: Any
    table: OrganTable | None = None
    watches: Sequence[Watch] = ()
    train_cases: int = 0
    workers: int = 0
    read_seconds: float = math.nan
    device: str = "cpu"


def try_network(trial: Trial) -> NetFacts:
    """Measure a forward, a training step, and the step with the mask loss of the config.

    Args:
        trial: What to try. Its model is left as it is.

    Returns:
        What was measured; a step that cannot run is in `fault`.
    """
    net = getattr(trial.model, "net", trial.model)
    facts = NetFacts(
        kind=type(net).__name__,
        device=trial.device,
        parameters=sum(p.numel() * p.element_size() for p in trial.model.parameters()),
        trainable=sum(p.numel() * p.element_size() for p in trial.model.parameters() if p.requires_grad),
        train_cases=trial.train_cases,
        workers=trial.workers,
        read_seconds=trial.read_seconds,
        **_optimizer(trial.model),
    )
    model = copy.deepcopy(trial.model).to(trial.device)
    batch = _moved(trial.batch, trial.device)
    try:
        facts = _of_batch(facts, batch)
        image = read_batch(batch).image
        if image is None:
            raise InputError("expected the key 'image' in the batch")
        plan = _plan(model, batch, trial.watches) if trial.device == "cpu" else None
        if plan is not None and (reason := plan.too_much()):
            return replace(facts, skipped=reason, layers=plan.layers)
        facts = replace(facts, **_forward(model, image))
        facts = replace(facts, layers=_layers(model, batch, trial.watches))
        if not facts.skipped:
            facts = replace(facts, step=_best(lambda: model.training_step(batch, 0), model))
            masks = [watch for watch in trial.watches if watch.loss is not None]
            if masks and trial.table is not None and not any(layer.fault for layer in facts.layers):
                masked = _best(lambda: _masked_loss(model, batch, masks, trial.table), model)
                facts = replace(facts, masked_step=masked)
    except InputError as error:
        return replace(facts, fault=str(error))
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        # A network of any make, on shapes that may not fit it: what it says is about the user's config.
        first = (str(error).strip().splitlines() or ["no message"])[0]
        said = f"{type(error).__name__}: {first[:300]}"
        if isinstance(error, NotImplementedError) or "attached to a `Trainer`" in first:
            return replace(facts, skipped=f"the module cannot be asked without a Trainer ({said})")
        return replace(facts, fault=said)
    return facts


@dataclass(frozen=True)
class _Plan:
    """What shapes alone say of a forward.

    Attributes:
        operations: Floating-point operations.
        outputs: Bytes of what all leaf modules give.
        layers: Layers that maps would be taken of.
    """

    operations: int
    outputs: int
    layers: list[WatchedLayer]

    def too_much(self) -> str:
        """Why not even a forward is tried on this machine, "" = it is."""
        free = free_memory()
        if free is not None and self.outputs > _MEMORY_SHARE * free:
            return f"the feature maps of a batch take {self.outputs / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        seconds = self.operations / (_RATE * torch.get_num_threads())
        if seconds > _SLOW:
            return (
                f"a forward alone takes {self.operations / 1e12:.2g} trillion operations, here some {seconds:.0f} s, "
                f"and the feature maps of a batch {self.outputs / 2**30:.1f} GiB"
            )
        return ""


def _plan(model: nn.Module, batch: Any, watches: Sequence[Watch]) -> _Plan | None:
    """A forward of shapes, without numbers or memory; None of a network that decides by numbers."""
    image = read_batch(batch).image
    assert image is not None  # noqa: S101
    shapes = copy.deepcopy(model).to("meta")
    hollow = image.as_subclass(Tensor).to("meta")
    try:
        with FlopCounterMode(display=False) as counter:
            outputs = _output_bytes(shapes, hollow)
        return _Plan(counter.get_total_flops(), outputs, _layers(shapes, batch, watches, hollow))
    except InputError:
        raise
    except Exception as error:  # what a network of any make says of tensors without numbers is no fault of it
        _log.debug("no forward of shapes alone: %s", error)
        return None


def _output_bytes(model: nn.Module, image: Tensor) -> int:
    """Bytes that all leaf modules give in one forward: what a step may keep."""
    outputs = 0

    def add(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal outputs
        outputs += output.numel() * output.element_size() if isinstance(output, Tensor) else 0

    handles = [m.register_forward_hook(add) for m in model.modules() if not any(m.children())]
    try:
        with torch.no_grad():
            model(image)
            _finish(image)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _of_batch(facts: NetFacts, batch: Any) -> NetFacts:
    tensors = [v for v in batch.values() if isinstance(v, Tensor)] if isinstance(batch, dict) else []
    image = batch.get("image") if isinstance(batch, dict) else None
    return replace(
        facts,
        batch=sum(t.numel() * t.element_size() for t in tensors),
        batch_size=0 if image is None else len(image),
        image_shape=() if image is None else tuple(image.shape),
    )


def _optimizer(model: Any) -> dict[str, Any]:
    """How many copies of the parameters the optimiser keeps: Adam's two moments, SGD's momentum."""
    name = str(getattr(model, "optimizer_name", ""))
    if name == "sgd":
        return {"optimizer": "SGD", "optimizer_states": 1 if getattr(model, "momentum", 0) else 0}
    return {"optimizer": "AdamW" if name == "adamw" else "Adam (assumed)", "optimizer_states": 2}


def _forward(model: nn.Module, image: Tensor) -> dict[str, Any]:
    """Time of a forward, and whether a step can be afforded: all outputs of leaf modules are what it may keep."""
    begin = time.perf_counter()
    outputs = _output_bytes(model, image)
    seconds = time.perf_counter() - begin
    free = free_memory() if image.device.type == "cpu" else None
    reason = ""
    if seconds * _BACKWARD > _LONGEST:
        reason = (
            f"a forward alone took {seconds:.0f} s, so a step would take some {seconds * _BACKWARD / 60:.0f} minutes"
        )
    elif free is not None and outputs > _MEMORY_SHARE * free:
        reason = f"the feature maps of a batch take {outputs / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
    return {"forward_seconds": seconds, "skipped": reason}


def _best(step: Callable[[], Any], model: nn.Module) -> StepCost:
    """The second step where the first is short: the first one of a process also warms up."""
    first = _measured(step, model)
    return first if first.seconds > _SHORT else min(first, _measured(step, model), key=lambda cost: cost.seconds)


def _measured(step: Callable[[], Any], model: nn.Module) -> StepCost:
    """Forward and backward, and the bytes that wait for the backward pass; each storage counts once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    begin = time.perf_counter()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = step()
    loss = output["loss"] if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise InputError(f"expected a loss from training_step, got {type(loss).__name__}")
    torch.autograd.backward(loss)
    _finish(loss)
    seconds = time.perf_counter() - begin
    model.zero_grad(set_to_none=True)
    if not bool(torch.isfinite(loss.detach()).all()):
        raise InputError(f"expected a finite loss, got {float(loss.detach())}: check intensities and labels")
    return StepCost(seconds, sum(held.values()))


def _masked_loss(model: nn.Module, batch: Any, masks: Sequence[Watch], table: OrganTable | None) -> Tensor:
    """Mask losses of one forward, and its logits: as much work as a step of MaskLossCallback."""
    assert table is not None  # noqa: S101  (the caller knows)
    read = read_batch(batch)
    assert read.image is not None  # noqa: S101
    total: Tensor | None = None
    for watch in masks:
        layer = watch.layer[0] if isinstance(watch.layer, list | tuple) else watch.layer
        with LayerTap(model, layer) as tap:
            logits = model(read.image)
            maps = tap.maps(logits, method=watch.method, create_graph=True)
        label = read_batch(batch, outputs=logits.shape[1]).label
        if read.organs is None or label is None:
            raise InputError("the mask loss needs the keys 'organs' and 'label' in the batch")
        allowed = table.allowed(
            read.organs.cpu(),
            maps.shape[2:],
            spacing=None if read.affine is None else spacing_of(read.affine),
            allowed_organs=None if read.allowed_organs is None else read.allowed_organs.cpu(),
        )
        assert watch.loss is not None  # noqa: S101
        loss = watch.loss(maps, allowed.to(maps.device), label) + logits.float().square().mean()
        total = loss if total is None else total + loss
    assert total is not None  # noqa: S101
    return total


def _layers(model: nn.Module, batch: Any, watches: Sequence[Watch], hollow: Tensor | None = None) -> list[WatchedLayer]:
    read = read_batch(batch)
    image = read.image if hollow is None else hollow
    assert image is not None  # noqa: S101
    rows = {row.name: row for row in list_layers(model, image, depth=None, affine=read.affine, seen=False)}
    found = []
    for watch in (Watch(BY_DEFAULT, None), *watches):
        for layer in watch.layer if isinstance(watch.layer, list | tuple) else [watch.layer]:
            try:
                full = default_layer(model, image)[0] if layer is None else find_layer(model, layer)[0]
            except InputError as error:
                found.append(WatchedLayer(watch.name, str(layer), fault=str(error)))
                continue
            name = plain_name(full)
            row = rows.get(name)
            if row is None:
                fault = "its output is no feature map (the image's rank, and more than one position)"
                found.append(WatchedLayer(watch.name, name, fault=fault))
            else:
                found.append(WatchedLayer(watch.name, name, row.shape, row.cell, row.cell_mm))
    return found


def _moved(batch: Any, device: str) -> Any:
    if not isinstance(batch, dict):
        return batch
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _finish(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def free_memory() -> int | None:
    """Bytes of memory that are free on this machine; None where the system does not say."""
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    for line in table.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
