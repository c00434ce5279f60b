"""Strategies of the Trainer under which the callbacks would be wrong or end in an error of torch's: told before."""

from __future__ import annotations

from typing import Any

from camtrain._errors import InputError

_SHARDS = (
    "it frees each weight once it was used, and maps are gradients that need the weights behind the layer again, "
    "before and in the backward pass of the step"
)
# By name, because Lightning exists under two names and both have a class of their own.
_REFUSED = {
    "FSDPStrategy": _SHARDS,
    "XLAFSDPStrategy": _SHARDS,
    "ModelParallelStrategy": _SHARDS,
    "DeepSpeedStrategy": "its engine runs the backward pass, and nobody has tried maps with it",
}


def refuse_engine(trainer: Any, who: str) -> None:
    """Sharded training.

    Args:
        trainer: The Trainer.
        who: Name of the callback.

    Raises:
        InputError: Its strategy shards the weights.
    """
    for kind in type(trainer.strategy).__mro__:
        if kind.__name__ in _REFUSED:
            raise InputError(
                f"{who} does not work with {kind.__name__}: {_REFUSED[kind.__name__]}. Take strategy='ddp'; where the "
                "memory is short, smaller batches with accumulate_grad_batches, precision='bf16-mixed' and activation "
                "checkpointing go with it"
            )


def refuse_static_graph(trainer: Any) -> None:
    """DDP that takes the graph of the first step for all.

    Raises:
        InputError: It is on.
    """
    if getattr(trainer.strategy, "_ddp_kwargs", {}).get("static_graph"):
        raise InputError(
            "DDP with static_graph=True leaves the gradients of an inner autograd.grad on each rank, silently: "
            "use DDPStrategy(static_graph=False)"
        )
