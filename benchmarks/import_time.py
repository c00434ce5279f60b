"""How long importing camtrain takes, and `camtrain --help`: wall time of fresh processes, the empty one taken off.

python benchmarks/import_time.py [--times 9]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from _pairs import machine

PIECES = {
    "python alone": ["-c", "pass"],
    "import camtrain": ["-c", "import camtrain"],
    "import torch, pytorch_lightning": ["-c", "import torch, pytorch_lightning"],
    "import camtrain; camtrain.MaskLossCallback": ["-c", "import camtrain; camtrain.MaskLossCallback"],
    "camtrain --help": ["-m", "camtrain", "--help"],
}


def main() -> None:
    """Print a row per piece."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=9)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in PIECES}
    for _ in range(args.times):
        for name, words in PIECES.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    bare = statistics.median(seconds["python alone"])
    print("| | seconds, median (lowest-highest) | more than Python alone |\n|---|---|---|")
    for name, each in seconds.items():
        middle = statistics.median(each)
        print(f"| {name} | {middle:.2f} ({min(each):.2f}-{max(each):.2f}) | {middle - bare:.2f} |")
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
