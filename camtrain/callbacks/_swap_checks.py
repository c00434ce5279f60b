"""Set-ups in which OutsideSwap would teach truths that a composite does not show."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from camtrain._errors import InputError
from camtrain.callbacks._engines import refuse_engine
from camtrain.callbacks._regions import Keep, Rules
from camtrain.callbacks.mask_loss import MaskLossCallback
from camtrain.cam.watch import LogitsFrom

LeaveOut = Literal["gate", "nan"]
WithoutOrgans = Literal["stay", "lend", "atlas"]


def refuse_setup(trainer: Any, pl_module: Any, logits: LogitsFrom) -> None:
    """Modules and callbacks beside it that do not go with the swap.

    Raises:
        InputError: Manual optimisation, sharded training, a second OutsideSwap, or a mask loss with other logits.
    """
    refuse_engine(trainer, "OutsideSwap")
    if not pl_module.automatic_optimization:
        raise InputError(
            "OutsideSwap leaves truths out of the loss that training_step returns, but this module optimises by "
            "hand (automatic_optimization=False): swap in the data, or let Lightning optimise"
        )
    if sum(type(callback).__name__ == "OutsideSwap" for callback in trainer.callbacks) > 1:
        raise InputError("expected one OutsideSwap, got two: the second would not know what the first left out")
    if not isinstance(logits, str):
        return
    for callback in trainer.callbacks:
        if isinstance(callback, MaskLossCallback) and callback.logits != logits:
            raise InputError(
                f"OutsideSwap has logits={logits!r}, but MaskLossCallback logits={callback.logits!r}: give "
                "both the same, or maps would be taken of logits whose gradient is changed"
            )


def refuse_truths(rules: Rules, label: Tensor, keep: Keep, leave_out: LeaveOut, without_organs: WithoutOrgans) -> bool:
    """Tables and labels with which no swap leaves a truth that can be taught.

    Args:
        rules: Of the table.
        label: As the user's batch has it.
        keep: See `OutsideSwap`, as the others.
        leave_out: Likewise.
        without_organs: Likewise.

    Returns:
        Are the labels class indices?

    Raises:
        InputError: No rule has an outside, class indices without the union, or integer labels that cannot hold NaN.
    """
    if not rules.rules:
        raise InputError(
            "every label of the table may be read from anywhere, so nothing lies outside: give a label its organs, "
            "or leave OutsideSwap out"
        )
    if leave_out == "nan" and not label.is_floating_point():
        raise InputError(f"leave_out='nan' needs labels in floating point, got {label.dtype}: take 'gate'")
    if label.ndim > 1 or len(rules.of_label) == 1:
        return False
    if keep != "union":
        raise InputError(
            "labels are class indices, and a composite of two cases may show two classes: take keep='union', which "
            "leaves all organs and every truth as they are"
        )
    if without_organs == "lend":
        raise InputError(
            "labels are class indices, and a case that is lent an organ would show the class of another: take "
            "without_organs='stay' or 'atlas', or labels of shape (B, L)"
        )
    if not bool(rules.of_label.any(dim=1).all()):
        raise InputError(
            "labels are class indices, and a class of the table may be read from anywhere, so that no composite "
            "shows it for sure: give every class its organs, or leave OutsideSwap out"
        )
    return True
