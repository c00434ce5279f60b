"""`camtrain study`: readers say which finding a map shows, and which of two maps is more reasonable."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from camtrain._errors import InputError, nearest
from camtrain.cli import surroundings
from camtrain.cli.exits import Parser
from camtrain.cli.folder import check_writable
from camtrain.cli.subject import rebuild_subject
from camtrain.cli.words import read_methods, split_words

_USAGE = """\
usage: camtrain study make    --ckpt_path A.ckpt [--against B.ckpt] --out DIR [options]
       camtrain study analyse --key DIR/key.json ANSWERS.csv [ANSWERS.csv ...] [--out DIR] [options]

make writes one page that readers open offline, and the key to it; analyse reads what they send back.
camtrain study make --help and camtrain study analyse --help list the options.
"""

_MAKE = """\
Make a blinded reader study. DIR then holds study.html, one file for readers (no network; answers stay in the browser
until they are saved as CSV), and key.json, which tells what every picture shows: do not hand it out.

Two kinds of tasks: which finding does the map show (discrimination), and which of two maps is more reasonable (trust;
two models with --against, else the methods of one). Trust shows only findings that both models rightly find.

  camtrain study make --ckpt_path masked.ckpt --against plain.ckpt --methods hirescam,gradcam --out study"""

_ANALYSE = """\
Analyse the answers to a reader study: accuracy by method beside chance, paired differences, trust scores, agreement,
all with intervals. With --out, DIR then holds analysis.json, scores.csv, readers.csv and analysis.md.

  camtrain study analyse --key study/key.json answers_*.csv --out study/analysis"""


def study(args: Sequence[str]) -> None:
    """Make or analyse a reader study.

    Raises:
        InputError: An option or a file is not as it should be.
    """
    actions = {"make": _make, "analyse": _analyse, "analyze": _analyse}
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        if not args:
            raise InputError("camtrain study expects make or analyse")
        return
    if args[0] not in actions:
        raise InputError(f"camtrain study has no action {args[0]!r}{nearest(args[0], ('make', 'analyse'))}")
    actions[args[0]](list(args[1:]))


def _make(args: list[str]) -> None:
    options, more = _make_parser().parse_known_args(args)
    if more and not options.config:
        raise InputError(
            f"unknown option {more[0]}; see camtrain study make --help (options of the data need --config)"
        )
    out = Path(options.out)
    _check_free(out, options.overwrite)
    surroundings.prepare()
    from camtrain.evaluation.reader_study_cases import Contestant
    from camtrain.evaluation.reader_study_making import make_study, save_study

    given = {"A": (options.ckpt_path, options.config)}
    if options.against:
        given["B"] = (options.against, options.against_config or options.config)
    contestants = []
    for name, (path, configs) in given.items():
        subject = rebuild_subject(path, configs, more, options.device, options.trust)
        contestants.append(Contestant(name, subject.model, subject.data))
    made = make_study(
        contestants,
        methods=read_methods(options.methods),
        layer=options.layer,
        split=options.split,
        cases=options.cases,
        labels=split_words(options.labels) or None,
        kinds=split_words(options.kinds) or None,
        choices=options.choices,
        cut=options.cut,
        seed=options.seed,
        limit=options.limit,
        title=options.title,
        width=options.width,
    )
    page, key = save_study(made, out)
    for note in made.notes:
        sys.stdout.write(f"note: {note}\n")
    sys.stdout.write(f"{len(made.page.tasks)} tasks for readers: {page}\nkey, not for readers: {key}\n")


def _make_parser() -> argparse.ArgumentParser:
    parser = Parser("camtrain study make", _MAKE)
    add = parser.add_argument
    add("--ckpt_path", required=True, metavar="CKPT", help="checkpoint of a fit: model A")
    add("--out", required=True, metavar="DIR", help="folder of the page and the key")
    add("--against", metavar="CKPT", help="a second checkpoint: model B")
    add("--config", action="append", default=[], metavar="YAML", help="config of the training; may be repeated")
    add("--against_config", action="append", default=[], metavar="YAML", help="its config (default: --config)")
    add("--methods", default="hirescam", metavar="A,B", help="see camtrain methods; or YAML, for options")
    add("--layer", help="see camtrain layers (default: the last feature map)")
    add("--split", default="test", help="val, or a test split (default: test)")
    add("--cases", type=int, default=20, metavar="N", help="cases of each kind of task (default: 20)")
    add("--labels", metavar="A,B", help="findings to ask about and to choose among (default: all)")
    add("--kinds", metavar="A,B", help="discrimination, trust (default: both, where two maps can be compared)")
    add("--choices", type=int, default=4, metavar="N", help="answers of a discrimination (default: 4)")
    add("--cut", type=float, default=0.5, help="found means probability >= CUT (default: 0.5)")
    add("--limit", type=int, metavar="N", help="look at the first N cases of the split")
    add("--title", default="Reader study", help="heading of the page; it must not tell what is compared")
    add("--width", type=int, default=600, metavar="PIXELS", help="of a picture (default: 600)")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="cpu, cuda, ... (default: a GPU where there is one)")
    add("--trust", action="store_true", help="build classes outside camtrain that the checkpoint names")
    add("--overwrite", action="store_true", help="replace an earlier study in DIR: its answers lose their key")
    return parser


def _analyse_parser() -> argparse.ArgumentParser:
    parser = Parser("camtrain study analyse", _ANALYSE)
    add = parser.add_argument
    add("answers", nargs="+", metavar="CSV", help="what readers sent back")
    add("--key", required=True, metavar="JSON", help="key.json of the study")
    add("--out", metavar="DIR", help="folder of the tables (default: only the terminal)")
    add("--repeats", type=int, default=2000, help="resamplings (default: 2000)")
    add("--level", type=float, default=0.95, help="of the intervals (default: 0.95)")
    add("--seed", type=int, default=0)
    return parser


def _analyse(args: list[str]) -> None:
    options = _analyse_parser().parse_args(args)
    from camtrain.cli.consoles import wide_console
    from camtrain.evaluation.reader_study import read_key
    from camtrain.evaluation.reader_study_analysis import analyse_study
    from camtrain.evaluation.reader_study_answers import collect_answers
    from camtrain.evaluation.reader_study_saving import print_study, save_result

    if options.out:
        check_writable(Path(options.out))
    key = read_key(options.key)
    result = analyse_study(key, collect_answers(key, options.answers), options.repeats, options.level, options.seed)
    print_study(wide_console(), result)
    if options.out:
        for path in save_result(result, Path(options.out)):
            sys.stdout.write(f"{path}\n")


def _check_free(out: Path, overwrite: bool) -> None:
    """A lost key makes answers worthless, so that no study is replaced unasked."""
    check_writable(out)
    taken = [name for name in ("study.html", "key.json") if (out / name).exists()]
    if taken and not overwrite:
        raise InputError(
            f"--out {out} holds a study ({taken[0]}), whose key would be lost: choose another, or --overwrite"
        )
