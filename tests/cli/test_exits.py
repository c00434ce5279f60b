"""Exit codes hold to the very end of the process, also with an open W&B run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import camtrain as ct
from camtrain.cli.exits import guarded


def test_wrong_input_is_code_two_and_one_line(capsys):
    def action():
        raise ct.InputError("expected 3 labels, got 2: pass names=")

    assert guarded(action) == 2
    assert capsys.readouterr().err == "error: expected 3 labels, got 2: pass names=\n"


def test_a_defect_keeps_its_traceback():
    def action():
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        guarded(action)


@pytest.mark.slow
def test_an_open_wandb_run_does_not_change_the_exit_code(tmp_path):
    script = """
import sys
import wandb
from camtrain import InputError
from camtrain.cli.exits import guarded

def action():
    wandb.init(project="camtrain", mode="offline", dir=sys.argv[1])
    raise InputError("wrong")

sys.exit(guarded(action))
"""
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.rstrip().endswith("error: wrong")
