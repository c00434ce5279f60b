"""What a run needs of its surroundings before the libraries are imported: no phoning home, no noise."""

from __future__ import annotations

import logging
import os
import warnings

# Said by Lightning or torch about themselves; nothing that a user could act on.
_NOISE = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*does not have many workers.*",
    r".*but have no logger configured.*",
    r".*The number of training batches .* is smaller than the logging interval.*",
)


class NoAdverts(logging.Filter):
    """Drops the lines in which Lightning recommends other packages."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep everything but the tips."""
        return "Tip: For seamless cloud" not in str(record.msg)


_NO_ADVERTS = NoAdverts()
_TALKERS = ("pytorch_lightning.utilities.rank_zero", "lightning.pytorch.utilities.rank_zero")


def prepare() -> None:
    """W&B offline unless the user is logged in or says otherwise; never reports errors to anybody."""
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # Here, not above: commands that need no surroundings start faster without.
    from camtrain.reporting.wandb_login import logged_in_to_wandb, wandb_mode

    if wandb_mode() is None and not logged_in_to_wandb():
        os.environ["WANDB_MODE"] = "offline"
    for name in _TALKERS:
        logging.getLogger(name).addFilter(_NO_ADVERTS)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
