"""LRP woven into a forward: hooks that leave every value as it is and change what the backward pass means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from camtrain._errors import InputError, nearest
from camtrain.cam.capture import eager, level, recomputing
from camtrain.cam.lrp_modules import Gates, Kind, find_gates, kind_of, take_apart
from camtrain.cam.lrp_rules import AlphaBeta, Box, Epsilon, Gamma, Rule, ZPlus, full, identity, surrogate

_PLAIN = Epsilon(0.0)


@dataclass(frozen=True)
class Rules:
    """Which rule for which kind of layer.

    Attributes:
        conv: Convolutions.
        dense: Linear layers.
        first: The layer that sees the image; None: as its kind.
        norm: Normalisations pass relevance as it is, or follow their gradient (their bias then takes a share).
        activation: The same for elementwise activations other than ReLU.
        product: What one activation does to another by multiplication: `gate` holds gates (squeeze-and-excitation)
            constant and refuses attention, `gradient` follows the gradient through both factors.

    Example:
        >>> Rules(conv=ZPlus(), dense=Epsilon(), first=Box(-1, 1)).norm
        'identity'
    """

    conv: Rule
    dense: Rule
    first: Rule | None = None
    norm: Literal["identity", "gradient"] = "identity"
    activation: Literal["identity", "gradient"] = "identity"
    product: Literal["gate", "gradient"] = "gate"

    def __post_init__(self) -> None:
        """Check.

        Raises:
            InputError: A word that is not known, or something else than a rule.
        """
        known = {
            "norm": ("identity", "gradient"),
            "activation": ("identity", "gradient"),
            "product": ("gate", "gradient"),
        }
        for field, words in known.items():
            if getattr(self, field) not in words:
                raise InputError(f"Rules({field}=) expects {' or '.join(words)}, got {getattr(self, field)!r}")
        for field in ("conv", "dense", "first"):
            rule = getattr(self, field)
            if not callable(rule) and not (field == "first" and rule is None):
                raise InputError(
                    f"Rules({field}=) expects a rule such as ZPlus() of camtrain.cam.lrp_rules, got {rule!r}"
                )


PRESETS: dict[str, Rules] = {
    "zplus": Rules(conv=ZPlus(), dense=ZPlus()),
    "lrp0": Rules(conv=_PLAIN, dense=_PLAIN, norm="gradient", activation="gradient", product="gradient"),
    # Passing normalisations by would leave denominators near zero layer after layer: relevance then overflows.
    "epsilon": Rules(conv=Epsilon(), dense=Epsilon(), norm="gradient"),
    "epsilon-plus": Rules(conv=ZPlus(), dense=Epsilon()),
    "alpha2beta1": Rules(conv=AlphaBeta(2.0, 1.0), dense=Epsilon()),
    "gamma": Rules(conv=Gamma(), dense=Gamma()),
}


def find_rules(rules: str | Rules, box: tuple[float, float] | None = None) -> Rules:
    """Rules by name.

    Args:
        rules: A name of `PRESETS`, or rules of your own.
        box: (low, high) of the image's intensities: the first layer then follows the zB rule.

    Raises:
        InputError: Unknown preset, or bounds out of order.

    Example:
        >>> find_rules("epsilon-plus", box=(-1, 1)).first
        Box(low=-1.0, high=1.0)
    """
    if isinstance(rules, str):
        if rules not in PRESETS:
            raise InputError(f"rules= expects a preset or Rules, got {rules!r}{nearest(rules, PRESETS)}")
        rules = PRESETS[rules]
    if not isinstance(rules, Rules):
        raise InputError(f"rules= expects one of {', '.join(PRESETS)} or Rules, got a {type(rules).__name__}")
    if box is None:
        return rules
    try:
        low, high = (float(bound) for bound in box)
    except (TypeError, ValueError):
        raise InputError(f"box= expects the two bounds (low, high) of the image's intensities, got {box!r}") from None
    return replace(rules, first=Box(low, high))


@contextmanager
def lrp_hooks(model: nn.Module, rules: Rules, gates: Gates = None, image: Tensor | None = None) -> Iterator[LRPHooks]:
    """While this is open, the gradient of the model's forwards is LRP.

    Relevance at a tensor A on the way is `safe(A) * grad`, where the backward pass starts with `start / safe(logits)`.
    No value changes. Rules act where a graph is recorded, so a graph that begins at a layer costs nothing below it.
    Keep the context open during the backward pass if the model recomputes parts of itself (gradient checkpointing).

    Args:
        model: Any module, in eval mode.
        rules: From `find_rules`.
        gates: More modules whose output only scales others, see `find_gates`.
        image: What the layer with `rules.first` reads, where this is not an argument of the model. Known by its
            memory; if no layer reads it directly, `first` is the first convolution or linear layer to run.

    Yields:
        The hooks, with the names of layers that have no rule.

    Raises:
        InputError: An unknown gate; in the forward: a module without a rule (attention, recurrence), or an image
            outside the box.

    Example:
        >>> from camtrain.cam.lrp_rules import safe
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6, 3))
        >>> image = torch.rand(2, 1, 8, requires_grad=True)
        >>> with lrp_hooks(model, find_rules("zplus")):
        ...     logits = model(image)
        >>> start = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
        >>> relevance = safe(image) * torch.autograd.grad(logits, image, start / safe(logits))[0]
        >>> bool(torch.allclose(relevance.sum(dim=(1, 2)), torch.ones(2)))
        True
    """
    hooks = LRPHooks(model, rules, gates, image)
    try:
        hooks.attach()
        yield hooks
    finally:
        hooks.detach()


class LRPHooks:
    """The hooks of one model; made by `lrp_hooks`.

    Attributes:
        unruled: Names of layers that ran without a rule of their own: relevance need not be conserved there.
    """

    def __init__(self, model: nn.Module, rules: Rules, gates: Gates = None, image: Tensor | None = None) -> None:
        self.unruled: list[str] = []
        self._model = model
        self._rules = rules
        self._gates = find_gates(model, gates, usual=rules.product == "gate")
        self._image = image
        self._names = {module: name or type(model).__name__ for name, module in model.named_modules()}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._level = 0
        self._begin_forward(set())

    def attach(self) -> None:
        """Put a hook on every module that needs one."""
        self._level = level()
        self._before(self._model, self._begin)
        for module, name in self._names.items():
            if module in self._gates:
                self._before(module, self._enter_gate)
                self._after(module, self._leave_gate, always=True)
            elif ".parametrizations." not in f".{name}.":
                self._attach_rule(module, kind_of(module))

    def detach(self) -> None:
        """Take all hooks off, in whatever state the forward was left."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._begin_forward(set())

    def _attach_rule(self, module: nn.Module, kind: Kind) -> None:
        rules = self._rules
        gate = rules.product == "gate"
        if kind in ("conv", "dense"):
            self._after(module, self._affine)
        elif (kind == "norm" and rules.norm == "identity") or (kind == "activation" and rules.activation == "identity"):
            if getattr(module, "inplace", False):
                self._before(module, self._keep)
            self._after(module, self._identity)
        elif kind == "sigmoid" and gate:
            self._after(module, self._sigmoid)
        elif kind in ("refused", "softmax") and gate:
            self._before(module, self._refuse)
        elif kind == "unruled" and gate:
            self._after(module, self._note)

    def _before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_pre_hook(eager(hook), with_kwargs=True))

    def _after(self, module: nn.Module, hook: Callable[..., Any], always: bool = False) -> None:
        # In front of other hooks: a tap on the same layer must see, and hand on, what the rule made of the output.
        handle = module.register_forward_hook(eager(hook), prepend=True, with_kwargs=True, always_call=always)
        self._handles.append(handle)

    def _begin_forward(self, images: set[int]) -> None:
        self._images = images
        self._first: nn.Module | None = None
        self._kept: dict[nn.Module, list[Tensor]] = {}
        self._gate_depth = 0

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if level() == self._level and not recomputing():
            given = _tensors((args, kwargs, self._image))
            self._begin_forward({t.untyped_storage().data_ptr() for t in given if t.is_floating_point()})

    def _applies(self) -> bool:
        return level() == self._level and self._gate_depth == 0

    def _records(self, *tensors: Any) -> bool:
        """Is a graph recorded here, for a rule to be written into?"""
        floating = (isinstance(t, Tensor) and t.is_floating_point() for t in tensors)
        return self._applies() and torch.is_grad_enabled() and all(floating) and bool(tensors[0].requires_grad)

    def _affine(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Tensor | None:
        x = _input(args, kwargs)
        rule = self._rule(module, x)
        if not self._records(x, y) or rule == _PLAIN:
            return None
        with torch.autocast(device_type=y.device.type, enabled=False):
            layer = take_apart(module, x, y)
            if layer is None:
                self._unruled(module)
                return None
            return surrogate(y, rule(full(x), full(y.detach()), layer))

    def _rule(self, module: nn.Module, x: Any) -> Rule:
        usual = self._rules.dense if isinstance(module, nn.Linear) else self._rules.conv
        return self._rules.first or usual if self._sees_image(module, x) else usual

    def _sees_image(self, module: nn.Module, x: Any) -> bool:
        if not self._applies() or not isinstance(x, Tensor):
            return False
        if recomputing():
            first = module is self._first
        else:
            first = self._first is None
            self._first = self._first or module
        return first or x.untyped_storage().data_ptr() in self._images

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _input(args, kwargs)
        if self._records(x):
            self._kept.setdefault(module, []).append(x.clone())

    def _identity(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Tensor | None:
        x = _input(args, kwargs)
        kept = self._kept.get(module)
        before = kept.pop() if kept else x
        if not self._records(before, y):
            return None
        if before.shape != y.shape:
            self._unruled(module)
            return None
        with torch.autocast(device_type=y.device.type, enabled=False):
            passed = surrogate(y, identity(full(before), full(y.detach())))
        if kept is None or y.data_ptr() != x.data_ptr() or y._is_view():
            return passed
        # After an in-place layer others may go on with its input, which now is its output.
        rewritten: Tensor = y.detach_().copy_(passed)
        return rewritten

    def _sigmoid(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Tensor | None:
        if self._records(_input(args, kwargs), y) and y.ndim >= 3:
            detached: Tensor = y.detach()
            return detached
        # Of (B, K) it cannot be told here whether it will scale something: `graph_rules` sees that afterwards.
        return None

    def _enter_gate(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if level() == self._level:
            self._gate_depth += 1

    def _leave_gate(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        if level() != self._level:
            return None
        self._gate_depth = max(self._gate_depth - 1, 0)
        return _detached(y) if self._gate_depth == 0 and torch.is_grad_enabled() else None

    def _refuse(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [t for t in _tensors((args, kwargs)) if self._records(t)]
        if not given:
            return
        if kind_of(module) == "softmax" and given[0].ndim < 3:
            self._unruled(module)
            return
        raise InputError(
            f"LRP has no rule for {self._names[module]!r} ({type(module).__name__}): use a method of the gradient "
            "family such as 'hirescam'; or, if its output only scales other features, name it in gates="
        )

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        if any(self._records(t) for t in _tensors((args, kwargs))):
            self._unruled(module)

    def _unruled(self, module: nn.Module) -> None:
        if self._names[module] not in self.unruled:
            self.unruled.append(self._names[module])


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a layer with one input was called with."""
    return next(iter((*args, *kwargs.values())), None)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments, packed sequences included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _detached(value: Any) -> Any:
    """The same nested value with constants for tensors."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        each = [_detached(one) for one in value]
        return type(value)(*each) if hasattr(value, "_fields") else type(value)(each)
    return value
