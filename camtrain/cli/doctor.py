"""`camtrain doctor`: what is wrong or suspicious with data and config, before an hour is lost."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtrain._errors import InputError
from camtrain.cli import surroundings
from camtrain.cli.consoles import wide_console
from camtrain.cli.exits import Parser, input_sentence
from camtrain.cli.words import split_words

if TYPE_CHECKING:
    from rich.console import Console

    from camtrain.doctor import Examination, Finding
    from camtrain.doctor.facts import Facts
    from camtrain.reporting.doctor_page import DoctorTable

_DESCRIPTION = """\
Read a config, or a manifest with its organ table, and say in one page what is wrong or suspicious, worst first: files,
headers, voxel grids, intensities, labels, splits, patients, duplicates, organs; and with a config memory and time of an
epoch and the size of a map's cell beside the organs. Nothing is trained, no file is changed, no GPU is needed.

Headers are read first, and how long a full read takes is said before it begins; --headers-only stops there.

  camtrain doctor --config configs/real_ct.yaml --data.manifest cases.csv --out doctor.html
  camtrain doctor --manifest cases.csv --table totalsegmentator_chest --headers-only

Options of the config can be set behind it, as in camtrain fit. Exit codes: 2 training would fail, 0 it would not."""

_SHOWN = {"error": 50, "warning": 3, "note": 3}  # places of a finding on the terminal: of what must be mended all
_COLOURS = {"error": "bold red", "warning": "yellow", "note": "blue"}


@dataclass
class _Patient:
    """What is to be looked at, as far as it could be made."""

    facts: Facts | None = None
    data: Any = None
    model: Any = None
    watches: list[Any] = field(default_factory=list)
    unbuilt: str = ""


def doctor(args: Sequence[str]) -> None:
    """Examine data and config.

    Raises:
        InputError: An option is wrong.
        SystemExit: 2, training would fail.
    """
    options, more = _parser().parse_known_args(list(args))
    _check_options(options, more)
    surroundings.prepare()
    warnings.filterwarnings("ignore", message=r".*self\.trainer. reference is not registered.*")
    from camtrain.doctor import Extent, examine
    from camtrain.doctor.digest import page_of
    from camtrain.reporting.doctor_page import write_doctor_page

    console = wide_console()
    patient = _of_config(options, more) if options.config else _of_manifest(options)
    found = examine(
        facts=patient.facts,
        data=patient.data,
        model=patient.model,
        watches=patient.watches,
        extent=Extent(
            headers_only=options.headers_only,
            workers=options.workers,
            cases=options.cases,
            network=not options.no_network,
            device=options.device,
        ),
        say=lambda text: console.print(text, highlight=False, markup=False),
        unbuilt=patient.unbuilt,
    )
    if options.config and patient.model is None:
        found.left_out.append("the network: it is made when config and data are right")
    page = page_of(found, shlex.join(["camtrain", "doctor", *args]))
    _show(console, found, page.tables)
    if options.out:
        try:
            written = write_doctor_page(page, Path(options.out))
        except OSError as error:
            raise InputError(f"--out {options.out} cannot be written ({error.strerror}): choose another") from error
        console.print(f"page: {written}", soft_wrap=True, highlight=False, markup=False)
    if found.fails:
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("camtrain doctor", _DESCRIPTION)
    add = parser.add_argument
    add("--config", action="append", default=[], metavar="YAML", help="config of a training; may be repeated")
    add("--manifest", metavar="CSV", help="a manifest alone, without a config")
    add("--table", metavar="YAML", help="its organ table: a file, or the name of a shipped one")
    add("--labels", metavar="A,B", help="its label columns (default: all)")
    add("--out", metavar="HTML", help="also write one self-contained page")
    add("--headers-only", "--headers_only", action="store_true", help="stop when headers are read")
    add("--workers", type=int, default=_cores(), metavar="N", help=f"threads that read (default: {_cores()})")
    add("--cases", type=int, metavar="N", help="of data without a manifest: at most N cases of each split")
    add("--no-network", "--no_network", action="store_true", help="do not try the network of the config on a batch")
    add("--device", default="cpu", help="where the network is tried (default: cpu)")
    return parser


def _cores() -> int:
    return min(8, os.cpu_count() or 1)


def _check_options(options: argparse.Namespace, more: Sequence[str]) -> None:
    if bool(options.config) == bool(options.manifest):
        raise InputError("camtrain doctor expects --config, or --manifest with --table: one of them")
    if options.manifest and options.table is None:
        raise InputError("--manifest expects --table as well: a YAML file, or the name of a shipped organ table")
    if options.config and (options.table or options.labels):
        raise InputError("--table and --labels go with --manifest; with a config write --data.table, --data.labels")
    if more and options.manifest:
        raise InputError(f"unknown option {more[0]}; see camtrain doctor --help (options of the data need --config)")
    for name, number in (("--workers", options.workers), ("--cases", options.cases)):
        if number is not None and number < 1:
            raise InputError(f"{name} expects 1 or more, got {number}")
    if options.config and (missing := [file for file in options.config if not Path(file).is_file()]):
        raise InputError(f"--config expects a file, got {missing[0]}, which does not exist: correct the path")
    if options.device != "cpu":
        from camtrain.cli.subject import find_device

        find_device(options.device)
    if options.out:
        _check_out(Path(options.out))


def _check_out(out: Path) -> None:
    """Before anything is read; a mistyped name shall not replace somebody's file."""
    from camtrain.reporting.doctor_page import is_doctor_page

    if out.is_dir():
        raise InputError(f"--out expects a file, got the folder {out}: add a name such as doctor.html")
    if out.exists() and not is_doctor_page(out):
        raise InputError(f"--out {out} is another file than a page of camtrain doctor: choose another name")


