"""The dispatcher: instant help, exit codes, one line for what is the user's input."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from camtrain import __version__
from camtrain._errors import InputError
from camtrain.cli import main as dispatcher
from camtrain.cli import surroundings
from camtrain.cli.exits import guarded, input_sentence, refused_option
from camtrain.cli.main import COMMANDS, main

HEAVY = ("torch", "pytorch_lightning", "monai", "wandb", "numpy", "rich", "jsonargparse")


def test_help_needs_no_library():
    code = (
        "import sys\nfrom camtrain.cli.main import main\n"
        f"assert main(['--help']) == 0\nprint([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


def test_commands_are_those_of_this_release(run):
    words = "import fit validate test evaluate explain report study doctor methods layers"
    assert list(COMMANDS) == words.split()
    shown = run("--help")
    assert shown.code == 0
    assert all(line in shown.out for _, line in COMMANDS.values())


def test_version_and_empty_line(run):
    assert run("--version").out == f"camtrain {__version__}\n"
    assert run().code == 2


def test_unknown_command_offers_the_nearest(refused):
    assert "no command 'fti'; nearest: fit" in refused("fti")
    assert "no command 'voyage'" in refused("voyage")


@pytest.mark.parametrize("command", ["fit", "evaluate", "explain", "report", "doctor", "methods", "layers"])
def test_help_of_a_command(run, command):
    shown = run(command, "--help")
    assert shown.code == 0
    assert "--" in shown.out


def test_methods_lists_all(run):
    import camtrain as ct

    shown = run("methods")
    assert shown.code == 0
    assert all(row.name in shown.out for row in ct.methods())


def raising(error):
    def action():
        raise error

    return action


def test_exit_codes(capsys):
    assert guarded(lambda: None) == 0
    assert guarded(raising(InputError("two\nlines"))) == 2
    assert capsys.readouterr().err == "error: two lines\n"
    assert guarded(raising(KeyboardInterrupt())) == 130
    assert guarded(raising(SystemExit(0))) == 0
    assert guarded(raising(SystemExit("text"))) == 1
    with pytest.raises(ZeroDivisionError):
        guarded(raising(ZeroDivisionError()))


def test_lightning_leaves_after_an_interrupt():
    def action():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    assert guarded(action) == 130


def test_a_cause_is_found_but_a_defect_while_handling_is_not():
    wrapped = ValueError("Does not validate")
    wrapped.__cause__ = RuntimeError("x")
    wrapped.__cause__.__cause__ = InputError("the reason")
    assert input_sentence(wrapped) == "the reason"
    defect = KeyError("k")
    defect.__context__ = InputError("handled before")
    assert input_sentence(defect) is None
    assert input_sentence(argparse.ArgumentError(None, 'Parser key "a": no')).startswith("a: no;")


def test_worker_traceback_is_cut():
    text = (
        "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1\ncamtrain._errors.InputError: file a.nii, row 3: NaN\n'
    )
    assert input_sentence(InputError(text)) == "file a.nii, row 3: NaN"


def test_innermost_reason_of_a_tree():
    text = (
        'Parser key "model":\n  Does not validate against any of the Union subtypes\n  Errors:\n'
        "    - Problem with given class_path 'M':\n        Parser key \"net\":\n          Errors:\n"
        "            - module 'm' has no attribute 'FlatNet'\n            - Expected a <class 'NoneType'>\n"
        "  Given value: 3"
    )
    assert refused_option(text).startswith("model.net: module 'm' has no attribute 'FlatNet';")


def test_wandb_is_offline_without_a_login(monkeypatch, tmp_path):
    for name in ("API_KEY", "IDENTITY_TOKEN_FILE", "MODE", "BASE_URL", "ERROR_REPORTING"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password none\n")
    surroundings.prepare()
    assert "WANDB_MODE" not in surroundings.os.environ
    (tmp_path / "settings").write_text("[default]\nmode = disabled\n")
    (tmp_path / "netrc").unlink()
    surroundings.prepare()
    assert "WANDB_MODE" not in surroundings.os.environ  # W&B reads there what `wandb disabled` has written
    (tmp_path / "settings").unlink()
    surroundings.prepare()
    assert surroundings.os.environ["WANDB_MODE"] == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    surroundings.prepare()
    assert surroundings.os.environ["WANDB_MODE"] == "disabled"


def test_entry_point_takes_the_words_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(dispatcher.sys, "argv", ["camtrain", "--version"])
    assert main() == 0
    assert "camtrain" in capsys.readouterr().out


def test_as_a_module_it_leaves_with_the_code(tmp_path):
    done = subprocess.run([sys.executable, "-m", "camtrain", "nothing"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr[:7]) == (2, "error: ")
