"""`camtrain report`: the page of a run built anew, or two runs side by side on one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from camtrain._errors import InputError
from camtrain.cli.exits import Parser

_TEXT = """\
Build the report of a run anew from its folder, or set two runs side by side on one page.

A run's folder is <log folder>/camtrain/<run id>, as AttentionMonitor writes it; a folder above it will do where it
holds one run only. The page is one file: no server, no account, no connection.

  camtrain report runs/phantom/version_0
  camtrain report runs/plain runs/masked --names plain,"mask loss" --out compared.html"""


def report(args: Sequence[str]) -> None:
    """Build the page of one run or two, and say where it is.

    Raises:
        InputError: A folder is no run, or an option is wrong.
    """
    options = _parser().parse_args(list(args))
    if len(options.runs) > 2:
        raise InputError(f"camtrain report takes one run or two, got {len(options.runs)}")
    if options.out and Path(options.out).is_dir():
        raise InputError(f"--out expects a file, got the folder {options.out}: add a name such as report.html")
    names = None if options.names is None else [name.strip() for name in options.names.split(",")]
    if names is not None and len(names) != len(options.runs):
        raise InputError(f"--names expects a name for each of {len(options.runs)} runs, got {len(names)}")
    from camtrain.reporting import write_run_comparison, write_run_report

    try:
        if len(options.runs) == 2:
            path = write_run_comparison(options.runs[0], options.runs[1], out=options.out, names=names)
        else:
            path = write_run_report(options.runs[0], out=options.out, name=None if names is None else names[0])
    except OSError as error:
        raise InputError(f"the page cannot be written ({error.strerror or error}): choose another --out") from error
    sys.stdout.write(f"report: {path}\n")


def _parser() -> Parser:
    parser = Parser("camtrain report", _TEXT)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run; two are compared, the first is A")
    parser.add_argument("--out", metavar="FILE", help="default: report.html in the run, of two report_against_<A>.html")
    parser.add_argument("--names", metavar="A,B", help="what to call the runs (default: their ids)")
    return parser
