"""What maps of a middle layer need beside themselves: are the labels taken one after the other?

    python benchmarks/mid_layer_memory.py                 # DenseNet121, 80 labels, 96^3, batch 2
    python benchmarks/mid_layer_memory.py --labels 1 16 80 --part 16

Peak resident memory of processes of their own: one makes a forward, one the maps of all labels in one call, one the
same in calls of `--part` labels of which each result is used and let go. Behind a middle layer every label takes a
backward pass; the result (B, L, *S') is what the user asked for, what comes on top of it should not grow with L.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from _networks import NETWORKS
from _pairs import machine

import camtrain as ct

HEADER = "| network | layer | labels | volume | maps | MiB of the maps | MiB over a forward | on top of the maps |"


def one(use: str, args: argparse.Namespace) -> None:
    """Run one piece and print the peak, in MiB, and the size of the maps."""
    network, labels = NETWORKS[args.net], args.labels[0]
    torch.manual_seed(0)
    model = network.make(labels, args.size).eval()
    image = torch.rand(args.batch, 1, *network.shape(args.size))
    step = {"forward": 0, "parts": args.part}.get(use, labels)
    size = 0.0
    with torch.no_grad():
        model(image)
    for start in range(0, labels, step) if step else ():
        wanted = list(range(start, min(labels, start + step)))
        size = max(size, ct.explain(model, image, layer=args.layer, labels=wanted).nbytes / 2**20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, size)


def peak(use: str, labels: int, args: argparse.Namespace) -> tuple[float, float]:
    """Medians over processes."""
    words = ["--net", args.net, "--labels", str(labels), "--size", str(args.size), "--batch", str(args.batch)]
    command = [
        sys.executable,
        str(Path(__file__)),
        *words,
        "--part",
        str(args.part),
        "--layer",
        args.layer,
        "--one",
        use,
    ]
    found = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(args.processes)]
    pairs = [tuple(map(float, text.split())) for text in found]
    return statistics.median(p for p, _ in pairs), pairs[0][1]


def main() -> None:
    """Print a line per number of labels and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=list(NETWORKS), default="DenseNet121")
    parser.add_argument("--layer", default="features.relu0", help="default: the earliest one, with the largest maps")
    parser.add_argument("--labels", nargs="+", type=int, default=[1, 16, 80])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--part", type=int, default=8)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--one", choices=["forward", "all", "parts"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        one(args.one, args)
        return
    print(f"{HEADER}\n" + "|---" * HEADER.count(" | ") + "|---|")
    for labels in args.labels:
        base, _ = peak("forward", labels, args)
        for use in ("all", "parts"):
            most, size = peak(use, labels, args)
            row = f"| {args.net} | {args.layer} | {labels} | {args.size}^3 | {use} |"
            print(f"{row} {size:.0f} | {most - base:.0f} | {most - base - size:.0f} |", flush=True)
    print(f"\nbatch {args.batch}, parts of {args.part}, medians of {args.processes} processes, {machine()}")


if __name__ == "__main__":
    main()
