"""Forwards of a few fixed cases, when the alarms that need them are due."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from camtrain._batch import Batch
from camtrain._errors import InputError
from camtrain.callbacks._alarm_forwards import (
    depth_values,
    measure_depth,
    measure_pulls,
    stacks,
)
from camtrain.callbacks._alarm_rules import Depth, Reliance
from camtrain.callbacks._context import RunContext, tell_once
from camtrain.callbacks._fixed_cases import FixedCases
from camtrain.callbacks._memory import out_of_memory
from camtrain.callbacks._pulls import Pulls, Sums, pull_values
from camtrain.callbacks._scores import Score
from camtrain.callbacks.outside_swap import OutsideSwap
from camtrain.cam.asked import Asked
from camtrain.cam.engine import Reshape
from camtrain.cam.layer_table import SEEN_SHARE_LIMIT
from camtrain.cam.mid_layer import mid_layer
from camtrain.cam.question import WantedLayer
from camtrain.cam.rerun import Rerun
from camtrain.cam.watch import ModuleWatch
from camtrain.metrics import EnergyInside

_MIB = 2**20
OTHERS = ("blur", "mean", "air", "case")
"""What judges a network that was trained with the replacement asked for; `air` needs images in 0..1."""


class FixedQuestions:
    """The checks that need forwards of their own: chooses cases, asks the network about them when it is time.

    Args:
        rules: The alarms; those of other kinds are passed over.
        method: The monitor's first method.
        reshape: Makes (B, K, *S') of the tapped layer's output.
    """

    def __init__(self, rules: Sequence[Any], method: Asked, reshape: Reshape | None) -> None:
        self.reliance = next((rule for rule in rules if isinstance(rule, Reliance)), None)
        self.depth = next((rule for rule in rules if isinstance(rule, Depth)), None)
        self._method, self._reshape = method, reshape
        self._rerun: Rerun | None = None
        self._due: list[str] = []
        self._processes = 1
        self.setup()

    def setup(self) -> None:
        """A fit begins; a checkpoint that is loaded later says what was before."""
        self._checked: dict[str, int] = {}
        self._cases: FixedCases | None = None
        self._chosen: list[str] = []
        self._mid = None if self.depth is None else self.depth.layer
        self._off: dict[str, str] = {}
        self._answers: list[Sums] = []
        self.drop()

    def drop(self) -> None:
        """Let go of the network."""
        self._rerun, self._due = None, []
        self._pulls: Pulls | None = None
        self._before: dict[str, Tensor] = {}

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain values."""
        answers = [sums.plain() for sums in self._answers]
        return {"checked": dict(self._checked), "cases": list(self._chosen), "mid": self._mid, "answers": answers}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with an earlier run; its cases are fetched again in the next check."""
        self._checked = {name: int(epoch) for name, epoch in state.get("checked", {}).items()}
        self._chosen, self._cases = [str(name) for name in state.get("cases", [])], None
        self._mid = self._mid or state.get("mid")
        self._answers = [Sums.of(plain) for plain in state.get("answers", [])]

    def begin(self, trainer: Any) -> None:
        """Which checks with forwards of their own are due? The same on every process: it follows from the epoch."""
        self.drop()
        self._processes = max(1, int(trainer.world_size))
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        done = int(trainer.current_epoch) + 1
        for rule in (self.reliance, self.depth):
            # Once in every n epochs, counted from the end of each: an untrained network has nothing to be asked.
            if (
                rule is not None
                and done // rule.every_n_epochs > self._checked.get(rule.name, 0) // rule.every_n_epochs
            ):
                self._due.append(rule.name)

    @property
    def due(self) -> bool:
        """Is the network asked in this pass, so that steps must tell how?"""
        return bool(self._due)

    def collect(
        self,
        watch: ModuleWatch,
        words: Batch,
        logits: Tensor,
        label: Tensor,
        segmented: Tensor,
        cases: Sequence[str],
        dataloader_idx: int,
    ) -> None:
        """A batch of the pass: take its cases as far as they are wanted, and know how the network is called."""
        if not self._due or dataloader_idx or words.organs is None or all(name in self._off for name in self._due):
            return
        self._rerun = None
        with self._or_off(self._due):
            self._rerun = _divisible(watch, len(label), words.organs)
            if self._cases is None:
                self._cases = self._new_cases()
            image = self._rerun.call.image
            self._cases.offer(cases, image, words.organs, label, segmented, words.affine, words.allowed_organs)
            if "reliance" in self._due and "reliance" not in self._off:
                if self._pulls is None:
                    self._pulls = Pulls(label.shape[1]).to(logits.device)
                self._pulls.update(logits, label)
                # Their logits as they are come for nothing.
                wanted = {case.id for case in self._cases}
                self._before |= {name: logits[row] for row, name in enumerate(cases) if name in wanted}

    def _new_cases(self) -> FixedCases:
        """This process's share of the fixed cases."""
        rules = [rule for rule in (self.reliance, self.depth) if rule is not None]
        share = self._processes
        count = -(-max(rule.cases for rule in rules) // share)
        cases = FixedCases(max(2, count), max(rule.memory_mib for rule in rules) * _MIB // share)
        if self._chosen:
            cases.load(self._chosen)
        return cases

    @torch.no_grad()
    def measure(self, trainer: Any, context: RunContext, device: torch.device) -> list[Score]:
        """Ask the fixed cases what is due (all processes must call it together); in eval mode, without a trace."""
        if not self._due or not context.has_table or context.names is None:
            return []
        if self._cases is not None:
            self._cases.end()
        self._chosen = self._names(trainer)
        found: dict[str, dict[str, float]] = {}
        if self.reliance is not None and "reliance" in self._due:
            found |= self._ask_reliance(trainer, context, device)
        if self.depth is not None and "depth" in self._due:
            found |= self._ask_depth(trainer, context, device)
        self._checked |= dict.fromkeys(self._due, int(trainer.current_epoch) + 1)
        self.drop()
        return [score for measure, values in found.items() for score in _scores(measure, values)]

    def _names(self, trainer: Any) -> list[str]:
        """Of the cases of all processes: a checkpoint is one process's, and each must find its own share in it."""
        own = [] if self._cases is None else self._cases.state()
        shares = [trainer.strategy.broadcast(own, rank) for rank in range(self._processes)]
        return list(dict.fromkeys(name for share in shares for name in share))

    def _ask_reliance(self, trainer: Any, context: RunContext, device: torch.device) -> dict[str, dict[str, float]]:
        names, around = context.names or [], trainer.precision_plugin.val_step_context
        replacement, rule = self._judge(trainer), self.reliance
        pulls = Pulls(len(names)).to(device) if self._pulls is None else self._pulls
        if rule is not None and self._rerun is not None and self._cases is not None and "reliance" not in self._off:
            with self._or_off(["reliance"]):
                turn = (int(trainer.current_epoch) + 1) // rule.every_n_epochs - 1
                measure_pulls(self._rerun, self._cases, context.selected, replacement, rule.margin, turn, self._before,
                              pulls, around)  # fmt: skip
        # Every process counts together, also one that has nothing: what it skips here would leave the others waiting.
        self._answers = [*self._answers, pulls.joined()][-(1 if rule is None else rule.window) :]
        return pull_values(self._answers, names)

    def _judge(self, trainer: Any) -> str:
        """The replacement, if the network was not trained with it."""
        wanted = "case" if self.reliance is None else self.reliance.replacement
        swaps = [c for c in trainer.callbacks if any(kind.__name__ == OutsideSwap.__name__ for kind in type(c).__mro__)]
        trained = {str(swap.state_dict().get("replacement", "case")) for swap in swaps}
        left = next(word for word in (wanted, *OTHERS) if word not in trained)
        if left != wanted:
            tell_once(
                trainer,
                f"camtrain: alarm 'reliance' judges with {left}, since OutsideSwap trains the network with "
                f"{', '.join(sorted(trained))}",
            )
        return left

    def _ask_depth(self, trainer: Any, context: RunContext, device: torch.device) -> dict[str, dict[str, float]]:
        names, around = context.names or [], trainer.precision_plugin.val_step_context
        metrics = {key: EnergyInside(len(names), "none").to(device) for key in ("last", "mid")}
        mid, rule = self._find_mid(trainer), self.depth
        off = "depth" in self._off
        if rule is not None and mid is not None and self._rerun is not None and self._cases is not None and not off:
            with self._or_off(["depth"]):
                for stack in stacks(self._cases, context.selected, self._rerun.call.image):
                    measure_depth(self._rerun, stack, context.selected, self._method, mid, rule.method, context.mode,
                                  self._reshape, metrics, around)  # fmt: skip
        return depth_values(metrics, names)

    def _find_mid(self, trainer: Any) -> WantedLayer | None:
        """The mid layer by rank zero's choice, so that all processes look at the same one."""
        told = self._mid
        limit = SEEN_SHARE_LIMIT if self.depth is None else self.depth.seen
        if told is None and self._rerun is not None and "depth" not in self._off and trainer.is_global_zero:
            with self._or_off(["depth"]):
                told = mid_layer(self._rerun, limit=limit).name
                tell_once(trainer, f"camtrain: alarm 'depth' compares with the layer {told!r}")
        self._mid = trainer.strategy.broadcast(told)
        if self._mid is None or self._rerun is None:
            return None
        found: list[WantedLayer] = []
        with self._or_off(["depth"]):
            found.append(mid_layer(self._rerun, self._mid))
        return found[0] if found else None

    @contextmanager
    def _or_off(self, names: Sequence[str]) -> Iterator[None]:
        """Told once: an alarm that cannot work, or for which memory ends, must not end a training that does."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, InputError) and not out_of_memory(error):
                raise
            reason = str(error)
        else:
            return
        for name in names:
            if name not in self._off:
                self._off[name] = reason
                rank_zero_info(f"camtrain: alarm {name!r} is off in this run: {reason}")
        if all(rule is None or rule.name in self._off for rule in (self.reliance, self.depth)):
            self._cases, self._before = None, {}  # up to a gigabyte that nobody asks for any more


def _divisible(watch: ModuleWatch, count: int, organs: Tensor) -> Rerun:
    """How to run the network again on other images.

    Raises:
        InputError: It cannot be, or was not called with one image for each of the organs.
    """
    rerun = watch.rerun()
    image = rerun.call.image
    if len(image) != count or image.shape[2:] != organs.shape[2:]:
        raise InputError(
            f"the network was called with images {tuple(image.shape)} for organs {tuple(organs.shape)}: what lies "
            "outside them cannot be told"
        )
    return rerun.on(image)


def _scores(measure: str, values: Mapping[str, float]) -> list[Score]:
    if measure.endswith("_chance") or not values:
        mean: list[Score] = []
    else:
        mean = [Score(measure, None, None, sum(values.values()) / len(values))]
    return [*mean, *(Score(measure, None, label, value) for label, value in values.items())]
