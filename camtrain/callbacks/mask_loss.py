"""MaskLossCallback: the organ mask loss in any Lightning training, without touching the user's module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from camtrain._batch import Adapter, Batch
from camtrain._errors import InputError
from camtrain._lightning import Callback
from camtrain.callbacks._context import RunContext, tell_once
from camtrain.callbacks._engines import refuse_engine, refuse_static_graph
from camtrain.callbacks._figures import Figures, mean_loss
from camtrain.callbacks._layers import check_layers, needs_image, resolve_layers, unnamed
from camtrain.callbacks._left_out import known_truths
from camtrain.callbacks._publish import refuse_taken
from camtrain.callbacks._seen import tell_seen_share
from camtrain.callbacks._settings import given
from camtrain.callbacks._steps import WrappedStep, batch_of, loss_of
from camtrain.cam.engine import Reshape, takes_backward
from camtrain.cam.method_table import find_method, methods
from camtrain.cam.several import maps_of_layers
from camtrain.cam.watch import LogitsFrom, ModuleWatch
from camtrain.losses.organ_mask import MaskLossParts, OrganMaskLoss, Reduction, Scale
from camtrain.losses.schedule import Ramp
from camtrain.losses.taking_part import Labels


class MaskLossCallback(Callback):
    """Adds the organ mask loss to whatever loss `training_step` returns.

    In every training step the callback watches one layer or several of the user's own forward, turns activations and
    gradients into maps of all labels, brings the organs of the batch down to the grid of the maps, and adds weight x
    loss; of several layers it is the mean of their losses, each on the grid of its own. The module is not edited:
    `training_step` is wrapped for the time of `fit` and restored afterwards, also after an exception. Gradient
    accumulation averages batch means; DDP equals one process.

    Logged as means over the epoch: `train/task_loss` (what the module returned), `train/mask_loss` (unweighted),
    `train/outside_evidence` (share of the positive evidence of present labels outside their organs), and what was left
    out: `train/unknown_labels`, `train/cases_without_organs`, `train/labels_without_region` (counts per epoch). With
    several layers `train/mask_loss` and `train/outside_evidence` are means over the layers, `train/mask_loss/<layer>`
    are their losses, and the counts are those of one layer, the one with the most labels without region.

    Args:
        layer: Tapped layer: dotted name, module, or None for the last feature map; or a list of them, which one
            forward passes through on its way to the logits.
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
        layer: str | list[str] | None = None,
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
        self.given = given(locals())
        if not find_method(method).differentiable:
            known = ", ".join(row.name for row in methods() if row.differentiable)
            raise InputError(f"method {method!r} is not differentiable, no loss trains through it: take one of {known}")
        self.layer, self.method, self.name = layer, method, name
        self.logits, self.reshape, self.call = logits, reshape, call
        self.loss_fn = OrganMaskLoss(form, labels, weight, scale, reduction, label_weights)
        self.ramp = Ramp(warmup_steps, ramp_steps)
        self.context = RunContext(table, keys, adapter, names, mode)
        self._watch: ModuleWatch | None = None
        self._wrapped: WrappedStep | None = None
        self._figures: Figures | None = None
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
        check_layers(pl_module, self.layer, self.logits)
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
            for name in self._watch.names if self._watch is not None and trainer.is_global_zero else []:
                tell_seen_share(trainer, name, entry, inputs)

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
            self._figures = Figures(pl_module.device)
        factor = self.ramp.weight_at(trainer.global_step)
        if factor == 0 and self._checked:
            output = original(*args, **kwargs)
            if output is not None:
                self._figures.task.update(loss_of(output).detach())
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
        task = loss_of(output)
        self._figures.task.update(task.detach())
        if factor == 0:
            # The first step of a warm-up only shows that the loss will work when its time comes.
            return output
        self._figures.update(parts)
        total = task + factor * self.loss_fn.weight * mean_loss(parts).to(task.dtype)
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def _watching(self, trainer: Any, pl_module: nn.Module, batch: Any) -> ModuleWatch:
        if self._watch is None:
            image = self.context.image(batch) if needs_image(self.layer) else None
            layers = resolve_layers(trainer, pl_module, self.layer, image)
            self._watch = ModuleWatch(pl_module, layers, self.logits, self.call, found=unnamed(self.layer))
        return self._watch

    def _parts(self, trainer: Any, pl_module: nn.Module, watch: ModuleWatch, batch: Any) -> dict[str, MaskLossParts]:
        """The loss of every layer; under DDP every process comes here in every step, for every layer."""
        sources, logits = watch.take_all(self.context.outputs, self.context.expected(trainer, pl_module))
        names = self.context.resolve(trainer, pl_module, logits.shape[1])
        words, label = self.context.labelled(batch, len(names), "the mask loss")
        if not self._checked:
            self._tell_price(trainer, sources, logits)
        label = known_truths(trainer, label.to(logits.device))
        chosen = label == 1 if self.loss_fn.labels == "present" else None
        maps = maps_of_layers(sources, logits, self.method, chosen, True, self.reshape)
        return {layer: self._loss(each, words, label) for layer, each in maps.items()}

    def _tell_price(self, trainer: Any, sources: Mapping[str, Tensor], logits: Tensor) -> None:
        dear = [key for key, source in sources.items() if takes_backward(logits, source, self.reshape)]
        if dear:
            tell_once(
                trainer,
                f"camtrain: the mask loss takes a backward pass per present label down to {', '.join(dear)}, and one "
                "through each of them, since the head behind is not affine in it (pooling or flatten and one linear "
                "layer is, and costs nothing). Behind the last feature map that is little, behind an earlier one it "
                "may be several times the step: docs/performance.md",
            )

    def _loss(self, maps: Tensor, words: Batch, label: Tensor) -> MaskLossParts:
        allowed = self.context.allowed(words, maps.shape[2:])
        if allowed is None:
            allowed = torch.zeros_like(maps, dtype=torch.bool)
        return self.loss_fn.parts(maps, allowed.to(maps.device), label, words.has_organs.to(maps.device))


def _refuse(trainer: Any, pl_module: Any, context: RunContext) -> None:
    """Set-ups in which the loss would be silently wrong."""
    if not context.has_table:
        raise InputError("MaskLossCallback needs an organ table: pass table=, or use a data module that has one")
    if not pl_module.automatic_optimization:
        raise InputError(
            "MaskLossCallback adds to the loss that training_step returns, but this module optimises by hand "
            "(automatic_optimization=False): open ct.LayerTap in training_step and add ct.OrganMaskLoss there"
        )
    refuse_engine(trainer, "MaskLossCallback")
    refuse_static_graph(trainer)
    if isinstance(getattr(pl_module, "_compiler_ctx", None), dict):
        rank_zero_warn(
            "camtrain: the module is compiled as a whole; if its hooks are skipped the first step will say so"
        )
