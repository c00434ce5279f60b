"""Which validation of a fit is the last one, as far as the Trainer can know it."""

from __future__ import annotations

import math
from typing import Any


def comes_last(trainer: Any) -> bool | None:
    """Is the validation that runs now the last one of the fit?

    What ends a fit early (`EarlyStopping`, `max_steps`, `max_time`, `should_stop`) cannot be known before.

    Args:
        trainer: A Trainer that validates in a fit.

    Returns:
        None in an epoch that is not the last one with a validation, or where that cannot be told: no `max_epochs`, or
        validations by time, or within an epoch of unknown length.
    """
    epochs, every, batches = trainer.max_epochs, trainer.check_val_every_n_epoch, trainer.num_training_batches
    if epochs is None or epochs < 0 or trainer.val_check_batch is None:
        return None
    epoch, step, loop = int(trainer.current_epoch), trainer.val_check_batch, trainer.fit_loop.epoch_loop
    if math.isinf(batches):
        # At the end of an epoch, however long it is; inside one the last validation cannot be told.
        return True if math.isinf(step) and epoch == epochs // (every or 1) * (every or 1) - 1 else None
    if every is None:  # the steps run on through the epochs
        final = batches * epochs // step * step
        return bool(loop.total_batch_idx + 1 == final) if epoch == (final - 1) // batches else None
    final = batches // step * step
    return bool(loop.batch_idx + 1 == final) if epoch == epochs // every * every - 1 else None
