"""Respond-CAM on simulated cryo-electron tomograms: is the sum of a map the score that it explains?

    python recipes/respond_cam.py            # 3 seeds, about 12 core-minutes
    python recipes/respond_cam.py --size 40 --cases 20000 --epochs 20 --widths 32 64 --hidden 512    # days on a CPU

The first table of Zhao et al. (2018): CNN-1 and CNN-2, volumes without noise and of SNR 0.1, Grad-CAM (without ReLU)
beside Respond-CAM; over all classes of a test volume the mean |sum - logit| (L1) and Kendall's tau. The same on
pictures, drawn here or from a tree of PASCAL VOC (`--voc`). Finished runs are kept in `--out`.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import _runs
import pytorch_lightning as pl
import torch
from _respond_cam import DATA, NETS, TITLES, add_up, figures, load, weights
from _start import count, drawn_tree, out_folder, start, voc_tree
from rich.console import Console

from camtrain.metrics import LabelAUROC, SumToScore

console = Console()


def train(out: Path, job: _runs.Job) -> dict[str, Any]:
    """One model: its skill on the test cases, and how its maps add up."""
    data, model = load(job)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "limit_val_batches": 0}
    pl.Trainer(max_epochs=job["epochs"], enable_progress_bar=False, **quiet).fit(model, data)
    model.eval().cpu()
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise _runs.Diverged("weights are no longer finite")
    torch.save(model.state_dict(), weights(out, job))
    scores, right, auroc = {m: SumToScore(len(data.labels)) for m in TITLES}, [], LabelAUROC(len(data.labels))
    for batch in data.test_dataloader()[0]:
        logits, _, sums = add_up(model, batch["image"])
        for method, total in sums.items():
            scores[method].update(total[..., None], logits)
        auroc.update(logits, batch["label"])
        right += (logits.argmax(1) == batch["label"].argmax(1)).tolist()
    skill = float(auroc.averaged("macro")) if job["data"] == "pictures" else sum(right) / len(right)
    return {"skill": skill} | {m: {k: float(v) for k, v in s.compute().items()} for m, s in scores.items()}


def table(runs: list[_runs.Run]) -> str:
    """A line per data, net and method: mean and range over seeds, and the mean standard deviation over cases."""
    rows = []
    for data, net in dict.fromkeys((r["job"]["data"], r["job"]["net"]) for r in runs):
        same = [r for r in runs if (r["job"]["data"], r["job"]["net"]) == (data, net)]
        found = [r["result"] for r in same if "result" in r]
        for method, title in TITLES.items():
            cells = [DATA[data], NETS[net], _runs.spread(r["skill"] for r in found), title]
            for name, digits in {"l1": 3 if method != "account" else 7, "kendall_tau": 3}.items():
                std = sum(r[method][f"{name}_std"] for r in found) / max(1, len(found))
                cells.append(f"{_runs.spread((r[method][name] for r in found), digits)} ± {std:.2g}")
            rows.append([*cells, f"{len(same) - len(found)} of {len(same)}"])
    header = ["data", "net", "accuracy (pictures: AUROC)", "map", "L1 ± std", "tau ± std", "seeds diverged"]
    return _runs.markdown(header, rows)


def verdict(runs: list[_runs.Run]) -> str:
    """The worst run of each kind of data and net against what is asked for."""
    rows = []
    for data, net in dict.fromkeys((r["job"]["data"], r["job"]["net"]) for r in runs):
        found = [r["result"] for r in runs if (r["job"]["data"], r["job"]["net"]) == (data, net) and "result" in r]
        ratio = max((r["respondcam"]["l1"] / r["gradcam"]["l1"] for r in found), default=float("nan"))
        tau = min((r["respondcam"]["kendall_tau"] for r in found), default=float("nan"))
        met = "yes" if ratio < 0.1 and tau > 0.95 else "no"
        rows.append([DATA[data], NETS[net], len(found), f"{ratio:.4f}", f"{tau:.3f}", met])
    header = ["data", "net", "seeds", "largest L1 ratio Respond-CAM / Grad-CAM", "smallest tau", "both met?"]
    return "Asked for: L1 ratio below 0.1, tau above 0.95. The worst seed:\n\n" + _runs.markdown(header, rows)


def main() -> None:
    """Train what is missing, tell, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"seeds": 3, "cases": 1500, "test-cases": 200, "epochs": 5, "size": 24, "hidden": 64,
                          "pictures": 1500, "picture": 64, "picture-epochs": 12, "workers": 1}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=count, default=default)
    parser.add_argument("--voxel", type=float, default=1.0, help="nm; a volume must be 20 nm wide")
    parser.add_argument("--widths", type=int, nargs=2, default=[8, 16])
    parser.add_argument("--voc", type=voc_tree, help="a tree of PASCAL VOC; default: one is drawn")
    parser.add_argument("--out", type=out_folder, default="runs/respond_cam")
    args = parser.parse_args()
    pictures = {"train": args.pictures, "val": args.test_cases, "test": 0, "size": args.picture}
    voc = args.voc or drawn_tree(args.out / f"voc_{args.pictures}_{args.picture}", **pictures)
    shared = {key: getattr(args, key) for key in ("widths", "hidden")}
    volumes = {key: getattr(args, key) for key in ("cases", "test_cases", "epochs", "size", "voxel")}
    drawn = {"voc": str(voc), "picture": args.picture, "epochs": args.picture_epochs}
    jobs = [{"data": data, "net": net, "seed": seed, **shared, **(drawn if data == "pictures" else volumes)}
            for seed in range(args.seeds) for data in DATA for net in NETS]  # fmt: skip
    runs = _runs.finish(jobs, functools.partial(train, args.out), args.out, args.workers)
    biases = "A batch of 16 test cases, seed 0:\n\n" + figures([job for job in jobs if job["seed"] == 0], args.out)
    text = "\n\n".join([table(runs), verdict(runs), biases, _runs.hardware()])
    (args.out / "respond_cam.md").write_text(text + "\n")
    console.print(text, soft_wrap=True, markup=False)
    console.print(f"Table, pictures and weights: {args.out}", soft_wrap=True)


if __name__ == "__main__":
    start(main)
