"""`camtrain evaluate`: a trained model in numbers that a reviewer would accept."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtrain._errors import InputError
from camtrain.cli import surroundings
from camtrain.cli.exits import Parser
from camtrain.cli.folder import check_writable
from camtrain.cli.subject import Subject, rebuild_subject
from camtrain.cli.words import read_methods, read_yaml, split_words

if TYPE_CHECKING:
    from camtrain.evaluation.evaluation import Evaluation
    from camtrain.evaluation.sanity_table import SanityTable

_DESCRIPTION = """\
Measure where a trained model looks and what it uses: methods x layers x measures on every split, with bootstrap
intervals over cases (patients, where they are known). DIR then holds scores.csv (one tidy table), scores.json,
thresholds.json, report.html (tables and plots, no server needed) and cases.jsonl, the raw numbers of every finished
case: after an interruption the same command goes on where it stopped.

Options of the config can be set behind it, for example --data.test_cases 50, when --config is given.

  camtrain evaluate --ckpt_path runs/phantom/best.ckpt --methods hirescam,gradcam --out evaluation
  camtrain evaluate --ckpt_path masked.ckpt --against plain.ckpt --measures free,reliance --out compared"""


def evaluate(args: Sequence[str]) -> None:
    """Score a checkpoint.

    Raises:
        InputError: An option, a checkpoint or the data is not as it should be.
    """
    options, more = _parser().parse_known_args(list(args))
    if more and not options.config:
        raise InputError(f"unknown option {more[0]}; see camtrain evaluate --help (options of the data need --config)")
    _check_folder(Path(options.out))
    if options.sanity < 0:
        raise InputError(f"--sanity expects a number of cases, got {options.sanity}")
    surroundings.prepare()
    from camtrain.evaluation.against import set_against
    from camtrain.evaluation.saving import save_evaluation

    out = Path(options.out)
    checkpoints, against = [str(options.ckpt_path)], None
    subject, baseline = rebuild_subject(options.ckpt_path, options.config, more, options.device, options.trust), None
    if options.against:
        baseline = rebuild_subject(
            options.against, options.against_config or options.config, more, options.device, options.trust
        )
        _check_labels(options, subject, baseline)
    with _keeping(out):
        first = _evaluated(options, subject, out)
    if baseline is not None:
        with _keeping(out / "against"):
            other = _evaluated(options, baseline, out / "against")
        # What was asked about comes second, so that a difference above 0 means that it has more.
        against = set_against(other, first)
        checkpoints = [str(options.against), str(options.ckpt_path)]
    said: dict[str, Any] = {
        "against": against,
        "title": Path(options.ckpt_path).name,
        "checkpoints": checkpoints,
        "command": shlex.join(["camtrain", "evaluate", *args]),
    }
    page, sanity = save_evaluation(first, out, **said), None
    if options.sanity:
        # After the scores are on disk: nothing that was computed is lost by what the check may refuse.
        sanity = _sanity(options, subject)
        save_evaluation(first, out, **said, sanity=sanity)
    _show(first, against, sanity)
    sys.stdout.write(f"table: {out / 'scores.csv'}\nreport: {page}\n")


@contextmanager
def _keeping(out: Path) -> Iterator[None]:
    """Say what an interruption leaves."""
    try:
        yield
    except KeyboardInterrupt:
        cases = out / "cases.jsonl"
        done = cases.read_text(encoding="utf-8").count("\n") if cases.exists() else 0
        sys.stderr.write(f"\n{done} finished cases are kept in {out}; the same command goes on there\n")
        raise


def _parser() -> argparse.ArgumentParser:
    parser = Parser("camtrain evaluate", _DESCRIPTION)
    add = parser.add_argument
    add("--ckpt_path", required=True, metavar="CKPT", help="checkpoint of a fit")
    add("--out", required=True, metavar="DIR", help="folder of the results; an interrupted evaluation goes on there")
    add("--config", action="append", default=[], metavar="YAML", help="config of the training; may be repeated")
    add("--against", metavar="CKPT", help="a second checkpoint (a baseline): paired comparison on the same cases")
    add("--against_config", action="append", default=[], metavar="YAML", help="its config (default: --config)")
    add("--methods", default="hirescam", metavar="A,B", help="see camtrain methods; or YAML, for options")
    add("--layers", metavar="A,B", help="see camtrain layers (default: the last feature map)")
    add("--measures", default="free", metavar="A,B", help="names, or free, paid, reliance, all (default: free)")
    add("--cases", default="positives", help="pairs to look at: positives (default), correct, fn, fp, all")
    add("--cut", type=float, default=0.5, help="predicted means probability >= CUT (default: 0.5)")
    add("--splits", metavar="A,B", help="default: val and every test split; val chooses OrganIoU's thresholds")
    add("--thresholds", metavar="JSON", help="frozen OrganIoU thresholds: thresholds.json of an earlier evaluation")
    add("--at", default="layer", choices=("layer", "image"), help="grid of the scores (default: the layer's)")
    add("--replacements", default="case,air,blur", metavar="A,B", help="of shortcut reliance (default: case,air,blur)")
    add("--trained_with", default="", metavar="A,B", help="replacements used in training, which cannot judge it")
    add("--baseline", default="air", help="hidden voxels of average drop, insertion, deletion: air, mean, blur, number")
    add("--air", type=float, help="intensity of air, where images are not in 0..1")
    add("--seam", type=int, default=1, help="voxels over which a replaced region fades in (default: 1; 0 cuts hard)")
    add("--steps", type=int, default=20, help="steps of insertion and deletion (default: 20)")
    add("--contrast_labels", default="4", metavar="N", help="other labels per case for class sensitivity, or all")
    add("--tolerance_mm", type=float, help="radius of the pointing game in mm (default: the very cell)")
    add("--authors_edge_case", action="store_true", help="OrganIoU as in the published code")
    add("--groups", metavar="YAML", help="rows for groups of labels: '{lungs: [nodule, effusion]}', or a file")
    add("--repeats", type=int, default=2000, help="bootstrap repeats (default: 2000)")
    add("--level", type=float, default=0.95, help="of the intervals (default: 0.95)")
    add("--seed", type=int, default=0)
    add("--limit", type=int, metavar="N", help="at most N cases of each split")
    add("--sanity", type=int, default=0, metavar="N", help="also randomise the weights and compare maps of N cases")
    add("--device", default="auto", help="cpu, cuda, ... (default: a GPU where there is one)")
    add("--trust", action="store_true", help="build classes outside camtrain that the checkpoint names")
    add("--overwrite", action="store_true", help="throw away an earlier evaluation in DIR")
    return parser


def _check_labels(options: argparse.Namespace, subject: Subject, baseline: Subject) -> None:
    """Before hours are spent on two models that cannot be compared."""
    ours, theirs = (getattr(each.model, "labels", None) for each in (subject, baseline))
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and sorted(ours) != sorted(theirs):
        raise InputError(
            f"{options.ckpt_path} has the labels {', '.join(map(str, ours))}, but {options.against} has "
            f"{', '.join(map(str, theirs))}: compare models of the same labels"
        )


def _evaluated(options: argparse.Namespace, subject: Subject, out: Path) -> Evaluation:
    from camtrain.evaluation.evaluating import evaluate as measure

    return measure(
        subject.model,
        subject.data,
        methods=read_methods(options.methods),
        layers=_layers(options.layers),
        measures=split_words(options.measures),
        cases=options.cases,
        cut=options.cut,
        splits=split_words(options.splits) or None,
        thresholds=options.thresholds,
        at=options.at,
        replacements=split_words(options.replacements),
        trained_with={*subject.trained, *split_words(options.trained_with)},
        baseline=_number_or_word(options.baseline),
        air=options.air,
        seam=options.seam,
        steps=options.steps,
        contrast_labels=_contrast(options.contrast_labels),
        tolerance_mm=options.tolerance_mm,
        authors_edge_case=options.authors_edge_case,
        groups=_groups(options.groups),
        repeats=options.repeats,
        level=options.level,
        seed=options.seed,
        limit=options.limit,
        out=out,
        overwrite=options.overwrite,
    )


def _sanity(options: argparse.Namespace, subject: Subject) -> SanityTable:
    """Cascading randomisation, on the first cases of the first split that have a finding."""
    import torch

    from camtrain.evaluation.reading_cases import CaseReader, splits_of
    from camtrain.evaluation.sanity import sanity_check

    split, batches = next(iter(splits_of(subject.data, split_words(options.splits) or None).items()))
    found: list[Any] = []
    for case in CaseReader(subject.model).cases(split, batches):
        # Cases are compared together, so that all of them have the size of the first.
        fits = not found or case.image.shape == found[0].image.shape
        found += [case] if fits and bool((case.label == 1).any()) else []
        if len(found) == options.sanity:
            break
    if not found:
        raise InputError(f"--sanity: no case of {split} has a finding, so there is nothing to explain")
    images, truths = (torch.cat([getattr(case, name) for case in found]) for name in ("image", "label"))
    # Guided backprop needs ReLUs; a map that is the same for every label fails on any net.
    controls = [{"name": "relevancecam", "contrast": "none"}]
    return sanity_check(
        subject.model,
        images,
        read_methods(options.methods),
        _layers(options.layers),
        label=truths,
        stages=8,
        seed=options.seed,
        controls=controls,
    )


def _check_folder(out: Path) -> None:
    """A folder of ours, or an empty one; nothing is deleted before the first case has been read."""
    check_writable(out)
    others = [path.name for path in out.iterdir() if path.name not in _OURS] if out.exists() else []
    if others:
        raise InputError(f"--out {out} holds other files than those of camtrain evaluate ({others[0]}): choose another")


_OURS = {
    *("cases.jsonl", "settings.json", "scores.csv", "scores.json", "thresholds.json", "report.html"),
    *("comparison.csv", "sanity.csv", "against"),
}


def _layers(text: str | None) -> list[str | None]:
    """None stands for the last feature map."""
    return list(split_words(text)) or [None]


def _groups(text: str | None) -> dict[str, list[str]] | None:
    if text is None:
        return None
    source = Path(text).read_text(encoding="utf-8") if Path(text).is_file() else text
    found = read_yaml(source, "--groups")
    usable = isinstance(found, dict) and all(isinstance(labels, list) for labels in found.values())
    if not usable:
        raise InputError(f"--groups expects '{{lungs: [nodule, effusion]}}' or a YAML file with that, got {text!r}")
    return {str(name): [str(label) for label in labels] for name, labels in found.items()}


def _number_or_word(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _contrast(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdigit():
        raise InputError(f"--contrast_labels expects a number of labels, or all, got {text!r}")
    return int(text)


def _show(found: Evaluation, against: Any, sanity: SanityTable | None) -> None:
    """The averages in the terminal; all else is in the files."""
    from rich.console import Console

    from camtrain.reporting.evaluation_terminal import print_summary

    console = Console()
    print_summary(console, found.rows, () if against is None else against.rows)
    if sanity is not None:
        console.print(sanity)
    for note in found.notes:
        sys.stdout.write(f"note: {note}\n")
