"""Peak memory of `ct.evaluate` against the number of labels: it should be that of one case, whatever the labels.

    python benchmarks/evaluate_memory.py [--size 400] [--labels 1,16,80] [--measures free,shortcut_reliance]

Every number of labels runs in a process of its own, on one case in which all labels are present: scores on the last
layer (1/16 of each axis) and on a middle one (1/4 of each axis), with five organs. Prints the peak resident memory
above that of the same network's plain forward in that process, and the seconds.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch
from torch import nn

import camtrain as ct

ORGANS = 5


def net(labels: int) -> nn.Module:
    """Two strided stages and a pool head: large maps, few operations."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(1, 8, 4, stride=4),
        nn.ReLU(),
        nn.Conv3d(8, 16, 4, stride=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(16, labels),
    )


def peak() -> float:
    """Peak resident memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def one(size: int, labels: int, measures: list[str]) -> None:
    """Evaluate one case and print peak memory and seconds."""
    model = net(labels).eval()
    image = torch.rand(1, 1, size, size, size)
    organs = torch.zeros(1, 1, size, size, size, dtype=torch.uint8)
    for index in range(ORGANS):
        organs[..., index * size // ORGANS : (index + 1) * size // ORGANS - 2] = index + 1
    with torch.no_grad():
        model(image)
    before = peak()
    names = [f"finding {i}" for i in range(labels)]
    table = {
        "organs": {f"organ {i}": i + 1 for i in range(ORGANS)},
        "labels": {name: [f"organ {i % ORGANS}"] for i, name in enumerate(names)},
    }
    batch = {"image": image, "label": torch.ones(1, labels), "organs": organs, "id": ["one"]}
    start = time.perf_counter()
    found = ct.evaluate(
        model,
        [batch],
        table,
        methods=["hirescam", "gradcam"],
        layers=["1", "3"],
        measures=measures,
        replacements=["air", "blur"],
        names=names,
        repeats=20,
        progress=False,
    )
    seconds = time.perf_counter() - start
    print(
        f"{labels:>3} labels: {peak() - before:.2f} GiB above {before:.2f} GiB, {seconds:.0f} s, {len(found.rows)} rows"
    )


def main() -> None:
    """A process per number of labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=400)
    parser.add_argument("--labels", default="1,16,80")
    parser.add_argument("--measures", default="free,shortcut_reliance")
    options = parser.parse_args()
    counts = [int(word) for word in options.labels.split(",")]
    if len(counts) == 1:
        one(options.size, counts[0], options.measures.split(","))
        return
    print(
        f"one case of {options.size}^3, {options.measures}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    sys.stdout.flush()
    for labels in counts:
        words = ["--size", str(options.size), "--labels", str(labels), "--measures", options.measures]
        subprocess.run([sys.executable, __file__, *words], check=True)


if __name__ == "__main__":
    main()
