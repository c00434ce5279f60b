"""The Grad-CAM paper's human studies as a kit, answered by two scripted readers: one with a rule, and one that guesses.

    python recipes/reader_study.py             # under five minutes on one core
    python recipes/reader_study.py --cases 24 --epochs 1 --test-cases 24 --shown 3 --seeds 1 --out /tmp/study

No human takes part. Two small networks learn the phantom, plain and with the organ mask loss; `camtrain study make`
writes the page; the readers of `_scripted_reader.py` answer it by keyboard in a headless Chromium (without one the
same answers are written as the page would write them, and the table says so); `camtrain study analyse` judges them.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from _browser import find_browser
from _runs import Diverged, Job, Run, finish, hardware, markdown, spread
from _scripted_reader import answer, by_chance, by_rule, read_page
from _start import count, out_folder, start
from PIL import Image
from rich.console import Console

import camtrain as ct
from camtrain.cli.main import main as camtrain
from camtrain.data import PhantomDataModule
from camtrain.models import FlattenNet, LitClassifier

LABELS = ["nodule", "effusion", "cardiomegaly", "aneurysm", "consolidation"]
console = Console()


def train(name: str, job: Job, data: PhantomDataModule, path: Path) -> None:
    """A few epochs, and a checkpoint."""
    pl.seed_everything(job["seed"], verbose=False)
    net = FlattenNet(labels=len(LABELS), size=data.phantom.size)
    model = LitClassifier(net, labels=data.labels, lr=2e-3, weight_decay=1e-2, schedule="one_cycle")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    callbacks = [ct.MaskLossCallback(weight=1 / 3)] if name == "masked" else []
    trainer = pl.Trainer(max_epochs=job["epochs"], accelerator="cpu", limit_val_batches=0, callbacks=callbacks, **quiet)
    trainer.fit(model, data)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise Diverged(f"{name}: weights are not finite")
    trainer.save_checkpoint(path)


def make(folder: Path, job: Job, split: str) -> Path:
    """`camtrain study make`: the page, with its key beside it."""
    words = ["--ckpt_path", folder / "masked.ckpt", "--against", folder / "plain.ckpt", "--methods", "hirescam,gradcam"]
    words += ["--split", split, "--cases", job["shown"], "--seed", job["seed"], "--out", folder / split, "--overwrite"]
    if camtrain(["study", "make", *map(str, words), "--cut", str(job["cut"])]):
        raise Diverged("no study could be made: there is no finding that both networks find")
    return folder / split / "study.html"


def study(job: Job) -> dict[str, Any]:
    """One seed: train, make, answer, analyse; both analyses."""
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    folder = Path(job["out"]) / f"seed{job['seed']}"
    folder.mkdir(parents=True, exist_ok=True)
    shape = {"val_cases": job["test_cases"], "test_cases": job["test_cases"], "size": tuple(job["size"])}
    data = PhantomDataModule(labels=LABELS, cases=job["cases"], seed=job["seed"], test_splits=["test"], **shape)
    for name in ("plain", "masked"):
        train(name, job, data, folder / f"{name}.ckpt")
    pages = {split: make(folder, job, split) for split in ("val", "test")}
    tasks, practice = read_page(pages["test"]), read_page(pages["val"])
    keys = {split: json.loads((page.parent / "key.json").read_text()) for split, page in pages.items()}
    said = {"rule": by_rule(tasks, practice, keys["val"])}
    said |= {f"guess{i}": by_chance(tasks, 100 * job["seed"] + i) for i in range(job["guessers"])}
    files = {name: answer(pages["test"], keys["test"]["study"], name, given) for name, given in said.items()}
    found: dict[str, Any] = {"how": "by file" if find_browser() is None else "in Chromium"}
    for who in ("rule", "guess"):
        given = [str(path) for name, path in files.items() if name.startswith(who)]
        key, out = str(folder / "test" / "key.json"), folder / who
        camtrain(["study", "analyse", "--key", key, *given, "--out", str(out)])
        found[who] = json.loads((out / "analysis.json").read_text(encoding="utf-8"))
    return found


def rows_of(runs: list[Run]) -> list[list[str]]:
    """A line per reader and question; spread over seeds, interval of the first."""
    lines = []
    done = [run["result"] for run in runs if "result" in run]
    for who in ("rule", "guess") if done else ():
        for first in (row for row in done[0][who]["rows"] if row["label"] == "all"):
            asked = first["part"], first["subject"], "all"
            same = [r for one in done for r in one[who]["rows"] if (r["part"], r["subject"], r["label"]) == asked]
            # Of one reader's right answers Wilson's: a bootstrap of equal values has no width.
            kind = "wilson_" if who == "rule" and first["part"] == "accuracy" else ""
            ends = "-" if first[f"{kind}low"] is None else f"{first[f'{kind}low']:.2f} to {first[f'{kind}high']:.2f}"
            chance = f"{first['chance']:.2f}" if first["chance"] else "0"
            ps = dict.fromkeys("< 0.0001" if r["p"] < 1e-4 else f"{r['p']:.4f}" for r in same)
            value = spread([r["value"] for r in same], 2)
            lines.append([f"{who}: {first['part']}", first["subject"], first["n"], value, ends, chance, ", ".join(ps)])
    return lines


def main() -> None:
    """All seeds, the table, the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=count, default=240)
    parser.add_argument("--epochs", type=count, default=6)
    parser.add_argument("--test-cases", type=count, default=60, help="of validation (practice) and of test")
    parser.add_argument("--shown", type=count, default=15, help="cases of each kind of task")
    parser.add_argument("--guessers", type=count, default=3)
    parser.add_argument("--size", type=int, nargs=3, default=(48, 36, 48))
    parser.add_argument("--cut", type=float, default=0.5, help="found means probability >= CUT")
    parser.add_argument("--seeds", type=count, default=2, help="how many, counted from 0")
    parser.add_argument("--workers", type=count, default=1)
    parser.add_argument("--out", type=out_folder, default="runs/reader_study")
    args = parser.parse_args()
    settings = {
        name: getattr(args, name) for name in ("cases", "epochs", "test_cases", "shown", "guessers", "size", "cut")
    }
    jobs = [{**settings, "size": list(args.size), "seed": seed, "out": str(args.out)} for seed in range(args.seeds)]
    runs = finish(jobs, study, args.out, args.workers)
    header = ["reader: question", "maps", "answers", "value, seeds", "interval, first seed", "chance", "p, seeds"]
    text = markdown(header, rows_of(runs))
    how = {run["result"]["how"] for run in runs if "result" in run}
    notes = [f"Answers were given {', '.join(how) or 'by nobody'}; A = mask loss, B = plain. {hardware()}."]
    notes += [f"Seed {run['job']['seed']} gave no study: {run['diverged']}." for run in runs if "diverged" in run]
    (args.out / "reader_study.md").write_text("\n\n".join([text, *notes]) + "\n", encoding="utf-8")
    console.print("\n\n".join([text, *notes]), soft_wrap=True, markup=False)
    pages = [args.out / "seed0" / "test" / f"{kind}.png" for kind in ("discrimination", "trust")]
    shots = [Image.open(path).convert("RGB") for path in pages if path.exists()]
    if shots:
        sheet = Image.new("RGB", (max(s.width for s in shots), sum(s.height for s in shots) + 8), "white")
        for place, shot in zip((0, shots[0].height + 8), shots, strict=False):
            sheet.paste(shot, (0, place))
        sheet.quantize(256, kmeans=4, dither=Image.Dither.NONE).save(args.out / "reader_study.png", optimize=True)
    console.print(f"Pages, keys, answers and tables: {args.out}", soft_wrap=True)


if __name__ == "__main__":
    start(main)
