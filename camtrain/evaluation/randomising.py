"""Cascading randomisation: copies of a model whose weights are drawn anew, module by module, from the head on.

Adebayo et al. (2018, arXiv:1810.03292, section 3): a map that survives the loss of the weights that it is said to
explain does not explain them. The user's model is only read.
"""

from __future__ import annotations

import copy
import inspect
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from camtrain._errors import InputError
from camtrain.cam.explaining import checked_image, checked_model
from camtrain.cam.layer_lookup import plain_name
from camtrain.cam.question import asking


@dataclass(frozen=True)
class Part:
    """A module with weights of its own, and which of them belong to its stage.

    Attributes:
        name: Dotted name; "" is the model itself.
        weights: Name in `state_dict` -> number of values. A weight that several modules use is in one part only.
    """

    name: str
    weights: dict[str, int]


@dataclass(frozen=True)
class Stage:
    """A copy of the model, some of whose weights were drawn anew.

    Attributes:
        number: How many modules have lost their weights; with `independent=True` the place of the one that has.
        module: The last of them, by its dotted name; "" at stage 0.
        share: Part of the values of all used weights that were drawn anew.
        model: The copy; each stage has its own.
    """

    number: int
    module: str
    share: float
    model: nn.Module


def cascade(model: nn.Module, image: Tensor, *, independent: bool = False, seed: int = 0) -> Iterator[Stage]:
    """Copies of a model with more and more of its modules randomised, from the head to the first layer.

    Args:
        model: Any module that can be called with the image alone; it is left as it was.
        image: (B, C, *S): one sample is run once, to see in which order modules use their weights.
        independent: Randomise one module at a time and keep all others.
        seed: Of a generator of its own. One seed gives one module the same weights in both modes and in every stage.

    Yields:
        Stage 1 (the head), 2, ... to the first layer.

    Raises:
        InputError: The model cannot be copied or run, or no weight takes part in its output.

    Example:
        >>> model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
        >>> [(stage.number, stage.module, stage.share) for stage in cascade(model, torch.rand(1, 1, 6))]
        [(1, '3', 0.7714285714285715), (2, '0', 1.0)]
    """
    whole = Cascade(model, image, independent=independent, seed=seed)
    return (whole.stage(number) for number in range(1, len(whole) + 1))


class Cascade:
    """The stages of `cascade` by number, made when asked for; arguments as there.

    How a module is drawn: by its own `reset_parameters()`, as all of torch's layers have it, and where it has none, or
    where that does not reach its weights, from a normal distribution with the mean and the standard deviation that each
    tensor has. BatchNorm's factors so become 1 and its shifts 0. Its running statistics are no weights and are kept: a
    stage then differs from the one before by one module only, and no stage depends on the batch that is explained.

    Attributes:
        parts: Modules with weights, in the order of the stages.
    """

    def __init__(self, model: nn.Module, image: Tensor, *, independent: bool = False, seed: int = 0) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InputError(f"seed= expects a whole number from 0 on, got {seed!r}")
        self._model = checked_model(model)
        self._image = checked_image(image[:1], model)
        self._independent = independent
        self._seed = seed
        self._drawn: dict[str, dict[str, Tensor]] = {}
        self.parts: list[Part] = _parts(model, _uses(copied(model), self._image))
        if not self.parts:
            raise InputError(f"{type(model).__name__} has no weights that its output depends on: nothing to randomise")
        self._total = sum(sum(part.weights.values()) for part in self.parts)

    def __len__(self) -> int:
        """Number of stages."""
        return len(self.parts)

    def stage(self, number: int) -> Stage:
        """One stage.

        Args:
            number: 1 (the head) to `len(self)`; 0 is the copy with all its weights.

        Raises:
            InputError: No such stage.
        """
        if not 0 <= number <= len(self):
            raise InputError(f"expected a stage from 0 to {len(self)}, got {number}")
        lost = self.parts[max(0, number - 1) : number] if self._independent else self.parts[:number]
        model = copied(self._model)
        state = _values(model)
        with torch.no_grad():
            for part in lost:
                for name, value in self._weights(part).items():
                    state[name].copy_(value)
        share = sum(sum(part.weights.values()) for part in lost) / self._total
        return Stage(number, plain_name(lost[-1].name) if lost else "", share, model)

    def _weights(self, part: Part) -> dict[str, Tensor]:
        """New values of a part's weights, on the CPU; always the same ones."""
        if part.name not in self._drawn:
            self._drawn[part.name] = _redrawn(self._model, part, self._seed)
        return self._drawn[part.name]


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a model; a Trainer that it is attached to stays outside.

    Raises:
        InputError: The model holds something that cannot be copied.
    """
    # What hangs on the model but is none of its weights: copying a Trainer would copy loaders and loggers.
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name in ("_trainer", "_fabric"):
            if (owner := module.__dict__.get(name)) is not None:
                memo[id(owner)] = owner
    try:
        # Tensors made in inference mode could never be differentiated again.
        with torch.inference_mode(False):
            return copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied, and its weights are randomised in a copy ({error}): pass the "
            "network alone, rebuilt from its checkpoint, without tensors of a finished forward kept as attributes"
        ) from error


class _Uses(TorchFunctionMode):
    """Notes when each parameter is last given to an operator, whichever module it belongs to."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.last: dict[int, int] = {id(p): -1 for p in parameters}
        self._clock = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Reading an attribute (`weight.shape`, `weight.dtype`) is no use of the values.
        if getattr(func, "__name__", "") != "__get__":
            self._clock += 1
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, nn.Parameter) and id(leaf) in self.last:
                    self.last[id(leaf)] = self._clock
        return func(*args, **(kwargs or {}))


