"""What one training step costs with the mask loss, in time and in memory, against the plain step.

    python benchmarks/step_cost.py                    # ResNet18 and DenseNet121, 80 labels, 64^3, batch 2
    python benchmarks/step_cost.py --nets ResNet50 --labels 1 16 80 --sizes 32 64 --heads affine mlp --layers last mid
    python benchmarks/step_cost.py --memory           # peak memory instead, each step in processes of its own
    python benchmarks/step_cost.py --null             # the plain step against itself: the noise of the machine
    python benchmarks/step_cost.py --naive --pairs 5  # what the same loss costs with a backward pass per label
    python benchmarks/step_cost.py --sizes 256 --allocator jemalloc  # without the page faults, which are half of a step
    python benchmarks/step_cost.py --pairs 99 --keep FILE  # goes on where a run with this FILE was stopped

A step is forward, task loss, backward and optimizer step; the mask loss adds what `MaskLossCallback` does: the watch,
the maps of all labels, the organs brought to the grid, the loss, and one backward of the sum. Pairs take turns, and
processor time counts (`--wall` for wall time); the interval is that of the median, 90 %.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _jemalloc import loaded, start_anew_under_jemalloc
from _networks import NETWORKS, with_mlp_head
from _pairs import interleaved, machine
from torch import Tensor, nn

import camtrain as ct

FIRST = "| network | head | layer | labels | volume |"
HEADERS = {
    False: f"{FIRST} step with / without | ms more | ms plain | pairs |",
    True: f"{FIRST} peak with / without | GiB plain | as glibc keeps it | GiB plain |",
}
# glibc keeps freed blocks in a way that differs by 5 % from process to process, with and without a mask loss. Blocks
# that are mapped one by one go back at once: the peak is then what lived together, to a thousandth.
_MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def organs(batch: int, shape: tuple[int, int, int]) -> Tensor:
    """Two lungs and what lies between them, as boxes: the cost depends on grids and labels, not on shapes."""
    ids = torch.zeros(batch, 1, *shape, dtype=torch.uint8)
    first, second, third = (edge // 3 for edge in shape)
    ids[:, :, :first, second : 2 * second, third:] = 1
    ids[:, :, first : 2 * first, second : 2 * second, third:] = 2
    ids[:, :, 2 * first :, second : 2 * second, third:] = 3
    return ids


def steps(
    net: str, head: str, layer: str, labels: int, size: int, batch: int, naive: bool = False
) -> tuple[Callable[[], None], ...]:
    """The plain step and the step with the mask loss, of one model; `naive`: in the way that first comes to mind."""
    torch.manual_seed(0)
    full = ct.OrganTable.load("rad_chestct")
    table = full.select(full.labels[:labels])
    network = NETWORKS[net]
    model = network.make(labels, size).train()
    if head == "mlp":
        model = with_mlp_head(model, network.head)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    cases = {
        "image": torch.rand(batch, 1, *network.shape(size)),
        "label": (torch.rand(batch, labels) > 0.8).float(),
        "organs": organs(batch, network.shape(size)),
    }
    one = partial(step, model, optimizer, cases)
    # One tap for all steps, as in the callback: every new one with layer=None looks for the layer by a forward.
    # Its name alone would not do: EfficientNet's last activation is a module that runs twice.
    tap = ct.LayerTap(model, network.mid if layer == "mid" else None)
    if naive:
        found = next(row.name for row in ct.layers(model, cases["image"], seen=False) if row.default)
        tap = Naive(model.get_submodule(network.mid if layer == "mid" else found))
    return one, partial(one, (tap, table, ct.OrganMaskLoss()))


class Naive:
    """Maps by one `autograd.grad` per label, each with its graph: stands in for the tap.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.kept = layer, []

    def __enter__(self) -> Naive:
        self.kept.clear()
        self.handle = self.layer.register_forward_hook(lambda module, given, out: self.kept.append(out))
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def maps(self, logits: Tensor, method: str) -> Tensor:
        """HiResCAM of every label."""
        features = self.kept[-1]
        gradients = (torch.autograd.grad(column.sum(), features, create_graph=True)[0] for column in logits.unbind(1))
        return torch.stack([(gradient * features).sum(1) for gradient in gradients], 1)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], extra: tuple | None = None
) -> None:
    """One training step; `extra` = (tap, table, loss) adds the mask loss."""
    optimizer.zero_grad()
    if extra is None:
        loss = nn.functional.binary_cross_entropy_with_logits(model(batch["image"]), batch["label"])
    else:
        tap, table, loss_fn = extra
        with tap:
            logits = model(batch["image"])
            maps = tap.maps(logits, method="hirescam")
        allowed = table.allowed(batch["organs"], size=maps.shape[2:])
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch["label"])
        loss = loss + loss_fn(maps, allowed, batch["label"])
    loss.backward()
    optimizer.step()


