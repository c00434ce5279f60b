"""What the maps of all labels cost, in forwards of the network, beside other libraries in the same run.

    python benchmarks/maps_cost.py                                     # DenseNet121, 16 labels, both heads, last layer
    python benchmarks/maps_cost.py --labels 1 16 80 --peers torchcam   # is the cost flat in the labels?
    python benchmarks/maps_cost.py --layers mid --labels 80 --peers    # a middle layer, camtrain alone
    make parity && .venv-parity/bin/python benchmarks/maps_cost.py --peers grad-cam medcam  # need torchvision

Every round runs each piece once in an order that is drawn anew; a figure is the median over rounds of (piece / plain
forward of the same round), in processor time, with the interval of 90 % of that median. Peers that take a forward per
label run in the first `--slow-rounds` rounds only. The plain forward builds no graph. Ours and the loop give maps on
the layer's grid; torchcam gives them on it too, MONAI, grad-cam and medcam on the image's, as their users get them.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
import warnings

import torch
from _networks import NETWORKS, with_mlp_head
from _pairs import machine, median_interval
from _peers import PEERS, SLOW, Piece, pieces

import camtrain as ct

HEADER = "| network | head | layer | labels | volume | maps of | x forward | rounds |"


def rounds(made: dict[str, Piece], number: int, slow: int, warm: int = 1) -> dict[str, list[float]]:
    """Ratios to the forward of the same round, per piece."""
    found: dict[str, list[float]] = {name: [] for name in made if name != "forward"}
    names = list(made)
    for turn in range(-warm, number):
        now = [name for name in names if name not in SLOW or 0 <= turn < slow]
        seconds = {}
        # In a fixed cycle each piece would always find the memory as the same other one has left it.
        for name in random.Random(turn).sample(now, len(now)):
            start = time.process_time()
            made[name]()
            seconds[name] = time.process_time() - start
        for name in now if turn >= 0 else ():
            if name != "forward":
                found[name].append(seconds[name] / seconds["forward"])
    return found


def main() -> None:
    """Print a line per setting and library."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETWORKS), default=["DenseNet121"])
    parser.add_argument("--heads", nargs="+", choices=["affine", "mlp"], default=["affine", "mlp"])
    parser.add_argument("--layers", nargs="+", choices=["last", "mid"], default=["last"])
    parser.add_argument("--labels", nargs="+", type=int, default=[16])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--slow-rounds", type=int, default=2)
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    print(f"{HEADER}\n" + "|---" * HEADER.count(" | ") + "|---|")
    for net, head, layer, labels, size in itertools.product(
        args.nets, args.heads, args.layers, args.labels, args.sizes
    ):
        network = NETWORKS[net]
        if layer == "mid" and network.mid is None:
            continue
        torch.manual_seed(0)
        model = network.make(labels, size).eval()
        model = with_mlp_head(model, network.head).eval() if head == "mlp" else model
        image = torch.rand(args.batch, 1, *network.shape(size))
        last = next(row.name for row in ct.layers(model, image, seen=False) if row.default)
        at = network.mid if layer == "mid" else last
        for name, ratios in rounds(pieces(model, image, at, labels, args.peers), args.rounds, args.slow_rounds).items():
            low, high = median_interval(ratios)
            first = f"| {net} | {head} | {layer} | {labels} | {network.volume(size)} | {name} |"
            print(f"{first} {statistics.median(ratios):.3f} ({low:.3f}-{high:.3f}) | {len(ratios)} |", flush=True)
    print(f"\nbatch {args.batch}, processor time, {machine()}")


if __name__ == "__main__":
    main()
