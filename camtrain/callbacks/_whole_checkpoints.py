"""Checkpoints that are either whole or not there, on whatever disk."""

from __future__ import annotations

import io
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from camtrain._errors import InputError


class WholeCheckpoints:
    """Has a Trainer's strategy write each checkpoint beside its place and then move it there, until `undo()`.

    Lightning writes to the system's folder for temporary files. Where that is another disk than the checkpoints', the
    move is a copy: a full disk, or an end in the middle, leaves half a file in the place of the last whole one.

    Args:
        strategy: `trainer.strategy`; one with its own kind of checkpoint (sharded, asynchronous) is left as it is.
    """

    def __init__(self, strategy: Any) -> None:
        plugin = getattr(strategy, "checkpoint_io", None)
        self._plugin = plugin if type(plugin).__name__ == "TorchCheckpointIO" else None
        if self._plugin is None or "save_checkpoint" in vars(self._plugin):
            self._plugin = None
            return
        original = self._plugin.save_checkpoint

        def save(checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            if "://" in str(path) or storage_options is not None:
                original(checkpoint, path, storage_options)
            else:
                write_checkpoint(checkpoint, Path(path))

        self._plugin.save_checkpoint = save

    def undo(self) -> None:
        """Give the strategy its own way back; calling it twice is calling it once."""
        if self._plugin is not None:
            vars(self._plugin).pop("save_checkpoint", None)
            self._plugin = None


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, so that at every moment `path` holds the whole old one or the whole new one.

    Args:
        checkpoint: What `torch.save` takes.
        path: The file.

    Raises:
        InputError: The disk does not take it; what was at `path` before is still there.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "last.ckpt"
        >>> write_checkpoint({"step": 3}, path)
        >>> torch.load(path, weights_only=True)
        {'step': 3}
    """
    # In memory first: torch's own writer ends the process where a disk fills up under it.
    content = io.BytesIO()
    torch.save(checkpoint, content)
    # A name of its own: a run that was started again beside the old one may write to the same place.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sweep(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        before = "the checkpoint that was there before is whole" if path.exists() else "nothing was written there"
        raise InputError(
            f"the checkpoint {path} could not be written ({error.strerror or error}), {before}: make room, and start "
            "the same command again with --ckpt_path last"
        ) from error


def _sweep(path: Path) -> None:
    """Remove what runs that were killed an hour ago and more have left half written."""
    for part in path.parent.glob(f".{path.name}.*.part"):
        with suppress(OSError):  # another process may have been faster
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()