def peak(words: list[str], use: str, surroundings: dict[str, str]) -> float:
    """Peak resident memory, in GiB, of a process that makes three steps."""
    command = [sys.executable, str(Path(__file__)), *words, "--one", use]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | surroundings)
    return float(done.stdout)


def peaks(words: list[str], processes: int, surroundings: dict[str, str]) -> str:
    """Median of the ratios, lowest and highest, and the plain peak."""
    found = [[peak(words, use, surroundings) for use in ("plain", "mask")] for _ in range(processes)]
    ratios, plain = [mask / plain for plain, mask in found], statistics.median(plain for plain, _ in found)
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}) | {plain:.2f}"


def main() -> None:
    """Print a line per network, head, layer, number of labels and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETWORKS), default=["ResNet18", "DenseNet121"])
    parser.add_argument("--heads", nargs="+", choices=["affine", "mlp"], default=["affine"])
    parser.add_argument("--layers", nargs="+", choices=["last", "mid"], default=["last"])
    parser.add_argument("--labels", nargs="+", type=int, default=[80], help="at most 83, those of RAD-ChestCT's table")
    parser.add_argument("--sizes", nargs="+", type=int, default=[64])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=math.inf, help="for a row; three pairs at least")
    parser.add_argument("--keep", type=Path, help="CSV of single pairs (seconds): those of a row found there count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--allocator", choices=["system", "jemalloc"], default="system", help="see _jemalloc.py")
    parser.add_argument("--wall", action="store_true", help="wall time; the machine must be idle")
    parser.add_argument("--naive", action="store_true", help="a backward pass per label instead of camtrain's maps")
    parser.add_argument("--null", action="store_true", help="the plain step against itself: what noise makes of 1")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--processes", type=int, default=5, help="of each kind, for --memory")
    parser.add_argument("--one", choices=["plain", "mask"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.allocator == "jemalloc" and args.memory:
        parser.error("--memory measures what glibc keeps: leave --allocator out")
    if args.allocator == "jemalloc":
        start_anew_under_jemalloc()
    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.wall else time.process_time
    grid = list(itertools.product(args.nets, args.heads, args.layers, args.labels, args.sizes))
    if args.one:
        plain, masked = steps(*grid[0], args.batch)
        for _ in range(3):
            (plain if args.one == "plain" else masked)()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return
    how = f"batch {args.batch}, {'jemalloc, ' * loaded()}{machine()}"
    what = f"{'wall' if args.wall else 'processor'} time, {how}"
    header = HEADERS[args.memory]
    print(f"{header}\n" + "|---" * header.count(" | ") + "|---|")
    for net, head, layer, labels, size in grid:
        if layer == "mid" and NETWORKS[net].mid is None:
            continue
        first = f"| {net} | {head} | {layer} | {labels} | {NETWORKS[net].volume(size)} |"
        if args.memory:
            words = ["--nets", net, "--heads", head, "--layers", layer, "--labels", str(labels), "--sizes", str(size)]
            words += ["--batch", str(args.batch), "--threads", str(args.threads)]
            exact, usual = peaks(words, 3, _MAPPED), peaks(words, args.processes, {})
            print(f"{first} {exact} | {usual} |", flush=True)
            continue
        both = steps(net, head, layer, labels, size, args.batch, args.naive)
        both = (both[0], partial(both[0])) if args.null else both
        row = f"{first} {'naive, ' * args.naive}{'null, ' * args.null}{what}"
        ratio = interleaved(*both, args.pairs, clock, seconds=args.seconds, keep=args.keep, row=row)
        print(f"{first} {ratio} | {ratio.extra:.1f} | {ratio.plain:.0f} | {ratio.pairs} |", flush=True)
    if args.memory:
        what = f"median (lowest-highest) of 3 and of {args.processes} pairs of processes, {how}"
    print(f"\n{what}")


if __name__ == "__main__":
    main()
