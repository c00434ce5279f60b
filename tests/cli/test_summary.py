"""What a fit says last can be copied into a shell as it stands."""

from __future__ import annotations

import shlex
from types import SimpleNamespace

from camtrain.cli.lightning_cli import SaveRunConfig
from camtrain.cli.summary import _places
from camtrain.reporting import describe_loggers


class WandbLogger:
    """Offline, in a folder with a space."""

    def __init__(self, folder):
        self.experiment = SimpleNamespace(dir=str(folder / "files"), offline=True)


class TensorBoardLogger:
    def __init__(self, folder):
        self.log_dir = str(folder)


def test_commands_of_a_folder_with_spaces_are_whole(tmp_path):
    folder = tmp_path / "runs of [ü]"
    folder.mkdir()
    best = folder / "best.ckpt"
    best.touch()
    config = SaveRunConfig.__new__(SaveRunConfig)
    config.path = folder / "config.yaml"
    trainer = SimpleNamespace(
        checkpoint_callback=SimpleNamespace(best_model_path=str(best)), callbacks=[config], loggers=[]
    )
    said = list(_places(trainer, [], "fit"))
    assert f"checkpoint: {best}" in said  # a place is told as it is
    test, explain = (shlex.split(line.removeprefix("next:")) for line in said[-2:])
    assert test == ["camtrain", "test", "--config", str(config.path), "--ckpt_path", str(best)]
    assert explain[:4] == ["camtrain", "explain", "--ckpt_path", str(best)]
    wandb, board = describe_loggers([WandbLogger(folder), TensorBoardLogger(folder)])
    place, look, upload = wandb.split("; ")
    assert place == f"W&B (offline): {folder}"
    assert shlex.split(look.partition(": ")[2]) == ["wandb", "leet", str(folder)]
    assert shlex.split(upload.partition(": ")[2]) == ["wandb", "sync", str(folder)]
    assert shlex.split(board.partition("; look with: ")[2]) == ["tensorboard", "--logdir", str(folder)]
