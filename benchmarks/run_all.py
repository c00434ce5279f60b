"""Every benchmark of what camtrain costs, one after the other, and the page that is made of them.

    python benchmarks/run_all.py                     # about 6 hours on 2 cores; finished parts are not run again
    python benchmarks/run_all.py --parts step memory # these parts anew
    python benchmarks/run_all.py --page              # the page of what is finished

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

ROOT = Path(__file__).parents[1]
FIGURE = re.compile(
    r"^(?P<row>\|.*?)\| (?P<median>\d+\.\d+) \((?P<low>\d+\.\d+)-(?P<high>\d+\.\d+)\)"
    r"(?: \| -?[\d.]+ \| \d+ \| (?P<pairs>\d+) \|$)?"
)
PAIRS = 30


class Part(NamedTuple):
    """One command.

    Attributes:
        title: Heading on the page.
        asked: What was asked for, in words.
        command: Script and options.
        limit: Highest median that was asked for, of every row.
        upper: Highest upper end of the interval.
        only: Rows that the limit is for hold all of this.
        python: Interpreter, where it is not this one; the part is left out where there is none.
        pairs: How many were asked for; 0: not said.
        again: Earlier parts that measured the same rows.
    """

    title: str
    asked: str
    command: str
    limit: float | None = None
    upper: float | None = None
    only: tuple[str, ...] = ()
    python: str = ""
    pairs: int = PAIRS
    again: tuple[str, ...] = ()


MONAI = "DenseNet121 EfficientNet-B0 ResNet18 ResNet50"
FIVE = f"{MONAI} AxialNet"
MAPS = "maps_cost.py --peers torchcam"
MONITOR = "monitor_nets.py --nets DenseNet121 EfficientNet-B0 --labels 1 16 80"
PARTS = {
    "step": Part(
        "Training step, affine head, 80 labels",
        "at most 1.03 x a plain step, upper end of the interval at most 1.05",
        f"step_cost.py --nets {FIVE} --pairs 60", 1.03, 1.05,
    ),
    "naive": Part(
        "The same with a backward pass per label (a naive double-backward loop)", "no figure: what others would pay",
        "step_cost.py --nets DenseNet121 ResNet18 --naive --pairs 5 --seconds 120",
    ),
    "mlp": Part(
        "Training step, head with a hidden layer, 80 labels", "at most 1.10 x a plain step",
        f"step_cost.py --nets {FIVE} --heads mlp --seconds 150", 1.10,
    ),
    "labels": Part(
        "Is the cost flat in the labels?", "affine head: the same for 1, 16 and 80 labels",
        f"step_cost.py --nets {FIVE} --labels 1 16 80 --pairs 12 --seconds 30",
    ),
    "sizes": Part(
        "Training step at 128^3", "at most 1.03 x a plain step",
        "step_cost.py --nets DenseNet121 EfficientNet-B0 --sizes 128", 1.03, 1.05,
    ),
    "large": Part(
        "Training step at 256^3", "at most 1.03 x a plain step",
        "step_cost.py --nets EfficientNet-B0 DenseNet121 --sizes 256 --threads 2 --pairs 30", 1.03, 1.05,
    ),
    "large_kept": Part(
        "The same where freed memory stays with the process: no page faults, which are half of the step above",
        "at most 1.03 x a plain step",
        "step_cost.py --nets EfficientNet-B0 --sizes 256 --threads 2 --pairs 100 --allocator jemalloc", 1.03, 1.05,
    ),
    "large_again": Part(
        "The step at 256^3 once more, as glibc keeps memory", "at most 1.03 x a plain step",
        "step_cost.py --nets EfficientNet-B0 --sizes 256 --threads 2 --pairs 30", 1.03, 1.05,
    ),
    "large_twice": Part(
        "The step at 256^3 a third time as glibc keeps memory, with twice the pairs", "at most 1.03 x a plain step",
        "step_cost.py --nets EfficientNet-B0 --sizes 256 --threads 2 --pairs 60", 1.03, 1.05,
        again=("large", "large_again"),
    ),
    "null": Part(
        "The plain step against itself at 128^3: what the machine's noise makes of 1", "no figure",
        "step_cost.py --nets DenseNet121 EfficientNet-B0 --sizes 128 --null --seconds 180",
    ),
    "tiny": Part(
        "Training step at 32^3: the last map of more than one cell lies mid-way in DenseNet121 and EfficientNet-B0",
        "no figure: a backward pass per label to that layer",
        f"step_cost.py --nets {MONAI} --sizes 32 --labels 1 16 80 --pairs 6 --seconds 10",
    ),
    "step_small": Part(
        "Where the network is far smaller than its maps of 80 labels", "no figure: it is none of the five",
        "step_cost.py --nets AxialNet-small --seconds 60",
    ),
    "mid": Part(
        "Training step, a middle layer", "no figure: a backward pass per label to that layer, twice",
        "step_cost.py --nets DenseNet121 EfficientNet-B0 --layers mid --labels 1 16 80 --pairs 6 --seconds 20",
    ),
    "mid_memory": Part(
        "Peak memory of maps at the earliest layer", "bounded: flat in the labels where they go in parts",
        "mid_layer_memory.py --size 64 --processes 2",
    ),
    "memory": Part(
        "Peak memory of a training step", "at most 1.03 x that of a plain one (the first figure: what lives together)",
        f"step_cost.py --memory --nets {FIVE}", 1.03,
    ),
    "memory_more": Part(
        "Peak memory: other heads, labels and sizes", "at most 1.03 x that of a plain one",
        "step_cost.py --memory --nets DenseNet121 --heads affine mlp --labels 1 80 --sizes 64 128 --processes 2", 1.03,
    ),
    "memory_256": Part(
        "Peak memory at 256^3, one case", "at most 1.03 x that of a plain one",
        "step_cost.py --memory --nets DenseNet121 --sizes 256 --batch 1 --processes 2", 1.03,
    ),
    "memory_mid": Part(
        "Peak memory at 32^3 and at a middle layer, 16 labels",
        "no figure: the graph of a backward pass per label is kept",
        "step_cost.py --memory --nets DenseNet121 --layers last mid --labels 16 --sizes 32 64 --processes 1",
    ),
    "maps": Part(
        "Maps of all labels, beside other libraries",
        "at most 1.05 x a forward for affine heads; never slower than torchcam; at least 10 x faster than the rest",
        "maps_cost.py", 1.05, None, ("| affine |", "| camtrain "),
    ),
    "maps_peers": Part(
        "The same beside libraries that need torchvision", "at least 10 x faster",
        "maps_cost.py --peers grad-cam medcam --slow-rounds 3", python=".venv-parity/bin/python",
    ),
    "maps_nets": Part(
        "Maps of 80 labels, every network, beside the fastest of them", "the same",
        f"maps_cost.py --nets {FIVE} --heads affine --labels 80 --peers torchcam --rounds 15",
        1.05, None, ("| affine |", "| camtrain "),
    ),
    "maps_labels": Part(
        "Maps of 1, 16 and 80 labels", "flat in the labels where the head is affine; never slower than torchcam",
        "maps_cost.py --labels 1 16 80 --peers torchcam --rounds 15",
    ),
    "maps_sizes": Part(
        "Maps of 80 labels at other sizes (at 32^3 DenseNet121's last map of several cells lies mid-way)",
        "at most 1.05 x a forward where the layer is the last one; never slower than torchcam",
        f"{MAPS} --nets DenseNet121 ResNet18 --heads affine --labels 80 --sizes 32 128 --rounds 8",
        1.05, None, ("| affine |", "| camtrain ", "| 128^3 |"),
    ),
    "maps_256": Part(
        "Maps at 256^3, one case", "at most 1.05 x a forward for affine heads; never slower than torchcam",
        f"{MAPS} --nets DenseNet121 EfficientNet-B0 --heads affine --labels 80 --sizes 256 --batch 1 --rounds 4",
        1.05, None, ("| affine |", "| camtrain "),
    ),
    "maps_mid": Part(
        "Maps at a middle layer", "never slower than torchcam",
        "maps_cost.py --layers mid --labels 1 16 80 --peers torchcam --rounds 12",
    ),
    "monitor": Part(
        "A validation epoch with the monitor (its alarms apart)",
        "at most 1.10 x a plain one (affine), 1.25 x (other heads); pictures of 12 cases x 8 labels at most 1 s",
        "monitor_cost.py --pairs 3",
    ),
    "monitor_labels": Part(
        "The same with 80 labels", "the same", "validation_cost.py --pairs 6 --cases 32",
    ),
    "monitor_nets": Part(
        "A validation epoch with the monitor, every network", "at most 1.10 x a plain one", "monitor_nets.py", 1.10,
        pairs=0,
    ),
    "monitor_heads": Part(
        "The same with 1, 16 and 80 labels and both heads",
        "at most 1.10 x a plain one (affine), 1.25 x (hidden layer)",
        "monitor_nets.py --nets DenseNet121 --labels 1 16 80 --heads affine mlp --pairs 3 --seconds 3",
        1.10, None, ("| affine |",), pairs=0,
    ),
    "monitor_passes": Part(
        "The same at 32^3, where the last map of several cells lies mid-way: as much as map_budget=0.03 holds",
        "at most 1.10 x a plain one (without the free second, which shows in epochs of under half a minute)",
        f"{MONITOR} --sizes 32 --pairs 9 --seconds 10 --free 0",
        1.10, pairs=0,
    ),
    "monitor_mid": Part(
        "The same on a middle layer at 64^3", "at most 1.10 x a plain one",
        f"{MONITOR} --layers mid --pairs 3 --seconds 10 --free 0",
        1.10, pairs=0,
    ),
    "monitor_whole": Part(
        "What map_budget=None takes, maps of all present labels: 32^3",
        "no figure: a backward pass per label that is present in a batch",
        "monitor_nets.py --nets DenseNet121 --labels 1 16 80 --sizes 32 --heads affine mlp --map-budget none "
        "--pairs 3 --seconds 3",
    ),
    "monitor_whole_mid": Part(
        "The same on a middle layer", "no figure",
        f"{MONITOR} --layers mid --map-budget none --pairs 3 --seconds 3",
    ),
    "pass_price": Part(
        "What a pass takes beside a forward: as the clock says, and as map_budget counts it", "no figure",
        "pass_price.py",
    ),
    "monitor_32": Part(
        "The same at 32^3 on the last layer (one cell in DenseNet121)", "at most 1.10 x a plain one",
        "validation_cost.py --size 32 --pairs 6 --cases 100",
    ),
    "monitor_128": Part(
        "The same at 128^3", "at most 1.10 x a plain one", "validation_cost.py --size 128 --pairs 4 --cases 4"
    ),
    "monitor_256": Part(
        "The same at 256^3", "at most 1.10 x a plain one",
        "monitor_nets.py --nets DenseNet121 EfficientNet-B0 --sizes 256 --pairs 3 --batch 1 --seconds 40", 1.10,
        pairs=0,
    ),
    "monitor_memory": Part(
        "Peak memory of a validation epoch with the monitor", "at most 1.05 x that of a plain one",
        "monitor_memory.py --cases 200",
    ),
    "full_size": Part(
        "AxialNet at full size", "a training step within 11 GiB, within 7 GiB with activation checkpointing",
        "full_size.py",
    ),
    "import": Part("Import", "camtrain under 0.3 s, camtrain --help under 1 s", "import_time.py"),
}  # fmt: skip


def measure(name: str, out: Path) -> None:
    """Run one part and keep what it printed; a training step's pairs as they end, so that a stopped part goes on.

    The pairs of a part that is done lie with what it printed, so that it begins anew when it is run again.
    """
    part = PARTS[name]
    start = time.perf_counter()
    print(f"{name}: {part.python or 'python'} benchmarks/{part.command}", flush=True)
    python = ROOT / part.python if part.python else Path(sys.executable)
    if not python.exists():
        print(f"{name}: left out, there is no {part.python}: make parity", flush=True)
        return
    command, file, pairs = [str(python), *shlex.split(part.command)], out / f"{name}.json", out / f"{name}.csv"
    if part.command.startswith("step_cost.py") and "--memory" not in part.command:
        command += ["--keep", str(pairs.resolve())]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed; parts before it are kept in {out}\n{done.stderr[-2000:]}")
    print(done.stdout, flush=True)
    kept = {"command": part.command, "seconds": round(time.perf_counter() - start), "text": done.stdout}
    if pairs.exists():
        kept["pairs"] = pairs.read_text().splitlines()
    file.write_text(json.dumps(kept))
    pairs.unlink(missing_ok=True)


def verdict(part: Part, text: str) -> str:
    """How many rows keep the limits."""
    if part.limit is None:
        return ""
    rows = [
        found for line in text.splitlines() if (found := FIGURE.match(line)) and all(word in line for word in part.only)
    ]
    kept = [
        row
        for row in rows
        if float(row["median"]) <= part.limit and (part.upper is None or float(row["high"]) <= part.upper)
    ]
    few = sum(row["pairs"] is not None and int(row["pairs"]) < part.pairs for row in rows)
    doubt = f" {few} have fewer than the {part.pairs} pairs that were asked for." if few else ""
    return f" **{len(kept)} of {len(rows)} rows keep it.**{doubt}" if rows else ""


def together(texts: list[str]) -> str:
    """Each row of the last of these, over all runs that hold it: weighted by the inverse squares of the intervals."""
    runs = [{found["row"]: found for line in text.splitlines() if (found := FIGURE.match(line))} for text in texts]
    said = []
    for row in runs[-1]:
        found = [run[row] for run in runs if row in run]
        weights = [(float(one["high"]) - float(one["low"])) ** -2 for one in found]
        mean = sum(weight * float(one["median"]) for weight, one in zip(weights, found, strict=True)) / sum(weights)
        half = sum(weights) ** -0.5 / 2
        said.append(
            f"\n{len(found)} runs on this page hold the row `{row.strip()}`; together, weighted by the\n"
            f"inverse squares of their intervals' widths: **{mean:.3f} ({mean - half:.3f}-{mean + half:.3f})**."
        )
    return "\n".join(said)


def page(out: Path) -> str:
    """The text of docs/performance.md."""
    parts = [
        "# What it costs\n\n"
        "`make bench` (`python benchmarks/run_all.py`) makes this page. Ratios of pieces that take turns in one run,\n"
        "in processor time unless said otherwise: median and, in brackets, the interval of 90 % of that median.\n"
        "Ratios below 1 are noise. The machines are small and were not always idle; each part names its own. No GPU\n"
        "has run these.\n"
    ]
    for name, part in PARTS.items():
        if not (file := out / f"{name}.json").exists():
            continue
        kept = json.loads(file.read_text())
        text = kept["text"].strip()
        body = text if text.startswith("|") else f"```\n{text}\n```"
        files = [file for other in part.again if (file := out / f"{other}.json").exists()]
        if files:
            body += "\n" + together([*(json.loads(file.read_text())["text"] for file in files), text])
        parts.append(
            f"## {part.title}\n\nAsked for: {part.asked}.{verdict(part, text)}\n\n"
            f"`{part.python or 'python'} benchmarks/{kept['command']}` ({kept['seconds'] / 60:.0f} min)\n\n{body}\n"
        )
    return "\n".join(parts)


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="run these anew")
    parser.add_argument("--page", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "performance.md")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in PARTS if not (args.out / f"{name}.json").exists()]
    for name in () if args.page else args.parts or missing:
        measure(name, args.out)
    args.to.write_text(page(args.out))
    print(f"page: {args.to}")


if __name__ == "__main__":
    main()
