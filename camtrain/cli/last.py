"""`--ckpt_path last`: the newest `last.ckpt` of the runs that one config has made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LAST = "last"


def last_checkpoint(trainer: Any) -> Path | None:
    """The newest last checkpoint where this Trainer's earlier runs wrote theirs.

    Lightning looks into the folder of the coming run alone, which is a new version, and would start anew.

    Args:
        trainer: The Trainer that is going to run.

    Returns:
        The file; None before there is one.
    """
    found = [file for folder in _folders(trainer) if folder.is_dir() for file in folder.glob(f"{LAST}*.ckpt")]
    return max(found, key=lambda file: file.stat().st_mtime, default=None)


def _folders(trainer: Any) -> list[Path]:
    """Where checkpoints of this and of earlier versions lie, as ModelCheckpoint chooses it."""
    named = [Path(c.dirpath) for c in trainer.checkpoint_callbacks if getattr(c, "dirpath", None)]
    if named:
        return named
    if not trainer.loggers:
        return [Path(trainer.default_root_dir) / "checkpoints"]
    logger = trainer.loggers[0]
    runs = Path(logger.save_dir or trainer.default_root_dir) / str(logger.name)
    return [run / "checkpoints" for run in runs.iterdir()] if runs.is_dir() else []
