"""`camtrain`: finds the command and runs it; torch and Lightning are imported by the command that needs them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from camtrain import __version__
from camtrain._errors import InputError, nearest
from camtrain.cli.exits import guarded

# Command -> (module and function, one line of help). The modules are imported when their command runs.
COMMANDS: dict[str, tuple[str, str]] = {
    "import": ("camtrain.cli.import_data:import_data", "a manifest and an organ table from folders of scans"),
    "fit": ("camtrain.cli.runs:fit", "train a model; ends with the scores per label and where everything lies"),
    "validate": ("camtrain.cli.runs:validate", "score a checkpoint on the validation cases"),
    "test": ("camtrain.cli.runs:test", "score a checkpoint on every test split"),
    "evaluate": (
        "camtrain.cli.evaluate:evaluate",
        "measures with intervals; two checkpoints side by side; CSV and page",
    ),
    "explain": ("camtrain.cli.explain:explain", "attention maps of one scan as NIfTI files and a picture"),
    "report": ("camtrain.cli.report:report", "the page of a run built anew, or two runs side by side on one page"),
    "study": ("camtrain.cli.study:study", "blinded reader study: one offline page for readers, and its analysis"),
    "doctor": ("camtrain.cli.doctor:doctor", "what is wrong or suspicious with data and config, before training"),
    "methods": ("camtrain.cli.tables:methods", "the attention methods: cost, guarantee, blind spot"),
    "layers": ("camtrain.cli.tables:layers", "the layers of a model that a map can be taken of"),
}

_HELP = """\
usage: camtrain COMMAND [options]

Train 3D CNNs so that they look at the right organ, and see every epoch where they look.

commands:
{commands}

options:
  -h, --help   this text; camtrain COMMAND --help lists the options of a command
  --version    version

first steps:
  camtrain doctor --config configs/phantom.yaml
  camtrain fit --config configs/phantom.yaml
  camtrain fit --config configs/phantom.yaml --trainer.max_epochs 3 --model.lr 0.002
  camtrain evaluate --ckpt_path BEST.ckpt --methods hirescam,gradcam --out evaluation
  camtrain explain --ckpt_path BEST.ckpt --image ct.nii.gz --out maps

exit codes: 0 done, 2 something in your input is wrong (one line says what), 1 a defect, 130 interrupted, 143 SIGTERM
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after `camtrain`; None takes those of the process.

    Returns:
        0 done; 2 the user's input is wrong, one line on stderr says what; 130 interrupted; 143 ended by SIGTERM.

    Raises:
        Exception: Anything that is not the user's input is a defect and keeps its traceback.

    Example:
        >>> main(["--version"])
        camtrain 0.1.0
        0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help())
        return 0 if words else 2
    if words[0] == "--version":
        sys.stdout.write(f"camtrain {__version__}\n")
        return 0
    return guarded(lambda: _command(words[0])(words[1:]))


def _help() -> str:
    width = max(map(len, COMMANDS))
    return _HELP.format(commands="\n".join(f"  {name:<{width}}   {line}" for name, (_, line) in COMMANDS.items()))


def _command(name: str) -> Callable[[list[str]], None]:
    if name not in COMMANDS:
        raise InputError(f"camtrain has no command {name!r}{nearest(name, COMMANDS)}: camtrain --help lists them")
    module, function = COMMANDS[name][0].split(":")
    found: Callable[[list[str]], None] = getattr(importlib.import_module(module), function)
    return found


if __name__ == "__main__":
    sys.exit(main())
