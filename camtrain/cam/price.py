"""About what a backward pass from the logits to a layer costs, beside the forward that it belongs to.

Counted and not timed: two runs of one network come to the same figure, whatever else the machine does. The weights of
the counts were fitted once to single-threaded forwards and passes of MONAI's ResNet18, ResNet50, DenseNet121 and
EfficientNet-B0 at 32^3 and 64^3, at two to four layers each (`benchmarks/pass_price.py` compares them): multiplications
alone are ten times too low where there are few cells, since a pass then moves weights and calls kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from camtrain.cam.capture import eager, level, recomputing, run_eagerly


class Work(NamedTuple):
    """What modules did: multiply-adds of their weights, numbers given, numbers of weights, calls.

    `narrow` are the multiply-adds of convolutions with few channels to a group, whose gradients are far slower.
    """

    products: float = 0.0
    numbers: float = 0.0
    weights: float = 0.0
    calls: float = 0.0
    narrow: float = 0.0

    @property
    def forward(self) -> float:
        """About how many seconds that took one core without a graph."""
        return _priced(self, _FORWARD)

    @property
    def backward(self) -> float:
        """About how many seconds a backward pass through it takes, to what went in and not to the weights."""
        return _priced(self, _BACKWARD)

    def plus(self, other: Work) -> Work:
        """Both."""
        return Work(*(mine + its for mine, its in zip(self, other, strict=True)))

    def minus(self, other: Work) -> Work:
        """What came since `other`."""
        return Work(*(mine - its for mine, its in zip(self, other, strict=True)))


_FORWARD = Work(1.8e-11, 1.0e-9, 0.4e-9, 15e-6)
_BACKWARD = Work(1.25e-11, 4.5e-9, 1.1e-9, 20e-6, 0.8e-9)
_NARROW = 4  # channels
_CALLS_A_STEP = 4  # of a recurrent layer: gates are several operations


class WorkCount:
    """Counts the work of one forward, and how much of it lies behind given layers.

    Args:
        model: All of it is counted, run eagerly; what is no module, or scripted, is not seen.
        layers: Modules in it.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2))
        >>> count = WorkCount(net, [net[1]])
        >>> with count.counting():
        ...     logits = net(torch.rand(5, 1, 8))
        >>> count.whole.products, count.behind(0).products  # of the last layer: 24 x 2 for each of 5
        (600.0, 240.0)
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self._model, self._layers = model, list(layers)
        self.whole = Work()
        self._marks: list[list[Work]] = [[] for _ in layers]
        self._level = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """While the forward runs. Hooks look at shapes alone, and are gone afterwards."""
        self._level = level()
        hook = eager(self._hook)
        handles = [module.register_forward_hook(hook) for module in _once([*_counted(self._model), *self._layers])]
        try:
            # Hooks inside of what is compiled now would break its graphs for good.
            with run_eagerly():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def behind(self, layer: int, call: int = -1) -> Work:
        """The work that came after a run of a layer; nothing where it has not run so often.

        Args:
            layer: Its place in `layers`.
            call: Which of its runs.
        """
        marks = self._marks[layer]
        return self.whole.minus(marks[call]) if -len(marks) <= call < len(marks) else Work()

    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if recomputing() or level() != self._level:
            return
        if _counts(module):
            self.whole = self.whole.plus(_work(module, args, output))
        for layer, marks in zip(self._layers, self._marks, strict=True):
            if layer is module:
                marks.append(self.whole)


def _work(module: nn.Module, args: tuple[Any, ...], output: Any) -> Work:
    given = args[0] if args and isinstance(args[0], Tensor) else None
    numbers = float(output.numel()) if isinstance(output, Tensor) else 0.0
    if isinstance(module, nn.RNNBase) and given is not None:
        weights = float(sum(parameter.numel() for parameter in module.parameters()))
        steps = given.shape[1 if module.batch_first else 0] if given.ndim == 3 else given.shape[0]
        calls = steps * module.num_layers * (1 + module.bidirectional) * _CALLS_A_STEP
        return Work(given.numel() / module.input_size * weights, 0.0, weights, float(calls))
    if not isinstance(module, _ConvNd | nn.Linear) or not isinstance(output, Tensor):
        return Work(numbers=numbers, calls=1.0)
    weights = float(module.weight.numel())
    if isinstance(module, nn.Linear):
        places = numbers / module.out_features
    elif module.transposed and given is not None:
        places = given.numel() / module.in_channels
    else:
        places = numbers / module.out_channels
    narrow = isinstance(module, _ConvNd) and module.groups > 1 and module.in_channels // module.groups < _NARROW
    return Work(places * weights, numbers, weights, 1.0, places * weights * narrow)


def _priced(work: Work, prices: Work) -> float:
    return sum(amount * price for amount, price in zip(work, prices, strict=True))


def _counted(model: nn.Module) -> Iterator[nn.Module]:
    scripted = [m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]  # they take no hooks
    hidden = {id(part) for module in scripted for part in module.modules()}
    return (module for module in model.modules() if _counts(module) and id(module) not in hidden)


def _counts(module: nn.Module) -> bool:
    """Is it one that computes? Spectral and weight norm put modules into a convolution."""
    return next(module.children(), None) is None or isinstance(module, _ConvNd | nn.Linear | nn.RNNBase)


def _once(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list({id(module): module for module in modules}.values())
