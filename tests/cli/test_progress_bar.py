"""The progress bar of `camtrain fit`, seen by a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import threading

import pytest
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from camtrain.cli import lightning_cli
from camtrain.cli.main import main


def seen_by_a_terminal(action):
    """What a terminal shows of an action, without colours and movements of the cursor."""
    master, slave = pty.openpty()
    shown = []

    def read():
        with contextlib.suppress(OSError):  # Linux says so when the other end is closed
            while data := os.read(master, 4096):
                shown.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w", encoding="utf-8") as stdout, contextlib.redirect_stdout(stdout):
        assert stdout.isatty()
        action()
    reader.join(30)
    os.close(master)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(shown).decode(errors="replace"))


@pytest.mark.slow
def test_scores_stand_beside_the_loss(write, monkeypatch):
    # As Lightning before 2.5.3 does, which takes tqdm's bar where the user names none.
    connector = "pytorch_lightning.trainer.connectors.callback_connector"
    monkeypatch.setattr(f"{connector}._RICH_AVAILABLE", False, raising=False)
    for name, value in (("COLUMNS", "80"), ("LINES", "40"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    config = write(trainer__enable_progress_bar=True)
    codes = []
    shown = seen_by_a_terminal(lambda: codes.append(main(["fit", "--config", str(config)])))
    assert codes == [0]
    bars = [" ".join(bar.split()) for bar in shown.split("Epoch 1/1")[1:]]
    assert bars
    assert all("val/organ_iou: 0." in bar and "val/energy_inside: 0." in bar for bar in bars), bars
    assert any(re.search(r"train/loss: \d\.\d{3}", bar) for bar in bars)
    assert "…" not in shown


@pytest.mark.parametrize(
    ("trainer", "kind"),
    [
        ({"callbacks": None}, RichProgressBar),
        ({"callbacks": []}, RichProgressBar),
        ({"callbacks": None, "enable_progress_bar": True, "barebones": False}, RichProgressBar),
        ({"callbacks": TQDMProgressBar()}, TQDMProgressBar),
        ({"callbacks": [TQDMProgressBar()]}, TQDMProgressBar),
        ({"callbacks": None, "enable_progress_bar": False}, None),
        ({"callbacks": None, "barebones": True}, None),
    ],
)
def test_which_bar(trainer, kind):
    lightning_cli._add_rich_bar(trainer)
    given = trainer["callbacks"]
    bars = [c for c in (given if isinstance(given, list) else [given]) if isinstance(c, ProgressBar)]
    assert [type(bar) for bar in bars] == ([] if kind is None else [kind])
