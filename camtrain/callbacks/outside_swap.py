"""OutsideSwap: what lies outside a label's organs is another case's, so that the network cannot use it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from camtrain._batch import KEYS, Adapter, Batch, read_batch
from camtrain._errors import InputError, nearest
from camtrain._lightning import Callback
from camtrain.anatomy import spacing_of
from camtrain.callbacks._atlas import RegionAtlas
from camtrain.callbacks._context import RunContext, tell_once
from camtrain.callbacks._gate import LogitGate, refuse_mixing
from camtrain.callbacks._left_out import leaving_out
from camtrain.callbacks._lenders import Lenders
from camtrain.callbacks._publish import refuse_taken
from camtrain.callbacks._regions import Cases, Keep, Rules
from camtrain.callbacks._settings import given
from camtrain.callbacks._steps import WrappedStep, batch_of, loss_of
from camtrain.callbacks._swap_checks import LeaveOut, WithoutOrgans, refuse_setup, refuse_truths
from camtrain.callbacks._swapping import Composite, Targets, compose, make_plan
from camtrain.callbacks._write import written
from camtrain.cam.watch import LogitsFrom
from camtrain.losses.reduction import over_processes

PairLoss = Callable[[Tensor, Tensor], Tensor]
SHARES = ("swapped_cases", "left_out_labels")


class OutsideSwap(Callback):
    """Replaces what lies outside a label's organs by another case's while the network trains.

    The mask loss governs where cells look; this governs what the network uses. Of a share `p` of the training cases one
    random label is chosen: its allowed region stays, everything else comes from another case of the batch, with a
    blended seam, and only truths that the composite still shows are taught. What lies outside says nothing about the
    truth then, whatever it said in the data. The module is not edited and runs no second time: `training_step` is given
    another batch, for the time of `fit`.

    A truth that a composite does not show is left out pair by pair: `leave_out="gate"` cuts off the gradient of its
    logit, behind any loss that treats (case, label) pairs by themselves, and lets those that remain count as much as a
    mean over them; `"nan"` writes NaN for it, for modules whose loss leaves NaN out. The loss that the module logs
    still counts the pairs behind the gate; the gradient does not.

    Cases stay as they are where no known label has a region that is neither empty nor the whole image, and, unless
    `without_organs` says otherwise, where they have no organs. A batch of one borrows from the step before. The draws
    follow from `seed`, epoch, batch and process alone and leave the global random state untouched.

    Logged as means over the epoch: `train/swapped_cases`, `train/left_out_labels` (shares of cases and of pairs).

    Args:
        table: `OrganTable`, path, shipped name, mapping with the sections of the YAML, or None for the data module's.
        p: Probability that a case is swapped.
        keep: `"label"`: one random label's region stays, all else is another case's. `"organs"`: likewise, with the
            group of organs that the label shares with others, and every other such group comes from a case of its
            own, laid on yet another. `"union"`: all regions stay, and with them every truth (class indices need it).
        targets: A label is taught the truth of the case that its region came from, if it shows whole: `"kept"` asks
            that of regions that were kept or laid, `"follow"` also of what the case behind them shows by itself.
        cover: Take, with an organ, also what lies where the case behind it has that organ, so that none shows twice.
        seam: Voxels over which one case fades into another.
        leave_out: See above.
        loss: Callable (logits, label) -> (B, L), one value per pair, where the module's own loss mixes labels; its mean
            over the known pairs is what trains then, in every step (unknown ones come in as 0 and do not count).
        keys: Contract word -> key in the user's batch.
        adapter: Callable that makes a dict with the contract's words of the batch, of the batch's own tensors.
        logits: Where the logits are: None = output of the outermost module that the step calls; a module's dotted name;
            or a callable that picks (B, L) from that output.
        names: Label names in the order of the outputs.
        name: Tells two callbacks of this class apart, in keys and checkpoint.
        seed: Of the draws; None = the seed of the run (`torch.initial_seed`).
        without_organs: What becomes of cases that were not segmented. `"stay"`: they are never swapped, only lend.
            `"lend"`: one label's region of a segmented case, of this step or one before, is laid on them, and that
            label's truth is taught. `"atlas"`: their organs are taken to lie where a tenth of the segmented cases has
            them (counted over the first epoch, kept in checkpoints): for images of one shape and about aligned.

    Raises:
        InputError: An argument is out of range; in `setup` or in the first step, a module or table with which no truth
            could be left out.

    Example:
        >>> callback = OutsideSwap(table="phantom", p=0.5)
        >>> callback.state_dict()["replacement"]
        'case'
    """

    def __init__(
        self,
        table: Any = None,  # OrganTable | str | Path | Mapping | None; a union makes jsonargparse open the file itself
        p: float = 0.75,
        keep: Keep = "label",
        targets: Targets = "kept",
        cover: bool = True,
        seam: int = 1,
        leave_out: LeaveOut = "gate",
        loss: PairLoss | None = None,
        keys: Mapping[str, str] | None = None,
        adapter: Adapter | None = None,
        logits: LogitsFrom = None,
        names: Sequence[str] | None = None,
        name: str | None = None,
        seed: int | None = None,
        without_organs: WithoutOrgans = "stay",
    ) -> None:
        self.given = given(locals())
        _one_of("keep", keep, get_args(Keep))
        _one_of("targets", targets, get_args(Targets))
        _one_of("leave_out", leave_out, get_args(LeaveOut))
        _one_of("without_organs", without_organs, get_args(WithoutOrgans))
        if not 0 < p <= 1:
            raise InputError(f"p= expects a probability above 0 and at most 1, got {p}: leave the callback out for 0")
        if isinstance(seam, bool) or not isinstance(seam, int) or seam < 0:
            raise InputError(f"seam= expects a whole number of voxels, at least 0, got {seam!r}")
        self.p, self.keep, self.targets, self.cover, self.seam = p, keep, targets, cover, seam
        self.leave_out, self.loss, self.logits, self.name, self.seed = leave_out, loss, logits, name, seed
        self.without_organs = without_organs
        self.context = RunContext(table, keys, adapter, names, "fill")
        self._wrapped: WrappedStep | None = None
        self._gate: LogitGate | None = None
        self._rules: Rules | None = None
        self._atlas: RegionAtlas | None = None
        self._known_atlas: dict[str, Any] = {}
        self._lenders = Lenders(organs=without_organs == "lend")
        self._shares: Tensor | None = None
        self._checked = False
        self._indices = False

    @property
    def state_key(self) -> str:
        """Two callbacks with different names keep different states."""
        return f"{type(self).__qualname__}[{self.name or ''}]"

    def state_dict(self) -> dict[str, Any]:
        """What the network was trained with: a model is not judged with the replacement that it has seen."""
        atlas = self._known_atlas if self._atlas is None else self._atlas.state()
        return {"replacement": "case", "seed": self.seed, "atlas": atlas}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the draws, and the usual regions, of the run that is resumed."""
        self.seed = state_dict.get("seed", self.seed)
        self._known_atlas = dict(state_dict.get("atlas", {}))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that the swap can work here."""
        if stage != "fit":
            return
        self._restore()
        self.context.setup(trainer)
        if not self.context.has_table:
            raise InputError("OutsideSwap needs an organ table: pass table=, or use a data module that has one")
        refuse_setup(trainer, pl_module, self.logits)
        self._atlas, self._known_atlas = None, {}
        self._gate = LogitGate(pl_module, self.logits)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Wrap `training_step` after all others have: they must see the batch that the network sees."""
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**31
        self._wrapped = WrappedStep(pl_module, "training_step", partial(self._step, trainer, pl_module))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the module its own `training_step` back."""
        self._restore()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """After an exception Lightning does not always tear down."""
        self._restore()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Lend nothing of the epoch before."""
        self._lenders.clear()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the shares of the epoch; usual regions stand from here on."""
        if self._atlas is not None:
            self._atlas.fix(partial(trainer.strategy.reduce, reduce_op="sum"), pl_module.device)
        if self._shares is None:
            return
        prefix = f"train/{self.name}" if self.name else "train"
        swapped, left_out, cases, pairs = over_processes(self._shares, self._shares[:0])[0]
        self._shares = None
        figures = {
            f"{prefix}/{key}": value for key, value in zip(SHARES, (swapped / cases, left_out / pairs), strict=True)
        }
        refuse_taken(trainer, list(figures))
        for key, value in figures.items():
            pl_module.log(key, value, batch_size=1, sync_dist=True)

    def _restore(self) -> None:
        if self._gate is not None:
            self._gate.stop()
            self._gate = None
        if self._wrapped is not None:
            self._wrapped.undo()
            self._wrapped = None
        self._rules, self._shares, self._checked = None, None, False
        self._lenders.clear()

    def _step(self, trainer: Any, pl_module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One training step on composites."""
        batch = batch_of(args, kwargs)
        words, label = self._read(trainer, pl_module, batch)
        made = self._composite(trainer, words)
        left_out = torch.zeros_like(label, dtype=torch.bool)
        if made is not None:
            args, kwargs = _replaced(args, kwargs, self._written(batch, made))
            label, left_out = made.cases.label, made.left_out
        self._count(made, label)
        factor = self._factor(label, left_out)
        with leaving_out(trainer, left_out):
            return original(*args, **kwargs) if factor is None else self._taught(original, args, kwargs, label, factor)

    def _read(self, trainer: Any, pl_module: Any, batch: Any) -> tuple[Batch, Tensor]:
        """The batch in camtrain's words, and its labels."""
        names = self.context.names
        outputs = len(names) if names is not None else self.context.expected(trainer, pl_module)
        words = read_batch(batch, self.context.keys, self.context.adapter, outputs)
        if words.image is None or words.label is None:
            lacks = "image" if words.image is None else "label"
            raise InputError(
                f"OutsideSwap needs the key {lacks!r} in the batch: name yours with keys={{{lacks!r}: ...}}"
            )
        if self._rules is None:
            self.context.resolve(trainer, pl_module, words.label.shape[1])
            self._rules = Rules(self.context.selected)
            if self.without_organs == "atlas":
                self._atlas = RegionAtlas(len(self._rules.rules))
                self._atlas.load(self._known_atlas, words.image.device)
            label = torch.as_tensor(self._words(batch)["label"])
            self._indices = refuse_truths(self._rules, label, self.keep, self.leave_out, self.without_organs)
        return words, words.label.to(words.image.device)

    def _words(self, batch: Any) -> dict[str, Any]:
        """The batch's own values by the contract's words, as far as it has them."""
        words = batch if self.context.adapter is None else self.context.adapter(batch)
        keys = {word: (self.context.keys or {}).get(word, word) for word in KEYS}
        return {word: words[key] for word, key in keys.items() if key in words}

    def _composite(self, trainer: Any, words: Batch) -> Composite | None:
        """The batch after the swap; None if nothing in it is swapped."""
        if words.organs is None:
            tell_once(trainer, "camtrain: OutsideSwap swaps no case of a batch without the key 'organs'")
        if words.organs is None or words.image is None or words.label is None or self._rules is None:
            return None
        device = words.image.device
        own = Cases(words.image, words.organs.to(device), words.label.to(device), words.has_organs.to(device))
        known = self.context.selected.needs_spacing and words.affine is not None
        cases, spacing = self._lenders.join(own, spacing_of(words.affine) if known else None)  # type: ignore[arg-type]
        regions = self._rules.regions(cases, spacing)
        if self._atlas is not None:
            self._atlas.add(regions, own.has_organs, tuple(own.image.shape[2:]))
            if self._atlas.known:
                regions.complete_with(self._atlas.region)
        rng = torch.Generator().manual_seed(self._draw(trainer))
        lend, count = cases if self.without_organs == "lend" else None, len(cases.image)
        plan = make_plan(self._rules, regions, own.label, count, self.p, self.keep, rng, self._indices, lend)
        if not bool(plan.swapped.any()):
            return None
        return compose(self._rules, regions, cases, plan, self.targets, self.seam, self.cover)

    def _draw(self, trainer: Any) -> int:
        """A seed that follows from the run's seed and the place in it alone."""
        place = (
            self.seed,
            self.name,
            trainer.current_epoch,
            trainer.fit_loop.epoch_loop.batch_idx,
            trainer.global_rank,
        )
        return zlib.crc32(repr(place).encode())

    def _written(self, batch: Any, made: Composite) -> Any:
        """The user's batch with what changed."""
        own, changed = self._words(batch), {"image": made.cases.image, "organs": made.cases.organs}
        if self.without_organs == "lend" and "has_organs" in own:
            changed["has_organs"] = made.cases.has_organs
        if "allowed_organs" in own:
            # Truths of a composite come from several cases: the table's rule holds, not what one report says.
            told = torch.as_tensor(own["allowed_organs"]).bool()
            changed["allowed_organs"] = told | made.swapped.to(told.device).view(-1, 1, 1)
        if not self._indices:
            label = made.cases.label
            changed["label"] = label.masked_fill(made.left_out, torch.nan) if self.leave_out == "nan" else label
            if not torch.as_tensor(own["label"]).is_floating_point():
                changed["label"] = changed["label"].nan_to_num(0)
        return written(batch, changed, self.context.keys, self.context.adapter)

    def _factor(self, label: Tensor, left_out: Tensor) -> Tensor | None:
        """(B, L), what the gradient of each logit is multiplied by; None = nothing is cut off."""
        if self.loss is None and self.leave_out == "nan":
            return None
        known = ~label.isnan()
        taught = known & ~left_out
        # Counted over all processes: one with a single taught pair would give it the weight of a whole batch.
        counts = torch.stack([known.sum(), taught.sum()]).float()
        counts, _, processes = over_processes(counts, counts[:0])
        if self.loss is None and bool(counts[0] == counts[1]):
            return None
        # A mean over all known pairs becomes the mean over those that are taught.
        share: Tensor = (counts[0] if self.loss is None else processes) / counts[1].clamp(min=1)
        return taught.float() * share

    def _taught(
        self,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        label: Tensor,
        factor: Tensor,
    ) -> Any:
        """The user's step, its gradient that of the truths which are known."""
        gate = self._gate
        assert gate is not None  # noqa: S101 - setup made it
        # With a loss of our own the module's teaches nothing.
        gate.start(factor if self.loss is None else torch.zeros_like(factor))
        try:
            output = original(*args, **kwargs)
            if output is None:
                return None
            if not gate.gated:
                raise InputError(
                    f"OutsideSwap found no logits {tuple(factor.shape)} in this step: say where they are with logits= "
                    "(the name of the module that gives them, or a callable)"
                )
            if self.loss is not None:
                return self._with_own_loss(output, gate.raw, label, factor)
            if not self._checked:
                refuse_mixing(loss_of(output), gate.gated, factor)
                self._checked = True
            return output
        finally:
            gate.stop()

    def _with_own_loss(self, output: Any, logits: list[Tensor], label: Tensor, weight: Tensor) -> Any:
        """The value stays the module's, the gradient is that of `loss`, the mean over all forwards of the step."""
        assert self.loss is not None  # noqa: S101
        # Unknown truths must not reach the callable: NaN times 0 is NaN in its gradient.
        taught = weight > 0
        known = label.masked_fill(~taught, 0.0)
        own = torch.zeros((), device=label.device)
        for each in logits:
            values = self.loss(each, known)
            if values.shape != label.shape:
                raise InputError(f"loss= must give one value per pair, {tuple(label.shape)}, got {tuple(values.shape)}")
            own = own + (weight * torch.where(taught, values, 0.0)).sum() / len(logits)
        loss = loss_of(output)
        total = loss + (own - own.detach()).to(loss.dtype)
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def _count(self, made: Composite | None, label: Tensor) -> None:
        count = torch.tensor([0, 0, len(label), label.numel()], device=label.device)
        if made is not None:
            count[0], count[1] = made.swapped.sum(), made.left_out.sum()
        # One sum, not a tensor per step: what is kept between the network's large ones keeps memory from being joined.
        self._shares = count if self._shares is None else self._shares + count


def _replaced(args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a step with another batch."""
    if args:
        return (batch, *args[1:]), kwargs
    key = "batch" if "batch" in kwargs else next(iter(kwargs))
    return args, {**kwargs, key: batch}


def _one_of(word: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{word}= expects {', '.join(known)}, got {value!r}{nearest(str(value), known)}")
