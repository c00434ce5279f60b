"""Two questions about the mask loss, answered on the chest phantom with several seeds (docs/results.md).

    python benchmarks/phantom_study.py claim       # the papers' claim: OrganIoU with and without the mask loss
    python benchmarks/phantom_study.py claim --cooccurrence 0.6          # the same where findings come together
    python benchmarks/phantom_study.py shortcut    # AUROC when the shortcut turns: plain, mask loss, ceiling

Each finished run is one JSON line in `--out`; an interrupted study goes on where it stopped. The table is printed from
those lines and written beside them as Markdown.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytorch_lightning as pl
from monai.networks.nets import ResNet
from torch import nn

import camtrain as ct
from camtrain.data import PhantomDataModule
from camtrain.models import FlattenNet, LitClassifier

NETS: dict[str, tuple[Callable[[tuple[int, ...]], nn.Module], str | None]] = {
    "flatten": (lambda size: FlattenNet(labels=8, size=size), None),
    "resnet18q": (
        lambda size: ResNet(
            "basic",
            [2, 2, 2, 2],
            [16, 32, 64, 128],
            spatial_dims=3,
            n_input_channels=1,
            num_classes=8,
            conv1_t_stride=2,
        ),
        "layer4",
    ),
}
# Question -> (net, what is trained, planted shortcut, mask loss?)
RUNS = {
    "claim": [("flatten", "plain", None, False), ("flatten", "mask loss", None, True)],
    "shortcut": [
        (net, *kind)
        for net in NETS
        for kind in (("plain", 0.95, False), ("mask loss", 0.95, True), ("ceiling", 0.5, False))
    ],
}


def train(name: str, shortcut: float | None, mask_loss: bool, seed: int, args: argparse.Namespace) -> dict[str, object]:
    """One training and its test scores: {split: {measure[@method]: {label or mean: value}}}."""
    pl.seed_everything(seed, verbose=False)
    data = PhantomDataModule(
        cases=args.cases, val_cases=args.test_cases, test_cases=args.test_cases, batch_size=16, seed=seed,
        shortcut=shortcut, cooccurrence=args.cooccurrence,
        **({} if args.size is None else {"size": args.size}),
        test_splits=["test"] if shortcut is None else ["test", "shift_free", "shift_random", "shift_reversed"],
    )  # fmt: skip
    make, layer = NETS[name]
    model = LitClassifier(
        make(data.phantom.size), labels=data.labels, lr=args.lr, weight_decay=1e-2, schedule="one_cycle"
    )
    monitor = ct.AttentionMonitor(layer=layer, methods=["hirescam", "gradcam"], every_n_epochs=0)
    extra = [ct.MaskLossCallback(layer=layer, weight=args.weight)] if mask_loss else []
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        callbacks=[*extra, monitor],
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(args.out),
        num_sanity_val_steps=0,
        # Thresholds for OrganIoU come from the last validation.
        check_val_every_n_epoch=args.epochs,
    )
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    trainer.test(model, data, verbose=False)
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for split, rows in monitor.scores.items():
        for score in rows:
            name = score.measure + (f"@{score.method}" if score.method else "")
            scores.setdefault(split, {}).setdefault(name, {})[score.label or "mean"] = score.value
    return {"scores": scores, "seconds": round(seconds, 1)}


def study(question: str, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """All runs of a question, finished ones from the file."""
    path = args.out / f"{question}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for seed in range(args.seeds):
        for net, kind, shortcut, mask_loss in RUNS[question]:
            if args.net not in (None, net):
                continue
            key = {
                "net": net,
                "kind": kind,
                "seed": seed,
                "epochs": args.epochs,
                "cases": args.cases,
                "weight": args.weight,
            }
            row = next((r for r in done if {k: r[k] for k in key} == key), None)
            if row is None:
                row = key | train(net, shortcut, mask_loss, seed, args)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            print(f"{net} {kind} seed {seed}: AUROC {row['scores']['test']['auroc']['mean']:.3f}", flush=True)
            yield row


def spread(values: list[float]) -> str:
    """Mean and range over seeds."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def table(question: str, rows: list[dict]) -> str:
    """The answer as Markdown."""
    groups = {(r["net"], r["kind"]): [s for s in rows if (s["net"], s["kind"]) == (r["net"], r["kind"])] for r in rows}
    if question == "claim":
        lines = ["| trained with | map | OrganIoU micro | energy inside | AUROC |", "|---|---|---|---|---|"]
        for (_, kind), runs in groups.items():
            for method in ("gradcam", "hirescam"):
                cells = [[r["scores"]["test"][m]["mean"] for r in runs]
                         for m in (f"organ_iou_micro@{method}", f"energy_inside@{method}", "auroc")]  # fmt: skip
                lines.append(f"| {kind} | {method} | " + " | ".join(map(spread, cells)) + " |")
        return "\n".join(lines)
    splits = ["test", "shift_free", "shift_random", "shift_reversed"]
    lines = [
        "| net | trained with | " + " | ".join(splits) + " | worst label, reversed | energy inside |",
        "|---" * 8 + "|",
    ]
    for (net, kind), runs in groups.items():
        aurocs = [spread([r["scores"][s]["auroc"]["mean"] for r in runs]) for s in splits]
        worst = spread([min(v for k, v in r["scores"]["shift_reversed"]["auroc"].items() if k != "mean") for r in runs])
        energy = spread([r["scores"]["test"]["energy_inside@hirescam"]["mean"] for r in runs])
        lines.append(f"| {net} | {kind} | " + " | ".join([*aurocs, worst, energy]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run a question and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=sorted(RUNS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", type=int, default=800)
    parser.add_argument("--test-cases", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--size", type=int, default=None, help="cube; default: the phantom's own")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight", type=float, default=1 / 3)
    parser.add_argument("--cooccurrence", type=float, default=0.0)
    parser.add_argument("--net", choices=sorted(NETS), default=None, help="only this network")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    args = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    rows = list(study(args.question, args))
    text = table(args.question, rows)
    (args.out / f"{args.question}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
