"""`camtrain fit`, `validate` and `test`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from camtrain.cli import surroundings


def fit(args: Sequence[str]) -> None:
    """Train; then the scores per label and where everything lies."""
    _run("fit", args)


def validate(args: Sequence[str]) -> None:
    """Score on the validation cases."""
    _run("validate", args)


def test(args: Sequence[str]) -> None:
    """Score on every test split."""
    _run("test", args)


def _run(command: str, args: Sequence[str]) -> None:
    surroundings.prepare()
    from camtrain.cli.lightning_cli import CamtrainCLI
    from camtrain.cli.summary import show

    with _own_wandb_run():
        cli = CamtrainCLI(command, args)
        show(cli.trainer, command)


@contextmanager
def _own_wandb_run() -> Iterator[None]:
    """Finish the W&B run that the command started, so that its files are whole when the command ends."""
    import wandb

    before = wandb.run
    try:
        yield
    finally:
        if wandb.run is not None and wandb.run is not before:
            wandb.finish()
