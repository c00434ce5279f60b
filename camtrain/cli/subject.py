"""A model with its data, rebuilt from a checkpoint, or from the config that it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from camtrain._errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Subject:
    """A model with its data.

    Attributes:
        model: Trained, in eval mode, on the device.
        data: Its data module.
        trained: Replacements that it was trained with.
    """

    model: Any
    data: Any
    trained: frozenset[str]


def rebuild_subject(path: str, configs: Sequence[str], more: Sequence[str], device: str, trust: bool) -> Subject:
    """Model and data of a checkpoint.

    Args:
        path: The checkpoint.
        configs: Config files of the training; none = the checkpoint tells.
        more: Options of the config, for example `--data.test_cases 50`.
        device: `cpu`, `cuda`, ..., or `auto`.
        trust: Build classes outside camtrain that the checkpoint names.

    Raises:
        InputError: A checkpoint, a config or a device that cannot be used, or no data.
    """
    from camtrain.cli.checkpoint import read_checkpoint
    from camtrain.cli.rebuild import data_arguments, rebuild_data, rebuild_model
    from camtrain.evaluation.reliance import trained_replacements

    checkpoint = read_checkpoint(path)
    if configs:
        from camtrain.cli.lightning_cli import CamtrainCLI

        words = [word for file in configs for word in ("--config", file)]
        cli = CamtrainCLI("validate", [*words, *more, "--ckpt_path", str(path)], until="built")
        model, data = cli.model, cli.datamodule
        model.load_state_dict(checkpoint["state_dict"], strict=bool(getattr(model, "strict_loading", True)))
    else:
        model = rebuild_model(checkpoint, path, None, trust)
        data = rebuild_data(*data_arguments(checkpoint, None, path))
    if data is None:
        raise InputError(f"the config has no data to evaluate {path} on: add a data section")
    return Subject(model.eval().to(find_device(device)), data, frozenset(trained_replacements(checkpoint)))


def find_device(word: str) -> torch.device:
    """The device of a word; `auto` = a GPU where there is one.

    Raises:
        InputError: It cannot be used here.
    """
    import torch

    if word == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(word)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {word!r} cannot be used ({str(error).splitlines()[0]}): try cpu") from error
    return device
