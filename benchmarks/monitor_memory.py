"""Peak memory of a validation pass with the monitor and without, each in a process of its own, in alternating order.

    python benchmarks/monitor_memory.py [--pairs 3] [--cases 96] [--size 64] [--labels 8] [--batch 4] [--two_layers 0]

The networks and cases of `monitor_cost.py`. What one pass leaves behind in a process raises the peak of the next, so no
process measures twice; two batches warm it up. Prints per pair the peak resident memory and what was resident before
and after the pass: if something grew with the cases, it would show between these two.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
from pathlib import Path

import torch
from _pairs import machine
from monitor_cost import affine_head, other_head
from torch.utils.data import DataLoader
from validation_cost import Lit, cases, cost_of, monitor_of, read_options, trainer_in

Peak = tuple[float, float, float]


def resident_mib() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(watched: bool, options: argparse.Namespace) -> Peak:
    """Peak, and what was resident before and after one pass, in MiB."""
    torch.manual_seed(0)
    module = Lit((other_head if options.two_layers else affine_head)(options.labels))
    monitor = monitor_of(options.labels, "net.class_layers.relu", every_n_epochs=0)
    few, loader = (
        DataLoader(cases(count, options.size, options.labels, options.present), options.batch)
        for count in (2 * options.batch, options.cases)
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_in(folder, *([monitor] if watched else []))
        cost_of(trainer, module, few)
        before = resident_mib()
        return cost_of(trainer, module, loader).peak, before, resident_mib()


def main() -> None:
    """One line per pair, and the median of the ratios."""
    options = read_options(__doc__, pairs=3, size=64, labels=8, batch=4, cases=96, present=0.15, two_layers=0)
    print(f"{options.cases} cases, {machine()}", flush=True)
    ratios = []
    for pair in range(options.pairs):
        found: dict[bool, Peak] = {}
        for watched in (True, False) if pair % 2 else (False, True):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[watched] = pool.apply(measure, (watched, options))
        ratios.append(found[True][0] / found[False][0])
        told = (f"{word} {p:.0f} MiB ({b:.0f} before, {a:.0f} after)" for word, (p, b, a) in
                (("monitor", found[True]), ("plain", found[False])))  # fmt: skip
        print(f"  pair {pair + 1}: {ratios[-1]:.3f}, {', '.join(told)}", flush=True)
    print(f"peak memory in plain passes: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
