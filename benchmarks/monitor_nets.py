"""What a validation epoch costs with the monitor, for every network: interleaved pairs of epochs with and without it.

    python benchmarks/monitor_nets.py                                          # five networks, 80 labels, 64^3
    python benchmarks/monitor_nets.py --nets DenseNet121 --labels 1 16 80 --heads affine mlp
    python benchmarks/monitor_nets.py --layers mid --map-budget none           # maps of all labels, whatever they cost

The monitor scores HiResCAM on the layer that `layer=None` finds (`--layers mid`: on a middle one) against the organs of
each label, with every free measure; pictures and alarms are off. An epoch has as many cases as a plain one of about
`--seconds` needs, in batches of `--batch`, under no_grad as the validations of a fit are. Where maps take backward
passes, a second of them is free in any epoch; `--free 0` shows what `map_budget` alone takes.

Processor time; the interval is that of the median, 90 %.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import tempfile
import time
import warnings
from functools import partial

import torch
from _networks import NETWORKS, with_mlp_head
from _pairs import Ratio, interleaved, machine
from torch.utils.data import DataLoader
from validation_cost import Lit, cases, monitor_of, trainer_in

import camtrain as ct

HEADER = "| network | head | layer | labels | volume | epoch with / without | ms more | ms plain | pairs |"
AS_IN_A_FIT = {"inference_mode": False}  # Lightning validates under no_grad there
FIVE = ["DenseNet121", "EfficientNet-B0", "ResNet18", "ResNet50", "AxialNet"]


def compare(net: str, head: str, layer: str, labels: int, size: int, args: argparse.Namespace) -> Ratio:
    """Epochs of one setting with the monitor over plain ones."""
    torch.manual_seed(0)
    network, batch = NETWORKS[net], args.batch
    model = network.make(labels, size).eval()
    model = with_mlp_head(model, network.head).eval() if head == "mlp" else model
    image = torch.rand(batch, 1, *network.shape(size))
    found = next(row.name for row in ct.layers(model, image, seen=False) if row.default)
    # EfficientNet's last activation is a module that runs several times: the last run counts.
    watched_layer = f"net.{network.mid if layer == 'mid' else found}"
    monitor = monitor_of(labels, watched_layer, every_n_epochs=0, call=-1, **args.map_budget)
    monitor.budget.free = args.free
    with torch.no_grad():
        model(image)
        start = time.process_time()
        model(image)
    number = batch * max(2, round(args.seconds / (time.process_time() - start)))
    loader, module = DataLoader(cases(number, network.shape(size), labels, args.present), batch), Lit(model)
    with tempfile.TemporaryDirectory() as folder:
        plain, watched = (
            partial(trainer.validate, module, loader, verbose=False)
            for trainer in (trainer_in(folder, **AS_IN_A_FIT), trainer_in(folder, monitor, **AS_IN_A_FIT))
        )
        return interleaved(plain, watched, args.pairs, warm=1)


def _budget(word: str) -> dict[str, float | None]:
    return {"map_budget": None if word == "none" else float(word)}


def main() -> None:
    """Print a line per setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETWORKS), default=FIVE)
    parser.add_argument("--heads", nargs="+", choices=["affine", "mlp"], default=["affine"])
    parser.add_argument("--layers", nargs="+", choices=["last", "mid"], default=["last"])
    parser.add_argument("--labels", nargs="+", type=int, default=[80])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64])
    parser.add_argument("--present", type=float, default=0.15)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--map-budget", type=_budget, default={}, metavar="SHARE", help="none: maps of all labels")
    parser.add_argument("--free", type=float, default=1.0, help="seconds of passes that any epoch has")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for talker in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(talker).setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    print(f"{HEADER}\n" + "|---" * HEADER.count(" | ") + "|---|")
    for net, head, layer, labels, size in itertools.product(
        args.nets, args.heads, args.layers, args.labels, args.sizes
    ):
        if layer == "mid" and NETWORKS[net].mid is None:
            continue
        found = compare(net, head, layer, labels, size, args)
        print(
            f"| {net} | {head} | {layer} | {labels} | {NETWORKS[net].volume(size)} | {found} | {found.extra:.1f} "
            f"| {found.plain:.0f} | {found.pairs} |",
            flush=True,
        )
    print(f"\nprocessor time of epochs, batch {args.batch}, {args.present:.0%} of the labels present, {machine()}")


if __name__ == "__main__":
    main()
