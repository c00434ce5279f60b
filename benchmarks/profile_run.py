"""Where the processor time of a script goes: what a plain training does, and what is camtrain's.

    python benchmarks/profile_run.py recipes/phantom_before_after.py
    python benchmarks/profile_run.py -m camtrain fit --config configs/phantom.yaml

Options stand before the script: `--out FOLDER` (runs/profile), `--every MS` (4). A timer of processor time interrupts
the main thread; each sample counts the processor time since the one before, so that a long call of torch counts in
full and what others do on the machine does not. Prints the share of each group and of camtrain's functions (with what
they call of torch), and writes `groups.csv` and `stacks.txt` (collapsed, for flamegraph.pl or speedscope.app).
Backward passes are one group: what the mask loss adds to them shows between a run with it and one without.
"""

from __future__ import annotations

import argparse
import csv
import resource
import runpy
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

from _pairs import machine

# Read from the outermost frame inwards: where the frames of a stack lead to. An entry with "!" is final, others give
# way to what is called further in. Part of a path (and function) -> group.
PLAIN, OURS = "plain", "ours"
GROUPS: list[tuple[str, str, str, str]] = [
    ("<frozen importlib", "", PLAIN, "!imports"),
    ("camtrain/cli/", "", OURS, "command line"),
    ("jsonargparse/", "", PLAIN, "command line: jsonargparse"),
    ("pytorch_lightning/", "", PLAIN, "Lightning"),
    ("pytorch_lightning/loggers/", "", PLAIN, "loggers"),
    ("pytorch_lightning/callbacks/progress/", "", PLAIN, "!progress bar"),
    ("torch/utils/data/", "", PLAIN, "collating"),
    ("torch/utils/data/_utils/collate.py", "", PLAIN, "!collating"),
    ("camtrain/data/", "", OURS, "data: handed out, transforms"),
    ("camtrain/data/phantom_dataset.py", "_make", OURS, "!data: cases of the phantom are made"),
    ("torch/optim/", "", PLAIN, "optimizer"),
    ("torch/autograd/", "", PLAIN, "backward"),
    ("torch/_tensor.py", "backward", PLAIN, "backward"),
    ("camtrain/models/_label_scores.py", "", OURS, "!scores of LitClassifier"),
    ("camtrain/models/lit_classifier.py", "_log_scores", OURS, "!scores of LitClassifier"),
    ("camtrain/models/lit_classifier.py", "_step", PLAIN, "network's step"),
    ("camtrain/models/", "forward", PLAIN, "network's step"),
    ("camtrain/cam/watch.py", "", OURS, "hooks on the network"),
    ("camtrain/cam/tap.py", "", OURS, "hooks on the network"),
    ("camtrain/callbacks/mask_loss.py", "", OURS, "mask loss"),
    ("camtrain/callbacks/_seen.py", "", OURS, "!share of the image seen"),
    ("camtrain/callbacks/outside_swap.py", "", OURS, "outside swap"),
    ("camtrain/callbacks/attention_monitor.py", "", OURS, "monitor: the rest"),
    ("camtrain/callbacks/_step_maps.py", "", OURS, "monitor: maps"),
    ("camtrain/callbacks/_scores.py", "", OURS, "!monitor: scores"),
    ("camtrain/callbacks/_context.py", "allowed_on_grids", OURS, "!monitor: regions"),
    ("camtrain/callbacks/_panel.py", "", OURS, "!monitor: pictures"),
    ("camtrain/callbacks/_case_scores.py", "", OURS, "!monitor: pictures"),
    ("camtrain/callbacks/_pictures.py", "publish_pictures", OURS, "!monitor: pictures"),
    ("camtrain/callbacks/_publish.py", "log_scores", OURS, "!monitor: logging of the scores"),
    ("camtrain/callbacks/_publish.py", "check_clashes", OURS, "!monitor: logging of the scores"),
    ("camtrain/callbacks/_publish.py", "write", OURS, "monitor: files and loggers"),
    ("camtrain/callbacks/_recording.py", "", OURS, "!monitor: report"),
    ("camtrain/callbacks/_alarm_questions.py", "", OURS, "!monitor: alarms' forwards"),
    ("camtrain/callbacks/_alarms.py", "", OURS, "monitor: alarms' rules"),
    ("camtrain/cam/explaining.py", "", OURS, "!explain"),
    ("camtrain/reporting/run_report.py", "write_run_comparison", OURS, "!the page of both runs"),
    ("camtrain/reporting/montage.py", "side_by_side", OURS, "!picture at the end"),
]
Found = tuple[str, str, bool]


