"""Runs a recipe as a user does: in a process of its own, from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"
ENVIRONMENT = {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def started(script, *words, folder, timeout=400, **environment):
    """What came of `python SCRIPT WORDS` in a folder, whether it went well or not."""
    return subprocess.run(
        [sys.executable, str(script), *map(str, words)],
        cwd=folder,
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run(script, *words, folder, timeout=400, **environment):
    """The same where it must end well."""
    done = started(script, *words, folder=folder, timeout=timeout, **environment)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done


def run_recipe(name, *words, folder, timeout=400, **environment):
    """What a recipe printed."""
    return run(RECIPES / f"{name}.py", *words, folder=folder, timeout=timeout, **environment).stdout