def _uses(model: nn.Module, image: Tensor) -> list[int]:
    """When each parameter of the copy was last used in one forward, -1 = never; in the order of `parameters()`."""
    parameters = list(model.parameters())
    with asking(model, image), torch.no_grad(), _Uses(parameters) as uses:
        model(image.clone())
    return [uses.last[id(p)] for p in parameters]


def _parts(model: nn.Module, last: list[int]) -> list[Part]:
    """Modules whose own weights took part, the last used first.

    A weight that several modules use goes with the first of them on this way: it is drawn once.
    """
    when = {id(p): used for p, used in zip(model.parameters(), last, strict=True)}
    owners = []
    for name, module in model.named_modules():
        own = {n: p for n, p in module.named_parameters(recurse=False) if when[id(p)] >= 0 and p.is_floating_point()}
        if own:
            owners.append((max(when[id(p)] for p in own.values()), name, own))
    found, seen = [], set()
    # One operator may take the weights of several modules (attention): the one that was built last comes first.
    owners.reverse()
    owners.sort(key=lambda owner: -owner[0])
    for _, name, own in owners:
        fresh = {n: p for n, p in own.items() if id(p) not in seen}
        seen |= {id(p) for p in fresh.values()}
        if fresh:
            found.append(Part(name, {f"{name}.{n}" if name else n: p.numel() for n, p in fresh.items()}))
    return found


def _redrawn(model: nn.Module, part: Part, seed: int) -> dict[str, Tensor]:
    """New weights of one module, the same on every device."""
    module = copied(model.get_submodule(part.name)).cpu()
    state = dict(module.named_parameters(recurse=False))
    before = {name: value.detach().clone() for name, value in state.items()}
    # The name goes into the seed, so that a module gets the same weights whatever was drawn before.
    mixed = (seed * 0x9E3779B1 + zlib.crc32(plain_name(part.name).encode())) % 2**63
    with _seeded(mixed), torch.no_grad():
        _reset(module)
    generator = torch.Generator().manual_seed(mixed)
    drawn = {}
    for full in part.weights:
        name = full.rsplit(".", 1)[-1]
        value, old = state[name].detach(), before[name]
        drawn[full] = _alike(old, generator) if torch.equal(value, old) else value.clone()
    return drawn


def _reset(module: nn.Module) -> None:
    """Call `reset_parameters()` where there is one that takes nothing."""
    reset = getattr(module, "reset_parameters", None)
    if not callable(reset):
        return
    try:
        inspect.signature(reset).bind()
    except TypeError:
        return
    reset()


def _alike(old: Tensor, generator: torch.Generator) -> Tensor:
    """A draw with the mean and the standard deviation of a tensor; a tensor of one value keeps it."""
    wide = old.double()
    noise = torch.randn(wide.shape, dtype=wide.dtype, generator=generator)
    return (wide.mean() + wide.std(correction=0) * noise).to(old.dtype)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's CPU generator at a seed; afterwards where it was. `torch.manual_seed` would move those of GPUs too."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _values(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))