class Sampler:
    """Counts processor seconds per stack of the main thread.

    Args:
        every: Processor seconds between two samples.
    """

    def __init__(self, every: float) -> None:
        self.every, self.stacks = every, Counter[tuple[CodeType, ...]]()
        self._last = 0.0

    def start(self) -> None:
        """Begin."""
        signal.signal(signal.SIGPROF, self._sample)
        self._last = time.thread_time()
        signal.setitimer(signal.ITIMER_PROF, self.every, self.every)

    def stop(self) -> None:
        """End; what was counted stays."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, signal.SIG_IGN)

    def _sample(self, number: int, frame: FrameType | None) -> None:
        now = time.thread_time()
        stack = []
        while frame is not None:
            stack.append(frame.f_code)
            frame = frame.f_back
        self.stacks[tuple(reversed(stack))] += now - self._last  # type: ignore[assignment]
        self._last = time.thread_time()  # what the sample itself took is nobody's


def group_of(stack: tuple[CodeType, ...], known: dict[CodeType, list[Found]]) -> tuple[str, str]:
    """Whose time this is, and for what."""
    found = (PLAIN, "start and end")
    for code in stack:
        if code not in known:
            known[code] = [
                (whose, what.lstrip("!"), what.startswith("!"))
                for part, function, whose, what in GROUPS
                if part in code.co_filename and function in ("", code.co_name)
            ]
        for whose, what, final in known[code]:
            found = (whose, what)
            if final:
                return found
    return found


def place_of(stack: tuple[CodeType, ...]) -> str:
    """The innermost of camtrain's own functions."""
    for code in reversed(stack):
        if "camtrain/" in code.co_filename and "site-packages" not in code.co_filename:
            return _name(code)
    return "-"


def _name(code: CodeType) -> str:
    return f"{'/'.join(Path(code.co_filename).parts[-3:])}:{code.co_qualname}"


def write(sampler: Sampler, out: Path, others: float, children: float) -> None:
    """Tables to the terminal and to files."""
    known: dict[CodeType, list[Found]] = {}
    groups, places = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for stack, seconds in sampler.stacks.items():
        group = group_of(stack, known)
        groups[group] += seconds  # type: ignore[assignment]
        places[group[1], place_of(stack)] += seconds  # type: ignore[assignment]
    total = sum(groups.values())
    print(f"\n{total:.1f} s of processor time in the main thread, {others:.1f} s in others, {children:.1f} s in "
          f"processes that it started; {machine()}\n\n| whose | what | s | % |\n|---|---|---|---|")  # fmt: skip
    for (whose, what), seconds in groups.most_common():
        print(f"| {whose} | {what} | {seconds:.2f} | {100 * seconds / total:.1f} |")
    print(f"\n| camtrain in all | {sum(s for (w, _), s in groups.items() if w == OURS) / total:.1%} |")
    print("\n| group | function of camtrain, with what it calls | s | % |\n|---|---|---|---|")
    for (what, place), seconds in places.most_common(40):
        if place != "-":
            print(f"| {what} | {place} | {seconds:.2f} | {100 * seconds / total:.1f} |")
    out.mkdir(parents=True, exist_ok=True)
    with (out / "groups.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("whose", "what", "seconds"), *((*key, s) for key, s in groups.items())])
    lines = (f"{';'.join(map(_name, stack))} {max(1, round(1e6 * s))}\n" for stack, s in sampler.stacks.items())
    (out / "stacks.txt").write_text("".join(lines))


def main() -> None:
    """Run the script under the sampler."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/profile"))
    parser.add_argument("--every", type=float, default=4.0, help="milliseconds of processor time")
    parser.add_argument("-m", dest="module", action="store_true", help="what follows is a module, as for python -m")
    parser.add_argument("script")
    parser.add_argument("words", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    sys.argv = [options.script, *options.words]
    sys.path[0] = str(Path.cwd()) if options.module else str(Path(options.script).parent)
    sampler, process, thread = Sampler(options.every / 1000), time.process_time(), time.thread_time()
    sampler.start()
    try:
        if options.module:
            runpy.run_module(options.script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(options.script, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    finally:
        sampler.stop()
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        others = time.process_time() - process - (time.thread_time() - thread)
        write(sampler, options.out, others, spent.ru_utime + spent.ru_stime)


if __name__ == "__main__":
    main()
