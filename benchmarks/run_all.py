"""Every benchmark of what camtrain costs, one after the other, and the page that is made of them.

    python benchmarks/run_all.py                     # about 40 minutes on 2 cores; finished parts are not run again
    python benchmarks/run_all.py --parts step memory # these parts anew
    python benchmarks/run_all.py --page              # the page of what is finished
    python benchmarks/run_all.py --full              # more networks, labels and sizes: hours

What a part printed is kept in `--out`, with its command; `--page` sets them into docs/performance.md, each beside what
was asked for.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from _pairs import machine

ROOT = Path(__file__).parents[1]
FIGURE = re.compile(r"^(?P<row>\|.*?)\| (?P<median>\d+\.\d+) \((?P<low>\d+\.\d+)-(?P<high>\d+\.\d+)\)")


class Part(NamedTuple):
    """One command.

    Attributes:
        title: Heading on the page.
        asked: What was asked for, in words.
        command: Script and options.
        full: Options instead of the quick ones, where there are more to ask.
        limit: Highest median that was asked for, of every row.
        upper: Highest upper end of the interval.
        only: Rows that the limit is for hold this.
        python: Interpreter, where it is not this one; the part is left out where there is none.
    """

    title: str
    asked: str
    command: str
    full: str = ""
    limit: float | None = None
    upper: float | None = None
    only: str = ""
    python: str = ""


FOUR = "DenseNet121 EfficientNet-B0 ResNet18 AxialNet"
FIVE = f"{FOUR} ResNet50"
GRID = f"step_cost.py --nets {FIVE} --labels 1 16 80 --sizes 32 64 128"
PARTS = {
    "step": Part(
        "Training step, affine head, 80 labels",
        "at most 1.03 x a plain step, upper end of the interval at most 1.05",
        f"step_cost.py --nets {FOUR}", GRID, 1.03, 1.05,
    ),
    "step_pairs": Part(
        "The same with more pairs", "the same", "step_cost.py --nets DenseNet121 --pairs 60", limit=1.03, upper=1.05
    ),
    "step_small": Part(
        "The same where the network is far smaller than its maps of 80 labels", "at most 1.03 x a plain step",
        "step_cost.py --nets AxialNet-small", limit=1.03,
    ),
    "mlp": Part(
        "Training step, head with a hidden layer, 80 labels", "at most 1.10 x a plain step",
        "step_cost.py --nets ResNet18 DenseNet121 --heads mlp", f"{GRID} --heads mlp", 1.10,
    ),
    "labels": Part(
        "Is the cost flat in the labels?", "affine head: the same for 1, 16 and 80 labels",
        "step_cost.py --nets DenseNet121 --labels 1 16 80",
        "step_cost.py --nets DenseNet121 ResNet18 --labels 1 16 80 --sizes 64 96",
    ),
    "sizes": Part(
        "Training step at 128^3", "at most 1.03 x a plain step",
        "step_cost.py --nets DenseNet121 --sizes 128 --pairs 12",
        "step_cost.py --nets DenseNet121 ResNet18 --sizes 128 256", 1.03,
    ),
    "mid": Part(
        "Training step, a middle layer, 80 labels", "no figure: a backward pass per label to that layer, twice",
        "step_cost.py --nets DenseNet121 --layers mid --pairs 6", f"{GRID} --layers mid",
    ),
    "memory": Part(
        "Peak memory of a training step", "at most 1.03 x that of a plain one (the first figure: what lives together)",
        f"step_cost.py --memory --nets {FIVE}",
        f"step_cost.py --memory --nets {FIVE} --heads affine mlp --sizes 64 128", 1.03,
    ),
    "maps": Part(
        "Maps of all labels, beside other libraries",
        "at most 1.05 x a forward for affine heads; never slower than torchcam; at least 10 x faster than the rest",
        "maps_cost.py", "maps_cost.py --nets ResNet18 DenseNet121 --labels 1 16 80",
        1.05, None, "| affine | last | 16 | 64^3 | camtrain ",
    ),
    "maps_peers": Part(
        "The same beside libraries that need torchvision", "at least 10 x faster",
        "maps_cost.py --peers grad-cam medcam --slow-rounds 3", python=".venv-parity/bin/python",
    ),
    "maps_labels": Part(
        "Maps of 1 and 80 labels, beside the fastest of them", "the same",
        "maps_cost.py --labels 1 80 --peers torchcam --rounds 15", "maps_cost.py --labels 1 16 80 --peers torchcam",
    ),
    "monitor": Part(
        "A validation epoch with the monitor", "at most 1.10 x a plain one (affine), 1.25 x (other heads)",
        "monitor_cost.py --pairs 2", "monitor_cost.py --pairs 5",
    ),
    "monitor_memory": Part(
        "Peak memory of a validation epoch with the monitor", "at most 1.05 x that of a plain one",
        "monitor_memory.py --cases 200", "monitor_memory.py --cases 200 --two_layers 1",
    ),
    "full_size": Part(
        "AxialNet at full size", "a training step within 11 GiB, within 7 GiB with activation checkpointing",
        "full_size.py",
    ),
    "import": Part("Import", "camtrain under 0.3 s, camtrain --help under 1 s", "import_time.py"),
}  # fmt: skip


def measure(name: str, full: bool, out: Path) -> None:
    """Run one part and keep what it printed."""
    part = PARTS[name]
    words = (part.full or part.command) if full else part.command
    start = time.perf_counter()
    print(f"{name}: {part.python or 'python'} benchmarks/{words}", flush=True)
    python = ROOT / part.python if part.python else Path(sys.executable)
    if not python.exists():
        print(f"{name}: left out, there is no {part.python}: make parity", flush=True)
        return
    command = [str(python), *shlex.split(words)]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed; parts before it are kept in {out}\n{done.stderr[-2000:]}")
    print(done.stdout, flush=True)
    kept = {"command": words, "seconds": round(time.perf_counter() - start), "text": done.stdout}
    (out / f"{name}.json").write_text(json.dumps(kept))


def verdict(part: Part, text: str) -> str:
    """How many rows keep the limits."""
    if part.limit is None:
        return ""
    rows = [found for line in text.splitlines() if (found := FIGURE.match(line)) and part.only in line]
    kept = [
        row
        for row in rows
        if float(row["median"]) <= part.limit and (part.upper is None or float(row["high"]) <= part.upper)
    ]
    return f" **{len(kept)} of {len(rows)} rows keep it.**" if rows else ""


def page(out: Path) -> str:
    """The text of docs/performance.md."""
    parts = [
        "# What it costs\n\n"
        "`make bench` (`python benchmarks/run_all.py`) makes this page. Ratios of pieces that take turns in one run,\n"
        "in processor time unless said otherwise: median and, in brackets, the interval of 90 % of that median.\n"
        "Ratios below 1 are noise. The machine is small and was not always idle; no GPU has run these.\n\n"
        f"{machine()}\n"
    ]
    for name, part in PARTS.items():
        if not (file := out / f"{name}.json").exists():
            continue
        kept = json.loads(file.read_text())
        text = kept["text"].strip()
        body = text if text.startswith("|") else f"```\n{text}\n```"
        parts.append(
            f"## {part.title}\n\nAsked for: {part.asked}.{verdict(part, text)}\n\n"
            f"`{part.python or 'python'} benchmarks/{kept['command']}` ({kept['seconds'] / 60:.0f} min)\n\n{body}\n"
        )
    return "\n".join(parts)


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="run these anew")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--page", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "performance.md")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in PARTS if not (args.out / f"{name}.json").exists()]
    for name in () if args.page else args.parts or missing:
        measure(name, args.full, args.out)
    args.to.write_text(page(args.out))
    print(f"page: {args.to}")


if __name__ == "__main__":
    main()
