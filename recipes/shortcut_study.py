"""What closes a shortcut gap? Eleven ways to train two networks, with the shortcut in four places, on the phantom.

    python recipes/shortcut_study.py arms               # all arms, four places of the shortcut, two networks
    python recipes/shortcut_study.py organs             # organs on 100, 30, 10, 3, 1 % of the training cases
    python recipes/shortcut_study.py masks              # dilated, shifted, boxes, lesion holes, one site
    python recipes/shortcut_study.py ways               # OutsideSwap's own settings against each other
    python recipes/shortcut_study.py wide               # ResNet-18 at full width, one seed

`--workers 2` uses two processes of one thread. Finished runs are kept in `--out`; an interrupted study goes on. Forms
and weights of the mask loss are those of the library and of earlier trials; none was chosen on a shift split.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from _runs import Job, finish, hardware
from _shortcut_arms import ARMS, train
from _shortcut_data import MASKS
from _shortcut_figure import draw
from _shortcut_tables import QUESTIONS, report
from _start import count, out_folder, start

PLACES = ["skin", "other_organ", "own_organ", "co-occurring"]
WAYS: list[dict[str, Any]] = [
    {"keep": "label", "p": 0.5},
    {"keep": "label", "p": 1.0},
    {"keep": "label", "targets": "follow", "p": 0.75},
    {"keep": "organs", "p": 0.75},
    {"keep": "organs", "p": 1.0},
    {"keep": "union", "p": 1.0},
]


def jobs_of(question: str, args: argparse.Namespace) -> list[Job]:
    """The runs that a question takes, most wanted first."""
    base: Job = {
        "shortcut": args.shortcut, "cases": args.cases, "test_cases": args.test_cases, "size": args.size,
        "epochs": args.epochs, "masks": "exact", "organs_share": 1.0, "swap": {},
    }  # fmt: skip
    nets = args.nets or ["flatten", "resnet18q"]
    grid: dict[str, dict[str, Any]] = {
        "arms": {"place": args.places, "arm": args.arms},
        "organs": {"place": args.places[:1], "organs_share": args.shares, **_few_organs(args.arms)},
        "masks": {"masks": args.masks, "arm": [a for a in ("swap", "softplus") if a in args.arms]},
        "ways": {"place": args.places[:2], "arm": ["swap"], "swap": WAYS},
        "wide": {
            "arm": ["plain", "ceiling", "swap", "swap + mask loss"],
            "net": ["resnet18"],
            "seed": [0],
            "precision": ["bf16-mixed"],
        },
    }
    axes = {"place": ["skin"], "seed": range(args.seeds), "net": nets} | grid[question]
    together = axes.pop("arm, swap", [{}])
    every = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [base | one | more for one in every for more in together]


def _few_organs(arms: list[str]) -> dict[str, Any]:
    """Arms that organs are for, the swap with each way to treat the cases without."""
    ways = [{}, {"without_organs": "lend"}, {"without_organs": "atlas"}]
    asked = [("swap", ways), ("softplus", ways[:1]), ("swap + mask loss", ways[1:])]
    return {"arm, swap": [{"arm": arm, "swap": way} for arm, each in asked if arm in arms for way in each]}


def main() -> None:
    """Run the questions asked, then print and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", choices=[*QUESTIONS, []], help="default: arms")
    parser.add_argument("--seeds", type=count, default=5)
    parser.add_argument("--cases", type=count, default=500)
    parser.add_argument("--test-cases", type=count, default=200)
    parser.add_argument("--size", type=int, nargs=3, default=[24, 18, 24])
    parser.add_argument("--epochs", type=count, default=16)
    parser.add_argument("--shortcut", type=float, default=0.975)
    parser.add_argument("--nets", nargs="+", choices=["flatten", "resnet18q", "resnet18"], default=None)
    parser.add_argument("--places", nargs="+", choices=PLACES, default=PLACES)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.1, 0.03, 0.01], help="of organs")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=[m for m in MASKS if m != "exact"])
    parser.add_argument("--workers", type=count, default=1)
    parser.add_argument("--table-only", action="store_true", help="tables of what is finished, no training")
    parser.add_argument("--out", type=out_folder, default=Path("runs/shortcuts"))
    args = parser.parse_args()
    for question in args.questions or ["arms"]:
        if not args.table_only:
            finish(
                jobs_of(question, args), train, args.out, args.workers,
                together=lambda job: (job["place"], job["seed"], job["net"], job["masks"]),
            )  # fmt: skip
    text = report(args.out)
    (args.out / "shortcuts.md").write_text(f"{text}\n\n{hardware()}\n")
    print(text)
    print(f"figure: {draw(args.out)}")


if __name__ == "__main__":
    start(main)
