"""Exit codes: what is the user's input becomes one line and code 2, everything else keeps its traceback."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from camtrain._errors import InputError

_KEY = re.compile(r'Parser key "([^"]+)":?\s*')
# Lines by which jsonargparse wraps the one that says what is wrong.
_WRAPPING = ("Does not validate", "Subtypes:", "Errors:", "Problem with given class_path", "Given value")
_NO_CHOICE = "Expected a NoneType"


def guarded(action: Callable[[], object]) -> int:
    """Run `action` and return the exit code.

    Raises:
        Exception: Whatever is not the user's input.

    Example:
        >>> guarded(lambda: None)
        0
    """
    code = 1
    try:
        code = _code_of(action)
    finally:
        _finish_wandb(code)
    return code


def _finish_wandb(code: int) -> None:
    """Close an open W&B run while Python is whole: left to the interpreter's end it aborts the process (code 134)."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish(exit_code=code)


def _code_of(action: Callable[[], object]) -> int:
    try:
        action()
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as stop:
        # Lightning shuts down by itself after Ctrl+C and then leaves with 1.
        if isinstance(stop.__context__, KeyboardInterrupt):
            return _interrupted()
        if type(stop).__name__ == "SIGTERMException":
            sys.stderr.write("ended by SIGTERM\n")
            return 143
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        sentence = input_sentence(error)
        if sentence is None:
            raise
        sys.stderr.write(f"error: {sentence}\n")
        return 2
    return 0


def _interrupted() -> int:
    sys.stderr.write("interrupted\n")
    return 130


def input_sentence(error: BaseException) -> str | None:
    """The sentence of the `InputError` in or below `error`, or of a refused option or config; None for a defect.

    Example:
        >>> input_sentence(InputError("expected 3 labels, got 2"))
        'expected 3 labels, got 2'
        >>> input_sentence(KeyError("x")) is None
        True
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return _one_line(str(cause))
        cause = cause.__cause__
    return refused_option(str(error)) if isinstance(error, argparse.ArgumentError) else None


def _one_line(message: str) -> str:
    r"""A worker of a DataLoader sends its traceback along; the sentence is what follows the exception's name.

    Example:
        >>> print(_one_line("cases.csv: 2 faults\n- row 2: a\n  b\n- row 3: c"))
        cases.csv: 2 faults
        - row 2: a
        b
        - row 3: c
    """
    if "Original Traceback" in message:
        message = re.split(r"^[\w.]*Error: ", message, flags=re.MULTILINE)[-1]
    if "\n- " in message:  # several faults of one input, one line each
        return "\n".join(" ".join(line.split()) for line in message.splitlines() if line.strip())
    return " ".join(message.split())


def refused_option(message: str) -> str:
    r"""What jsonargparse says in a tree, in one line: the key and the innermost reason.

    Example:
        >>> refused_option('Parser key "data":\n  Errors:\n    - Parser key "cases":\n      Expected a <class \'int\'>')
        'data.cases: Expected a int; see --help, or the header of the config'
    """
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message)
    keys = _KEY.findall(message)
    lines = [_KEY.sub("", line).strip().removeprefix("-").strip() for line in message.splitlines()]
    reasons = [line for line in lines if line and not line.startswith(_WRAPPING)]
    telling = [line for line in reasons if not line.startswith(_NO_CHOICE)] or reasons or [message.strip()]
    where = ".".join(dict.fromkeys(keys))
    reason = " ".join(telling[0].split()).rstrip(".")
    return f"{where + ': ' if where else ''}{reason}; see --help, or the header of the config"


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are `InputError`s, like all others; options are not abbreviated."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise InputError(f"{message}; see {self.prog} --help")
