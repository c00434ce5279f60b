"""Put code around a step of a user's module for the time of a run, and take it away without a trace."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from camtrain._errors import InputError

Around = Callable[..., Any]


class WrappedStep:
    """Calls `around(original, *args, **kwargs)` in the place of a module's step until `undo()`.

    Several callbacks may wrap one step and leave in any order: who leaves first becomes transparent, and who leaves
    last restores what the module had, be it a method of its class or an attribute of its own.

    Args:
        module: Any object.
        name: Its step, such as `training_step`.
        around: What to call; its first argument is the step as it was.

    Raises:
        InputError: The step takes `dataloader_iter`, so that it is given no batch.

    Example:
        >>> class Module:
        ...     def training_step(self, batch):
        ...         return batch
        >>> module = Module()
        >>> wrapped = WrappedStep(module, "training_step", lambda step, batch: 10 * step(batch))
        >>> module.training_step(2)
        20
        >>> wrapped.undo()
        >>> module.training_step(2), vars(module)
        (2, {})
    """

    def __init__(self, module: Any, name: str, around: Around) -> None:
        original = getattr(module, name)
        if "dataloader_iter" in inspect.signature(original).parameters:
            raise InputError(f"camtrain's callbacks need a batch, but {name} takes dataloader_iter: take batch instead")
        self._module, self._name = module, name
        self._covered = vars(module).get(name)
        self._around: Around | None = around

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs) if self._around is None else self._around(original, *args, **kwargs)

        # Lightning looks through one wrapper, no more, when it asks what the step takes and whether the user wrote it.
        step.__wrapped__ = getattr(original, "__wrapped__", original)
        step.camtrain = self  # type: ignore[attr-defined]
        setattr(module, name, step)

    def undo(self) -> None:
        """Give the module its own step back; calling it twice is calling it once."""
        self._around = None
        own = vars(self._module)
        top = getattr(own.get(self._name), "camtrain", None)
        while isinstance(top, WrappedStep) and top._around is None:
            if top._covered is None:
                own.pop(self._name, None)
            else:
                own[self._name] = top._covered
            top = getattr(own.get(self._name), "camtrain", None)


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The batch that a step was given; of a dict a copy, because steps pop what they have used.

    Example:
        >>> batch_of(({"image": 1}, 0), {})
        {'image': 1}
    """
    batch = args[0] if args else kwargs.get("batch", next(iter(kwargs.values()), None))
    return copy.copy(batch) if isinstance(batch, dict) else batch


def loss_of(output: Any) -> Tensor:
    """The loss in what a training step returned.

    Raises:
        InputError: There is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise InputError(
            f"training_step must return a loss tensor or a dict with the key 'loss', got {type(output).__name__}"
            + (f" with the keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else "")
        )
    return loss
