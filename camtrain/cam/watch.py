"""Watch a user's module from outside: what the layer gave, and the logits that came of it, in the user's own forward.

The callbacks use this on LightningModules they know nothing about. Hooks sit on the tapped layers and on every module
around them; the logits are the output of the smallest module around all the layers that gives a tensor (B, L).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from camtrain._errors import InputError
from camtrain.cam.call import Call
from camtrain.cam.capture import LayerCapture, eager, last_run, level, recomputing
from camtrain.cam.layer_lookup import LayerSpec, around, find_layer, plain_name, untouched
from camtrain.cam.logits import PickLogits, find_logits, pick_logits
from camtrain.cam.question import WantedLayer
from camtrain.cam.recordable import recordable
from camtrain.cam.rerun import Rerun
from camtrain.cam.several import Layers, find_layers, key_of, listed, unreached
from camtrain.cam.tap import chosen_call
from camtrain.cam.user_modes import USER_MODES

LogitsFrom = str | PickLogits | None


@dataclass(frozen=True)
class _Entered:
    """One call of the user's network: module, arguments, and how often each layer had run before in this step."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    before: tuple[int, ...]


class ModuleWatch:
    """Hooks on layers and the modules around them.

    Args:
        model: The outer module (a LightningModule).
        layer: Dotted name or module, or a list of them: all are captured in the one forward.
        logits: Callable that picks (B, L) from the output of the outermost module around the layers; or the dotted name
            of the module whose output they are (a head beside the backbone); None = found as described above, around
            all layers.
        call: Which call of the layers counts, where one step runs them several times.
        cut: Validation: gradients exist only from the first of the layers to the logits, and what the user's code gets
            back is detached. Where the user's code has switched gradients on by itself, they are left alone. Off in
            training.
        found: For each layer, was it found for `layer=None`? Nobody named it then, so nobody can say which call counts:
            where the step enters the network once, it is the last, as in `LayerTap` (EfficientNet's last activation is
            a module that runs three times in a block). Two entries, as of two views, stay a question.

    Raises:
        InputError: No such layer, or one listed twice.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: LayerSpec | Layers,
        logits: LogitsFrom = None,
        call: int | None = None,
        cut: bool = False,
        found: Sequence[bool] | None = None,
    ) -> None:
        self.model = model
        wanted = listed(layer)
        self._found = [False] * len(wanted) if found is None else list(found)
        looked_up = find_layers(model, wanted)
        self.names = [name for name, _ in looked_up]
        self.keys = [key_of(one, name) for one, name in zip(wanted, self.names, strict=True)]
        self._layers = [module for _, module in looked_up]
        self.call = call
        self.cut = cut
        self._pick = None if isinstance(logits, str) else logits
        modules = dict(model.named_modules(remove_duplicate=False))
        chains = [{id(modules[n]): modules[n] for n in around(name)} for name in self.names]
        # Logits depend on all layers, so they come out of a module around all; but the step may enter at any.
        self._around = [m for i, m in chains[0].items() if all(i in chain for chain in chains)]
        self._head = find_layer(model, logits)[1] if isinstance(logits, str) else None
        # It may also call a layer itself, and then the head.
        called = [*self._layers, *(m for chain in chains for m in chain.values()), self._head]
        self._bracketed = list({id(m): m for m in called if m is not None}.values())
        # Of a layer that was found only the last run counts, and the forward that found it saw which that is.
        last = call in (None, -1)
        begins = [last_run(m) if last and at else 0 for m, at in zip(self._layers, self._found, strict=True)]
        self._captures = [LayerCapture(n, cut, begin) for n, begin in zip(self.names, begins, strict=True)]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._outputs: list[tuple[nn.Module, Any]] = []
        self._open: list[nn.Module] = []
        self._entered: list[_Entered] = []
        self._giver: nn.Module | None = None
        self._holds_modes = False
        self._first = True
        self.graph = True
        self._level = 0
        # The modules whose hooks see the logits, as the last step with a graph told, and were there as many logits as
        # runs of a layer? In EfficientNet-B0 hooks on these alone take 0.6 of the time of all.
        self._enough: list[nn.Module] = []
        self._alone = self._paired = False

    @property
    def name(self) -> str:
        """Dotted name of the first layer."""
        return self.names[0]

    @property
    def entry(self) -> nn.Module | None:
        """The module that the step called last."""
        return self._entered[-1].module if self._entered else None

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What it was called with."""
        return (self._entered[-1].args, self._entered[-1].kwargs) if self._entered else None

    @property
    def inside(self) -> bool:
        """Has an exception left the step in the middle of the network, which has given nothing yet?"""
        made = [output for module, output in self._outputs if module is self.entry]
        return len(self._entered) == 1 and all(output is None for output in made)

    def start(self, graph: bool = True, again: bool = True) -> None:
        """Attach the hooks. Calling it twice is calling it once.

        Args:
            graph: Of a cut watch: are there maps to be made of this step? Without, only the logits are taken.
            again: May `rerun` be asked of a step without a graph? If not, fewer hooks do.
        """
        if self._handles:
            return
        self.graph = graph or not self.cut
        self._alone = not (self.graph or again) and bool(self._enough)
        if not self._alone:
            for capture, layer in zip(self._captures, self._layers, strict=True):
                capture.attach(layer, idle=not self.graph)
        for module in self._enough if self._alone else self._bracketed:
            self._handles.append(module.register_forward_pre_hook(eager(self._enter), with_kwargs=True))
            self._handles.append(module.register_forward_hook(eager(self._leave), always_call=True))

    def stop(self) -> None:
        """Remove every hook and restore the grad mode, also after an exception in the middle of a forward."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for capture in self._captures:
            capture.detach()
        self._restore()
        self.forget()

    def forget(self) -> None:
        """Drop what the last step left (graphs are memory)."""
        for capture in self._captures:
            capture.outputs.clear()
        self._outputs.clear()
        self._open.clear()
        self._entered.clear()
        self._giver = None

    def take(self, outputs: int | None = None, prefer: int | None = None) -> tuple[Tensor, Tensor]:
        """What the last step gave, of the one layer (of several: the first).

        Arguments, result and errors as in `take_all`.
        """
        sources, logits = self.take_all(outputs, prefer)
        return next(iter(sources.values())), logits

    def take_all(self, outputs: int | None = None, prefer: int | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """What the last step gave.

        Args:
            outputs: L, where it is known (the number of label names).
            prefer: L that is expected but not sure: a module around the layers that gives so many is taken before a
                smaller one that gives another number (pooled features).

        Returns:
            The layers' outputs, by name as it was written, and the logits (B, L). Of a step without a graph the outputs
            are empty, or left out.

        Raises:
            InputError: A layer did not run or ran several times, no module around all of them gives logits, or the
                logits do not depend on one of several layers.
        """
        self._restore()
        if self.graph:
            self._ask_again()
        sources = {
            key: chosen_call(capture.outputs, call, plain_name(capture.name))
            for key, capture, call in zip(self.keys, self._captures, self._calls(), strict=True)
            if not (self._alone and self._outputs)
        }
        # Views made under no_grad or inference mode would lose the graph.
        with torch.inference_mode(False), torch.enable_grad():
            logits = self._logits(next(iter(sources.values()), None), outputs, prefer if outputs is None else outputs)
        if not self.graph:
            return sources, logits
        self._enough = self._that_suffice()
        if len(sources) > 1:
            _refuse_other_branches(sources, logits)
        if self._first and self.cut and self.call == -1 and len(self._entered) == 1 and self._can_ask():
            for capture in self._captures:  # the next step need not record the way to the last run, which counts
                capture.begin = len(capture.outputs) - 1
        self._first = False
        return sources, logits

    def _that_suffice(self) -> list[nn.Module]:
        """The giver and the modules around it, where the step called one of these and no layer is needed to tell B."""
        if self._giver is None or self._head is not None or self._pick is not None:
            return []
        outer, entered = self._around[self._around.index(self._giver) :], [each.module for each in self._entered]
        self._paired = self._as_often_as_layers(self._giver)
        told = find_logits(self._given(self._giver)) is not None
        return outer if told and entered and all(module in outer for module in entered) else []

    def _can_ask(self) -> bool:
        """Are the layers and the head inside the module that the step called last, so that it can run once more?"""
        return {*self._layers, self._head} - {None} <= set(self._entered[-1].module.modules())

    def rerun(self) -> Rerun:
        """How to run again what the last `take_all` was taken of.

        Raises:
            InputError: The step called parts of the network, or without an image.
        """
        counts = [len(capture.outputs) for capture in self._captures]
        calls = [None if call is None else call % count for call, count in zip(self._calls(), counts, strict=True)]
        made = [entered for entered in self._entered if entered.before[0] <= (calls[0] or 0)]
        call = Call.of(made[-1].module, recordable(made[-1].args), recordable(made[-1].kwargs))
        if call is None:
            raise InputError("the network was called without an image (B, C, *S): methods with forwards need one")
        own = [None if at is None else at - before for at, before in zip(calls, made[-1].before, strict=True)]
        layers = zip(self.keys, self.names, self._layers, own, strict=True)
        wanted = tuple(WantedLayer(key, plain_name(name), module, at) for key, name, module, at in layers)
        giver_call = -1 if own[0] is None or not self._as_often_as_layers(self._giver) else own[0]
        return Rerun(call, wanted, self._giver or call.entry, giver_call, self._pick)

    def _calls(self) -> list[int | None]:
        """Which call of each layer counts; None = there is to be one."""
        last = -1 if self.call is None and len(self._entered) == 1 else self.call
        return [last if found else self.call for found in self._found]

    def _ask_again(self) -> None:
        """Where a layer ran less often than in an earlier forward, no graph began: the network runs once more.

        From then on the graph begins at the first run. Other watches of the step see nothing of it.
        """
        if not any(
            self.cut and call == -1 and 0 < len(capture.outputs) <= capture.begin
            for capture, call in zip(self._captures, self._calls(), strict=True)
        ):
            return
        entered = self._entered[-1]
        if not self._can_ask():
            ran = ", ".join(f"{plain_name(c.name)!r} {len(c.outputs)} x" for c in self._captures)
            raise InputError(
                f"the layer ran less often in this step than before or than when it was found ({ran}), and the step "
                "calls the parts of the network one after another: name a layer that runs once, or call= from the front"
            )
        self.forget()
        tensors = [leaf for leaf in tree_leaves((entered.args, entered.kwargs)) if isinstance(leaf, Tensor)]
        with untouched(entered.module, {tensor.device for tensor in tensors}), torch.no_grad():
            for capture in self._captures:
                capture.begin = 0
            self._listen(level())
            try:
                entered.module(*entered.args, **entered.kwargs)
            finally:
                self._listen(0)
                self._restore()

    def _listen(self, to: int) -> None:
        self._level = to
        for capture in self._captures:
            capture.level = to

    def _logits(self, source: Tensor | None, outputs: int | None, wanted: int | None) -> Tensor:
        batch = None if source is None else self._batch(source)
        if self._head is not None or self._pick is not None:
            ran = self._head if self._head is not None else self._outermost()
            given = None if ran is None else self._given(ran)
            found = None if given is None else pick_logits(given, self._pick, batch)
        else:
            ran, found = self._smallest(batch, wanted)
        if found is None:
            raise InputError(self._no_logits())
        if outputs is not None and found.shape[1] != outputs:
            raise InputError(
                f"there are {outputs} labels, but the logits found for {self._which()} have the shape "
                f"{tuple(found.shape)}: set the network's number of outputs to the number of labels, or say where the "
                "logits are with logits= (a module's name such as 'head', or a callable)"
            )
        self._giver = ran
        return found

    def _smallest(self, batch: int | None, wanted: int | None) -> tuple[nn.Module | None, Tensor | None]:
        """Logits of the smallest module around the layers that gives (B, L); of the wanted width, if one does."""
        each = [(module, find_logits(self._given(module), batch)) for module in self._around]
        found = [(module, logits) for module, logits in each if logits is not None]
        fitting = [(module, logits) for module, logits in found if logits.shape[1] == wanted]
        return next(iter(fitting or found), (None, None))

    def _batch(self, source: Tensor) -> int:
        """B: the layer itself may work on slices, (B * N, K, *S)."""
        alone = len(self._captures[0].outputs) == 1
        last = self._entered[-1] if alone and self._entered else None
        call = None if last is None else Call.of(last.module, last.args, last.kwargs, integer=True)
        return len(call.given if call is not None and call.direct else source)

    def _given(self, module: nn.Module) -> Any:
        """What a module gave in the run that counts; None if it did not run."""
        own = [out for m, out in self._outputs if m is module]
        return own[(self.call or 0) % len(own) if self._as_often_as_layers(module) else -1] if own else None

    def _as_often_as_layers(self, module: nn.Module | None) -> bool:
        if self._alone:
            return self._paired
        count = sum(m is module for m, _ in self._outputs)
        return any(len(capture.outputs) == count for capture in self._captures)

    def _outermost(self) -> nn.Module | None:
        ran = {id(module) for module, _ in self._outputs}
        return next((module for module in reversed(self._around) if id(module) in ran), None)

    def _which(self) -> str:
        names = ", ".join(repr(plain_name(name)) for name in self.names)
        return f"layer {names}" if len(self.names) == 1 else f"the layers {names}"

    def _no_logits(self) -> str:
        if self._head is not None:
            return "the module that logits= names did not run in this step: name the module that gives the logits"
        return (
            f"no module around {self._which()} gives logits (B, L): if they are made in the step "
            "itself or by a module beside the backbone, say so with logits='name.of.the.head' or logits=callable"
        )

    # What the hooks do ------------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if recomputing() or level() != self._level:
            return None
        first = not self._open
        self._open.append(module)
        if first and module is not self._head:
            before = tuple(len(capture.outputs) for capture in self._captures)
            self._entered.append(_Entered(module, args, kwargs, before))
        if not (self.cut and first):
            return None
        if not self._holds_modes and (torch.is_inference_mode_enabled() or not torch.is_grad_enabled()):
            self._holds_modes = True
            USER_MODES.leave()
        return recordable(args), recordable(kwargs)

    def _leave(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        if recomputing() or level() != self._level or module not in self._open:
            return None
        while self._open and self._open.pop() is not module:
            pass
        self._outputs.append((module, output))
        if self._open:
            return None
        # What the user does to the logits in place (a sigmoid) must not reach those that were watched.
        if not self._holds_modes:
            return tree_map(_copied, output)
        if self._head is not None and module is not self._head and self._head not in set(module.modules()):
            return None  # The head is yet to come; gradients must last until then.
        # Another watch of the same forward has yet to see the output with its graph; the last one detaches.
        return tree_map(_detached, output) if self._restore() else None

    def _restore(self) -> bool:
        if not self._holds_modes:
            return False
        self._holds_modes = False
        return USER_MODES.give_back()


def _refuse_other_branches(sources: dict[str, Tensor], logits: Tensor) -> None:
    for key in unreached(sources, [logits]):
        raise InputError(
            f"the logits do not depend on layer {key!r}: it lies in another branch, or behind detach or torch.no_grad; "
            "leave it out of layer=, or give it a callback of its own with logits="
        )


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.ndim <= 2 else value


def _detached(value: Any) -> Any:
    return _copied(value).detach() if isinstance(value, Tensor) else value
