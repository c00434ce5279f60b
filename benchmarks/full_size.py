"""The paper's AxialNet at full size: what one training step and one validation step take, in memory and in time.

    python benchmarks/full_size.py                                       # 135 x 3 x 420 x 420 voxels, 80 labels, CPU
    python benchmarks/full_size.py --device cuda --precision bf16 --compile      # where a GPU is at hand

Each row is a process of its own, so that its peak resident memory is its own. A training step is forward, task loss,
mask loss on the maps of all labels, backward and an SGD step with momentum; the second step counts, for the first makes
the optimizer's state. A validation step is a forward under Lightning's Trainer with `AttentionMonitor` and all its free
measures. Operations are counted by torch (`FlopCounterMode`), bytes are those that the layers must at least read and
write once: activations in and out of every convolution and norm, weights, gradients. Takes minutes and up to 11 GiB:
never part of `make test`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _pairs import machine
from step_cost import step
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from validation_cost import Lit, trainer_in

import camtrain as ct
from camtrain.models import AxialNet

ROWS = {
    "training step, plain": {},
    "training step, mask loss": {"mask": True},
    "training step, mask loss, activation checkpointing": {"mask": True, "saving": True},
    "validation step, plain": {"validate": True},
    "validation step, monitor": {"validate": True, "mask": True},
}


def make_net(labels: int, size: list[int], saving: bool) -> AxialNet:
    """The full variant: three adjacent slices are one picture."""
    torch.manual_seed(0)
    return AxialNet(
        labels=labels, image_size=(size[1], size[2]), slice_axis=0, group=3, activation_checkpointing=saving
    )


def make_case(labels: int, size: list[int]) -> dict[str, Tensor]:
    """Noise, two lungs and what lies between them as boxes."""
    organs = torch.zeros(1, 1, *size, dtype=torch.uint8)
    third = [s // 3 for s in size]
    for index in range(3):
        organs[..., third[0] :, third[1] : 2 * third[1], index * third[2] : (index + 1) * third[2]] = index + 1
    label = (torch.rand(1, labels, generator=torch.Generator().manual_seed(0)) > 0.8).float()
    return {"image": torch.rand(1, 1, *size), "label": label, "organs": organs}


def train(net: nn.Module, case: dict[str, Tensor], table: ct.OrganTable | None, precision: str) -> float:
    """Seconds of the second of two steps."""
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.99)
    extra = None if table is None else (ct.LayerTap(net, "stack"), table, ct.OrganMaskLoss())
    device = next(net.parameters()).device
    for _ in range(2):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            step(net, optimizer, case, extra)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - start


def validate(net: nn.Module, case: dict[str, Tensor], table: ct.OrganTable | None) -> float:
    """Seconds of one pass over one case."""
    # The module around the net has no forward, so the layer has to be named.
    callbacks = [] if table is None else [ct.AttentionMonitor("net.stack", table=table, every_n_epochs=0)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_in(folder, *callbacks)
        loader = DataLoader([{key: value[0] for key, value in case.items()}], 1)
        start = time.perf_counter()
        trainer.validate(Lit(net), loader, verbose=False)
        return time.perf_counter() - start


def one(args: argparse.Namespace) -> dict[str, float]:
    """A row's figures."""
    what = ROWS[args.row]
    net = make_net(args.labels, args.size, bool(what.get("saving"))).train(not what.get("validate")).to(args.device)
    if args.device == "cuda":
        net.to(memory_format=torch.channels_last)
    case = {key: value.to(args.device) for key, value in make_case(args.labels, args.size).items()}
    if args.compile:
        ct.compile_backbone(net, case["image"])
    full = ct.OrganTable.load("rad_chestct")
    table = full.select(full.labels[: args.labels]) if what.get("mask") else None
    seconds = validate(net, case, table) if what.get("validate") else train(net, case, table, args.precision)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    return {"seconds": seconds, "gib": peak}


def work_of(args: argparse.Namespace) -> tuple[float, float]:
    """Operations (two per multiply-add) of a plain training step, and GiB that it must at least move."""
    moved, width = 0, 2 if args.precision == "bf16" else 4  # under autocast the weights stay wide

    def count(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal moved
        # Forward reads and writes once; backward reads the input and the gradient behind, and writes the one before.
        weights = sum(p.numel() for p in module.parameters(recurse=False))
        moved += width * (given[0].numel() * 3 + out.numel() * 2) + 4 * weights * 5

    with torch.device("meta"):
        net = make_net(args.labels, args.size, saving=False)
        case = torch.empty(1, 1, *args.size)
    for module in net.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter:
        net(case).sum().backward()
    return float(counter.get_total_flops()), moved / 2**30


def roofs(device: str, precision: str) -> tuple[float, float]:
    """What the machine can do: GFLOP/s of a large product of matrices, GB/s of a large copy; the best of five.

    The product in the numbers that the step's convolutions take.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def best(piece: Callable[[], object]) -> float:
        piece()
        seconds = []
        for _ in range(5):
            wait()
            start = time.perf_counter()
            piece()
            wait()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    edge = 3072
    matrix, long = torch.rand(edge, edge, device=device).to(dtype), torch.rand(2**27, device=device)
    target = torch.empty_like(long)
    return 2 * edge**3 / best(lambda: matrix @ matrix) / 1e9, 8 * long.numel() / best(lambda: target.copy_(long)) / 1e9


def main() -> None:
    """Print a row per kind of step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=80)
    parser.add_argument("--size", type=int, nargs=3, default=[405, 420, 420], help="slices, rows, columns")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="the backbone")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(one(args)))
        return
    operations, moved = work_of(args)
    product, copy = roofs(args.device, args.precision)
    roof = min(product, operations / moved / 2**30 * copy)
    print("| AxialNet, full variant | peak GiB | seconds | |\n|---|---|---|---|", flush=True)
    for row in args.rows:
        command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--row", row]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rate = operations / found["seconds"] / 1e9
        rate = f"{rate:.0f} GFLOP/s, {rate / roof:.0%} of the roof" if row == "training step, plain" else ""
        print(f"| {row} | {found['gib']:.2f} | {found['seconds']:.0f} | {rate} |", flush=True)
    print(
        f"\nA plain training step: {operations / 1e12:.2f} TFLOP, at least {moved:.1f} GiB moved, "
        f"{operations / moved / 2**30:.0f} FLOP per byte. The machine: {product:.0f} GFLOP/s in a product of matrices, "
        f"{copy:.1f} GB/s in a copy; the roof is {roof:.0f} GFLOP/s. Batch 1, {args.labels} labels, "
        f"{args.size}, {args.device}, {args.precision}; {machine()}"
    )


if __name__ == "__main__":
    main()