def _of_manifest(options: argparse.Namespace) -> _Patient:
    arguments: dict[str, Any] = {"manifest": options.manifest, "table": options.table}
    if options.labels:
        arguments["labels"] = split_words(options.labels)
    return _of_arguments(arguments)


def _of_arguments(arguments: Mapping[str, Any], kind: type | None = None) -> _Patient:
    """Of a manifest's data module, or of what can be read of a manifest that it refuses."""
    from camtrain.data.manifest_look import not_looking
    from camtrain.data.manifest_module import ManifestDataModule
    from camtrain.doctor.gathering import facts_of_refused

    try:
        with not_looking():
            return _Patient(data=(kind or ManifestDataModule)(**arguments))
    except InputError as error:
        return _Patient(facts=facts_of_refused(arguments, str(error)))


def _of_config(options: argparse.Namespace, more: Sequence[str]) -> _Patient:
    """Data, network and callbacks of a config. Loggers are left out: some make folders."""
    from camtrain.cli.lightning_cli import CamtrainCLI
    from camtrain.doctor.facts import Facts

    words = [word for file in options.config for word in ("--config", file)]
    source = ", ".join(options.config)
    try:
        cli = CamtrainCLI("fit", [*words, *more, "--trainer.logger=false"], until="parsed")
    except Exception as error:
        if (sentence := input_sentence(error)) is None:
            raise
        return _Patient(facts=Facts(source, config=sentence))
    data = cli.config["fit"].get("data")
    if data is None:
        return _Patient(facts=Facts(source, config="the config names no data module (data.class_path)"))
    patient = _Patient()
    kind = _manifest_module(data["class_path"])
    if kind is not None:
        patient = _of_arguments(data["init_args"].as_dict(), kind)
    if patient.facts is None:
        _build(cli, patient, kind is not None, source)
    return patient


def _manifest_module(class_path: str) -> type | None:
    """The class, where it reads a manifest."""
    from camtrain.data.manifest_module import ManifestDataModule

    module, _, name = class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None)  # the parser has found it already
    return found if isinstance(found, type) and issubclass(found, ManifestDataModule) else None


def _build(cli: Any, patient: _Patient, of_manifest: bool, source: str) -> None:
    """Everything else of the config; what cannot be made is a finding."""
    from camtrain.doctor.facts import Facts

    try:
        cli.build()
    except Exception as error:
        if (sentence := input_sentence(error)) is None:
            raise
        if of_manifest:
            patient.unbuilt = sentence
        else:
            patient.facts = Facts(source, refused=sentence)
        return
    patient.data, patient.model = cli.datamodule, cli.model
    patient.watches = _watches(cli.config_init["fit"]["trainer"].get("callbacks"))


def _watches(callbacks: Any) -> list[Any]:
    from camtrain.callbacks import AttentionMonitor, MaskLossCallback
    from camtrain.doctor.network import Watch

    listed = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks] if callbacks else []
    found = []
    for callback in listed:
        if isinstance(callback, MaskLossCallback):
            found.append(Watch("MaskLossCallback", callback.layer, callback.method, callback.loss_fn))
        elif isinstance(callback, AttentionMonitor):
            found.append(Watch("AttentionMonitor", callback.layer))
    return found


def _show(console: Console, found: Examination, tables: Sequence[DoctorTable]) -> None:
    from rich.table import Table
    from rich.text import Text

    for table in tables:
        heading, says = Text(table.heading), Text(table.says) if table.says else None
        shown = Table(title=heading, title_justify="left", caption=says, caption_justify="left")
        for index, column in enumerate(table.columns):
            shown.add_column(Text(column), overflow="fold", justify="right" if index else "left")
        for row in table.rows:
            shown.add_row(*map(Text, row))
        console.print(shown)
    for finding in found.findings:
        _show_finding(console, finding)
    for reason in found.left_out:
        console.print(f"not looked at: {reason}", highlight=False, markup=False)
    from camtrain.doctor.digest import verdict

    console.print(verdict(found), style="bold red" if found.fails else "bold", highlight=False, markup=False)


def _show_finding(console: Console, finding: Finding) -> None:
    from rich.text import Text

    console.print(
        Text.assemble((finding.severity, _COLOURS[finding.severity]), f"  {finding.title}  [{finding.check}]")
    )
    for word, text in (("expected", finding.expected), ("came", finding.got), ("do", finding.todo)):
        console.print(f"    {word}: {text}", highlight=False, markup=False)
    shown = _SHOWN[finding.severity]
    for place in finding.places[:shown]:
        words = [place.where + (f" (id {place.id!r})" if place.id else ""), place.got, place.file]
        # Unbroken, so that paths can be copied.
        console.print("    " + ": ".join(word for word in words if word), soft_wrap=True, highlight=False, markup=False)
    if len(finding.places) > shown:
        console.print(f"    and {len(finding.places) - shown:,} more", highlight=False)
