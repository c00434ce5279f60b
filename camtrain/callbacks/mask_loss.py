"""MaskLossCallback: the organ mask loss in any Lightning training, without touching the user's module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torchmetrics import MeanMetric

from camtrain._batch import Adapter
from camtrain._errors import InputError
from camtrain._lightning import Callback
from camtrain.callbacks._context import RunContext, resolve_layer, tell_once
from camtrain.callbacks._publish import refuse_taken
from camtrain.callbacks._steps import WrappedStep, batch_of
from camtrain.cam.engine import Reshape, attention_maps
from camtrain.cam.layer_lookup import find_layer, plain_name
from camtrain.cam.layer_table import SEEN_SHARE_LIMIT, seen_share
from camtrain.cam.method_table import find_method
from camtrain.cam.watch import LogitsFrom, ModuleWatch
from camtrain.losses.organ_mask import MaskLossParts, OrganMaskLoss, Reduction, Scale
from camtrain.losses.schedule import Ramp
from camtrain.losses.taking_part import Labels


class MaskLossCallback(Callback):
    """Adds the organ mask loss to whatever loss `training_step` returns.

    In every training step the callback watches one layer of the user's own forward, turns activations and gradients
    into maps of all labels, brings the organs of the batch down to the grid of the maps, and adds weight x loss. The
    module is not edited: `training_step` is wrapped for the time of `fit` and restored afterwards, also after an
    exception. Gradient accumulation averages batch means; DDP equals one process.

    Logged as means over the epoch: `train/task_loss` (what the module returned), `train/mask_loss` (unweighted),
    `train/outside_evidence` (share of the positive evidence of present labels outside their organs), and what was left
    out: `train/unknown_labels`, `train/cases_without_organs`, `train/labels_without_region` (counts per epoch).

    Args:
        layer: Tapped layer: dotted name, module, or None for the last feature map.
        table: `OrganTable`, path, shipped name, mapping with the sections of the YAML, or None for the data module's.
        method: Map of the loss; must be differentiable (`ct.methods()`).
        form: Formula of the loss (`camtrain.losses.FORMS`).
        labels: Truths that take part, "all" known ones or "present" ones.
        weight: Factor of the loss.
        scale: See `OrganMaskLoss`.
        reduction: See `OrganMaskLoss`.
        label_weights: See `OrganMaskLoss`.
        warmup_steps: Optimizer steps without the loss.
        ramp_steps: Optimizer steps over which the weight then grows; both continue by themselves on resume.
        mode: How regions come down to the map's grid: "fill", "nearest", "trilinear", "any".
        keys: Contract word -> key in the user's batch.
        adapter: Callable that makes a dict with the contract's words of the batch.
        logits: Where the logits are: None = output of the smallest module around the layer; a module's dotted name;
            or a callable that picks (B, L) from the model's output.
        reshape: Linear callable that makes (B, K, *S') of the layer's output.
        names: Label names in the order of the outputs.
        name: Tells two callbacks of this class apart, in keys and checkpoint.
        call: Which call of the layer counts, where one step runs it several times.

    Raises:
        InputError: In `setup`, for a layer, table or set-up of the Trainer that cannot work; in the first step, for
            what only the data can show.

    Example:
        >>> callback = MaskLossCallback(layer="layer4", table="phantom", weight=1 / 3)
        >>> callback.loss_fn.form
        'softplus'
    """

    def __init__(
        self,
        layer: str | None = None,
        table: Any = None,  # OrganTable | str | Path | Mapping | None; a union makes jsonargparse open the file itself
        method: str = "hirescam",
        form: str = "softplus",
        labels: Labels = "all",
        weight: float = 1 / 3,
        scale: Scale = "mean",
        reduction: Reduction = "global",
        label_weights: Sequence[float] | None = None,
        warmup_steps: int = 0,
        ramp_steps: int = 0,
        mode: str = "fill",
        keys: Mapping[str, str] | None = None,
        adapter: Adapter | None = None,
        logits: LogitsFrom = None,
        reshape: Reshape | None = None,
        names: Sequence[str] | None = None,
        name: str | None = None,
        call: int | None = None,
    ) -> None:
        if not find_method(method).differentiable:
            raise InputError(f"method {method!r} is not differentiable: train with 'hirescam'")
        self.layer, self.method, self.name = layer, method, name
        self.logits, self.reshape, self.call = logits, reshape, call
        self.loss_fn = OrganMaskLoss(form, labels, weight, scale, reduction, label_weights)
        self.ramp = Ramp(warmup_steps, ramp_steps)
        self.context = RunContext(table, keys, adapter, names, mode)
        self._watch: ModuleWatch | None = None
        self._wrapped: WrappedStep | None = None
        self._figures: _Figures | None = None
        self._seen: tuple[nn.Module | None, Any] | None = None
        self._checked = False

    @property
    def state_key(self) -> str:
        """Two callbacks with different names keep different states."""
        return f"{type(self).__qualname__}[{self.name or ''}]"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that the loss can work here, then wrap `training_step`."""
        if stage != "fit":
            return
        self._restore()
        self.context.setup(trainer)
        _refuse(trainer, pl_module, self.context)
        if self.layer is not None:
            find_layer(pl_module, self.layer)
        if isinstance(self.logits, str):
            find_layer(pl_module, self.logits)
        self._wrapped = WrappedStep(pl_module, "training_step", partial(self._step, trainer, pl_module))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the module its own `training_step` back."""
        self._restore()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """After an exception Lightning does not always tear down."""
        self._restore()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the first step, when its graph is gone: say what the maps can and cannot show."""
        if self._seen is not None:
            (entry, inputs), self._seen = self._seen, None
            if self._watch is not None and trainer.is_global_zero:
                _tell_seen_share(trainer, self._watch.name, entry, inputs)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the means of the epoch."""
        if self._figures is None:
            return
        prefix = f"train/{self.name}" if self.name else "train"
        figures = {f"{prefix}/{key}": value for key, value in self._figures.compute().items()}
        self._figures = None
        refuse_taken(trainer, list(figures))
        for key, value in figures.items():
            pl_module.log(key, value, batch_size=1, sync_dist=True)

    def _restore(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        if self._wrapped is not None:
            self._wrapped.undo()
            self._wrapped = None
        self._figures, self._seen, self._checked = None, None, False

    def _step(self, trainer: Any, pl_module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One training step: the user's, watched, plus the mask loss."""
        if self._figures is None:
            self._figures = _Figures(pl_module.device)
        factor = self.ramp.weight_at(trainer.global_step)
        if factor == 0 and self._checked:
            output = original(*args, **kwargs)
            if output is not None:
                self._figures.task.update(_loss_of(output).detach())
            return output
        batch = batch_of(args, kwargs)
        watch = self._watching(trainer, pl_module, batch)
        watch.start()
        try:
            output = original(*args, **kwargs)
            if output is None:
                return None
            parts = self._parts(trainer, pl_module, watch, batch)
            if not self._checked:
                self._checked, self._seen = True, (watch.entry, watch.inputs)
        finally:
            watch.stop()
        task = _loss_of(output)
        self._figures.task.update(task.detach())
        if factor == 0:
            # The first step of a warm-up only shows that the loss will work when its time comes.
            return output
        self._figures.update(parts)
        total = task + factor * self.loss_fn.weight * parts.loss.to(task.dtype)
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def _watching(self, trainer: Any, pl_module: nn.Module, batch: Any) -> ModuleWatch:
        if self._watch is None:
            image = self.context.image(batch) if self.layer is None else None
            name = resolve_layer(trainer, pl_module, self.layer, image)
            self._watch = ModuleWatch(pl_module, name, self.logits, self.call)
        return self._watch

    def _parts(self, trainer: Any, pl_module: nn.Module, watch: ModuleWatch, batch: Any) -> MaskLossParts:
        outputs = None if self.context.names is None else len(self.context.names)
        source, logits = watch.take(outputs, self.context.expected(trainer, pl_module))
        names = self.context.resolve(trainer, pl_module, logits.shape[1])
        words = self.context.read(batch, len(names))
        if words.label is None:
            raise InputError(
                "the mask loss needs labels, but the batch has no key 'label': name yours with keys={'label': ...}"
            )
        label = words.label.to(logits.device)
        chosen = label == 1 if self.loss_fn.labels == "present" else None
        maps = attention_maps(source, logits, self.method, chosen, True, self.reshape)
        allowed = self.context.allowed(words, maps.shape[2:])
        if allowed is None:
            allowed = torch.zeros_like(maps, dtype=torch.bool)
        return self.loss_fn.parts(maps, allowed.to(maps.device), label, words.has_organs.to(maps.device))


class _Figures:
    """Running means and counts of one epoch, without a host synchronisation per step."""

    def __init__(self, device: torch.device) -> None:
        self.task = MeanMetric(nan_strategy="disable").to(device)
        self.mask = MeanMetric(nan_strategy="disable").to(device)
        self.evidence = torch.zeros(2, device=device)
        self.counts: dict[str, Tensor] = {}

    def update(self, parts: MaskLossParts) -> None:
        self.mask.update(parts.loss.detach())
        self.evidence = self.evidence + parts.evidence
        for key in ("unknown_labels", "cases_without_organs", "labels_without_region"):
            self.counts[key] = self.counts.get(key, torch.zeros_like(self.evidence[0])) + getattr(parts, key)

    def compute(self) -> dict[str, Tensor]:
        """All processes must call it together; evidence and counts are those of all processes already."""
        figures = {}
        if self.task.update_called:
            figures["task_loss"] = self.task.compute()
        if self.mask.update_called:
            figures["mask_loss"] = self.mask.compute()
        if bool(self.evidence[1] > 0):
            figures["outside_evidence"] = self.evidence[0] / self.evidence[1]
        return figures | {key: value.float() for key, value in self.counts.items()}


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise InputError(
            f"training_step must return a loss tensor or a dict with the key 'loss', got {type(output).__name__}"
            + (f" with the keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else "")
        )
    return loss


def _tell_seen_share(trainer: Any, name: str, entry: nn.Module | None, inputs: Any) -> None:
    """Say once that cells which have seen most of the scan cannot show where the evidence lay."""
    layer = plain_name(name)
    if entry is None or inputs is None or (call := _one_case(entry, inputs)) is None:
        rank_zero_info(
            f"camtrain: how much of the image a cell of {layer!r} has seen is shown by ct.layers(model, image)"
        )
        return
    image, run = call
    share = seen_share(entry, image, find_layer(trainer.lightning_module, name)[1], run)
    if share > SEEN_SHARE_LIMIT:
        tell_once(
            trainer,
            f"camtrain: a central cell of {layer!r} depends on {share:.0%} of the image, so its maps locate cells, not "
            "evidence: the mask loss governs where cells look, not what the network uses. For that, replace what lies "
            "outside the organs while training (OutsideSwap), or tap a layer that has seen less.",
        )


def _one_case(entry: nn.Module, inputs: Any) -> tuple[Tensor, Callable[[Tensor], Any]] | None:
    """The first image among the inputs of a module, and how to call it again with another one and nothing but it."""
    leaves, spec = tree_flatten(inputs)
    found = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.ndim >= 3 and x.is_floating_point()]
    if not found:
        return None
    image = leaves[found[0]].detach().as_subclass(Tensor)
    first = [x[:1] if isinstance(x, Tensor) and x.ndim and len(x) == len(image) else x for x in leaves]

    def run(probe: Tensor) -> Any:
        args, kwargs = tree_unflatten([*first[: found[0]], probe, *first[found[0] + 1 :]], spec)
        return entry(*args, **kwargs)

    return image, run


def _refuse(trainer: Any, pl_module: Any, context: RunContext) -> None:
    """Set-ups in which the loss would be silently wrong."""
    if not context.has_table:
        raise InputError("MaskLossCallback needs an organ table: pass table=, or use a data module that has one")
    if not pl_module.automatic_optimization:
        raise InputError(
            "MaskLossCallback adds to the loss that training_step returns, but this module optimises by hand "
            "(automatic_optimization=False): open ct.LayerTap in training_step and add ct.OrganMaskLoss there"
        )
    if getattr(trainer.strategy, "_ddp_kwargs", {}).get("static_graph"):
        raise InputError(
            "DDP with static_graph=True leaves the gradients of an inner autograd.grad on each rank, silently: "
            "use DDPStrategy(static_graph=False)"
        )
    if isinstance(getattr(pl_module, "_compiler_ctx", None), dict):
        rank_zero_warn(
            "camtrain: the module is compiled as a whole; if its hooks are skipped the first step will say so"
        )
