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

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from camtrain.cam.capture import eager, level, recomputing


class Work(NamedTuple):
    """What leaf modules did: multiply-adds of their weights, numbers given, numbers of weights, calls."""

    products: float = 0.0
    numbers: float = 0.0
    weights: float = 0.0
    calls: float = 0.0

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
_BACKWARD = Work(1.25e-11, 4.5e-9, 1.1e-9, 20e-6)


class WorkCount:
    """Counts the work of one forward, and how much of it lies behind given layers.

    Args:
        model: All of it is counted; what is compiled, or no module, is not seen.
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
        handles = [module.register_forward_hook(hook) for module in _once([*_leaves(self._model), *self._layers])]
        try:
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
        if next(module.children(), None) is None:
            self.whole = self.whole.plus(_work(module, args, output))
        for layer, marks in zip(self._layers, self._marks, strict=True):
            if layer is module:
                marks.append(self.whole)


def _work(module: nn.Module, args: tuple[Any, ...], output: Any) -> Work:
    numbers = float(output.numel()) if isinstance(output, Tensor) else 0.0
    if not isinstance(module, _ConvNd | nn.Linear) or not isinstance(output, Tensor):
        return Work(numbers=numbers, calls=1.0)
    weights = float(module.weight.numel())
    if isinstance(module, nn.Linear):
        places = numbers / module.out_features
    elif module.transposed and args and isinstance(args[0], Tensor):
        places = args[0].numel() / module.in_channels
    else:
        places = numbers / module.out_channels
    return Work(places * weights, numbers, weights, 1.0)


def _priced(work: Work, prices: Work) -> float:
    return sum(amount * price for amount, price in zip(work, prices, strict=True))


def _leaves(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if next(module.children(), None) is None)


def _once(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list({id(module): module for module in modules}.values())
