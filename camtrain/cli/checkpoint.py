"""Reading a checkpoint and telling whether it belongs to a model."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from camtrain._errors import InputError, nearest
from camtrain.models._rebuild import check_state, class_path

# Words that Lightning resolves to a file by itself.
_WORDS = ("best", "last", "hpc", "registry")


def find_checkpoint(ckpt_path: str | None) -> Path | None:
    """The file that `--ckpt_path` names; None for no checkpoint and for the words that Lightning resolves.

    Raises:
        InputError: There is no such file.
    """
    if ckpt_path is None or str(ckpt_path) in _WORDS or str(ckpt_path).startswith("registry:"):
        return None
    path = Path(ckpt_path)
    if not path.is_file():
        beside = [str(p) for p in sorted(path.parent.glob("*.ckpt"))] if path.parent.is_dir() else []
        raise InputError(
            f"ckpt_path expects a checkpoint file, got {path}, which "
            f"{'is a folder' if path.is_dir() else 'does not exist'}{nearest(str(path), beside)}: correct the path"
        )
    return path


def read_checkpoint(path: str | Path, weights_only: bool = True) -> dict[str, Any]:
    """Read a Lightning checkpoint to the CPU.

    Args:
        path: The file.
        weights_only: Refuse pickled objects, which could run any code.

    Raises:
        InputError: No such file, not a checkpoint, damaged, or it holds pickled objects.
    """
    file = find_checkpoint(str(path))
    if file is None:
        raise InputError(f"expected a checkpoint file, got the word {str(path)!r}: name the file")
    try:
        content = torch.load(file, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise InputError(
                f"{file} holds pickled Python objects ({_culprit(error)}), which could run any code when read: save "
                "plain values in hyper-parameters, or pass --weights_only false to a fit or test if you trust the file"
            ) from error
        raise InputError(_damaged(file, error)) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(_damaged(file, error)) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        came = (
            f"the keys {', '.join(map(str, list(content)[:5]))}"
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise InputError(
            f"expected a Lightning checkpoint with the key state_dict, got {came} in {file}: name a .ckpt file"
        )
    return content


def _damaged(file: Path, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    return (
        f"{file} cannot be read as a checkpoint ({reason}): it is truncated, damaged or of another kind; copy it again"
    )


def _culprit(error: Exception) -> str:
    words = str(error).split("GLOBAL ", 1)
    return words[1].split()[0] if len(words) == 2 else "of an unknown class"


def check_fits(checkpoint: Mapping[str, Any], model: nn.Module, name: str | Path) -> None:
    """Compare a checkpoint with a model before the Trainer loads it.

    Args:
        checkpoint: From `read_checkpoint`.
        model: The model as the config builds it.
        name: The file, for the message.

    Raises:
        InputError: The checkpoint belongs to another model.
    """
    wrote, net = checkpoint.get("camtrain_net"), getattr(model, "net", None)
    if isinstance(wrote, str) and isinstance(net, nn.Module) and wrote != class_path(net):
        raise InputError(
            f"{name} holds a {wrote}, but the config builds a {class_path(net)}: use the config of its training"
        )
    try:
        check_state(checkpoint["state_dict"], model.state_dict(), bool(getattr(model, "strict_loading", True)))
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
