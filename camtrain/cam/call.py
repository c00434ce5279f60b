"""A call of a user's module: which of its arguments is the image, and how to call it so again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Call:
    """A module and what it was called with.

    Attributes:
        entry: The module.
        args: Its arguments by position.
        kwargs: Its arguments by name.
        given: Which of them, or of what is nested in them, is the image: the tensor itself, graph, subclass and all.
    """

    entry: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    given: Tensor

    @staticmethod
    def of(entry: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], integer: bool = False) -> Call | None:
        """Find the image: the first floating tensor (B, C, *S) among the arguments, then among what they hold.

        Args:
            entry: The module.
            args: Its arguments by position.
            kwargs: Its arguments by name.
            integer: Where there is none, take the first one of integers.

        Returns:
            The call; None where there is no image.

        Example:
            >>> import torch
            >>> call = Call.of(nn.Identity(), ({"age": torch.ones(2), "image": torch.zeros(2, 1, 4)},), {})
            >>> call.image.shape, call.rows([1])(torch.ones(1, 1, 4))["age"]
            (torch.Size([2, 1, 4]), tensor([1.]))
        """
        values = (*args, *kwargs.values(), *tree_leaves((args, dict(kwargs))))
        tensors = [x for x in values if isinstance(x, Tensor) and x.ndim >= 3]
        found = [x for x in tensors if x.is_floating_point()] or (tensors if integer else [])
        return Call(entry, args, kwargs, found[0]) if found else None

    @property
    def image(self) -> Tensor:
        """(B, C, *S), plain, without a graph."""
        return self.given.detach().as_subclass(Tensor)

    @property
    def direct(self) -> bool:
        """Is the image an argument itself? One that a list holds may be one of several."""
        return any(x is self.given for x in (*self.args, *self.kwargs.values()))

    @property
    def image_alone(self) -> bool:
        """Is the image the only argument, by position?"""
        return len(self.args) == 1 and not self.kwargs and self.args[0] is self.given

    @property
    def divisible(self) -> bool:
        """Can some samples be left out for sure? Of a tensor or a list beside the image it cannot be told."""
        others = (x for x in tree_leaves((self.args, dict(self.kwargs))) if x is not self.given)
        return all(x is None or isinstance(x, bool | int | float) for x in others)

    def rows(self, rows: Sequence[int]) -> Call:
        """The same call with these samples only."""
        given = self.given[list(rows)]

        def some(x: Any) -> Any:
            per_sample = isinstance(x, Tensor) and x.ndim > 0 and len(x) == len(self.given)
            return given if x is self.given else x[list(rows)] if per_sample else x

        args, kwargs = tree_map(some, (self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs, given=given)

    def arguments(self, image: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with another image of as many samples; what does not hold the image is the same object."""

        def swapped(value: Any) -> Any:
            if not any(x is self.given for x in tree_leaves(value)):
                return value
            return tree_map(lambda x: image if x is self.given else x, value)

        return tuple(map(swapped, self.args)), {name: swapped(value) for name, value in self.kwargs.items()}

    def on(self, image: Tensor) -> Call:
        """The same call of another image; only where it is `divisible` may the number of samples differ."""
        args, kwargs = self.arguments(image)
        return replace(self, args=args, kwargs=kwargs, given=image)

    def __call__(self, image: Tensor) -> Any:
        """Call the module with another image."""
        args, kwargs = self.arguments(image)
        return self.entry(*args, **kwargs)
