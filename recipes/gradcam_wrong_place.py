"""How much of Grad-CAM lies on cells that did not raise the logit?

    python recipes/gradcam_wrong_place.py --workers 2

Behind one fully connected layer the contribution of each cell to the logit is known by proof: it is HiResCAM. Three
nets learn the phantom without any mask loss: a flatten head, AxialNet's head per slice, and, as control, a global
average pool, where Grad-CAM and HiResCAM are one map. The share of Grad-CAM's positive mass on cells whose contribution
is zero or negative is then taken, over the findings that are there in the test cases.
"""

from __future__ import annotations

import argparse
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from _runs import Diverged, Job, Run, finish, finite, hardware, markdown, spread
from _start import count, out_folder, start
from PIL import Image

import camtrain as ct
from camtrain.data import PhantomDataModule
from camtrain.metrics import label_auroc, wrong_place
from camtrain.models import AxialNet, FlattenNet, LitClassifier, PoolNet
from camtrain.reporting import Row, geometry, side_by_side

NETS = {
    "flatten": ("relu", lambda labels, size: FlattenNet(labels, size=size, pool=2)),
    "axial": (
        "stack",
        lambda labels, size: AxialNet(labels, variant="small", image_size=size[:2], slice_axis=2, group=2),
    ),
    "pool": ("relu", lambda labels, size: PoolNet(labels, size=size)),
}
TITLES = {"flatten": "FlattenNet", "axial": "AxialNet (small)", "pool": "PoolNet (control)"}


@lru_cache(maxsize=1)
def phantom(cases: int, size: tuple[int, ...]) -> PhantomDataModule:
    """One population for all nets and seeds, without markers."""
    return PhantomDataModule(cases=cases, size=size, shortcut=None, test_splits=["test"], test_cases=max(8, cases // 4))


def train(job: Job, out: Path) -> dict[str, Any]:
    """Plain training, then shares per finding, and what they rest on: contributions that add up to the logit."""
    layer, make = NETS[job["net"]]
    data = phantom(job["cases"], tuple(job["size"]))
    pl.seed_everything(job["seed"], verbose=False)
    net = make(len(data.labels), data.phantom.size)
    model = LitClassifier(net, labels=data.labels, lr=2e-3, weight_decay=1e-2, schedule="one_cycle")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "limit_val_batches": 0}
    pl.Trainer(max_epochs=job["epochs"], accelerator="cpu", enable_progress_bar=False, **quiet).fit(model, data)
    cases = [case for batch in data.test_dataloader() for case in batch.dataset]
    image, label = (torch.stack([case[key] for case in cases]) for key in ("image", "label"))
    with torch.no_grad():
        logits = model.eval()(image)
    if not logits.isfinite().all():
        raise Diverged("logits are not finite")
    gradcam, exact = (ct.explain(model, image, method, layer) for method in ("gradcam", "hirescam"))
    shares = measured(gradcam, exact, label)
    share = shares["gradcam"]
    if job["seed"] == 0 and job["net"] != "pool" and share.isfinite().any():
        at, column = (share == share.nanmedian()).nonzero()[0].tolist()
        title = f"{TITLES[job['net']]}, {data.labels[column]}: {share[at, column]:.0%} of Grad-CAM in a wrong place"
        figure(cases[at], gradcam[at, column], exact[at, column], title, out / f"{job['net']}.png")
    *_, bias = (module.bias.detach() for module in net.modules() if isinstance(module, torch.nn.Linear))
    return {
        "labels": data.labels,
        "shares": {name: share.nanmean(dim=0).tolist() for name, share in shares.items()},
        "undefined": 1 - (shares["gradcam"].isfinite().sum() / label.sum()).item(),
        "gap": (exact.flatten(2).sum(dim=2) + bias - logits).abs().max().item(),
        "auroc": label_auroc(logits, label).nanmean().item(),
    }


def measured(gradcam: torch.Tensor, exact: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
    """Shares (B, L) in a wrong place, NaN where the finding is absent."""
    strongest = ((gradcam == gradcam.amax(dim=(2, 3, 4), keepdim=True)) & (gradcam > 0)).float()
    return {
        "gradcam": wrong_place(gradcam, exact, label),
        "opposite": 1 - wrong_place(gradcam, -exact, label),  # all but what lies on zero or more
        "tolerant": wrong_place(gradcam, exact, label, tolerance=0.01),
        "strongest": wrong_place(strongest, exact, label),
        "even": wrong_place(torch.ones_like(exact), exact, label),
        "missed": wrong_place(exact, gradcam, label),  # of what raises the logit, the share that Grad-CAM lacks
        "hirescam": wrong_place(exact, exact, label),
    }


def figure(case: dict[str, Any], gradcam: Any, exact: Any, title: str, path: Path) -> None:
    """CT, Grad-CAM, exact contributions, in the plane where most of Grad-CAM is in a wrong place."""
    wrong = (gradcam > 0) & (exact <= 0)
    at = (gradcam * wrong).flatten().argmax()
    cell = np.unravel_index(int(at), tuple(gradcam.shape))
    point = [int((c + 0.5) * n / m) for c, n, m in zip(cell, case["image"].shape[1:], gradcam.shape, strict=True)]
    axes, spacing = geometry(case["affine"].numpy())
    maps = [gradcam.numpy(), exact.numpy()]
    row = Row(case["image"].numpy(), maps, wrong.numpy(), title, "coronal", spacing, axes, point)
    titles = ("CT", "Grad-CAM", "exact contributions")
    drawn = side_by_side([row], titles, width=1100, region="for in Grad-CAM, zero or against in truth")
    Image.fromarray(drawn).save(path, optimize=True)


def report(runs: list[Run]) -> str:
    """A table of nets, and one of findings for each."""
    shown = {"gradcam": "Grad-CAM", "opposite": "opposite only", "tolerant": "below 1 %", "strongest": "strongest cell",
             "even": "even map", "missed": "missed", "hirescam": "HiResCAM"}  # fmt: skip
    nets, rows, tables = list(dict.fromkeys(run["job"]["net"] for run in runs)), [], []
    for net in nets:
        own = [run for run in runs if run["job"]["net"] == net]
        good = [run["result"] for run in own if "result" in run]
        means = [spread(np.mean(finite(r["shares"][key])) for r in good) for key in shown]
        gap = f"{max((r['gap'] for r in good), default=np.nan):.0e}"
        rest = [spread(r["auroc"] for r in good), gap, spread(r["undefined"] for r in good), len(own) - len(good)]
        rows.append([TITLES[net], *means, *rest])
        found = [
            [label, *(spread(r["shares"][key][i] for r in good) for key in shown)]
            for i, label in enumerate(good[0]["labels"] if good else [])
        ]
        tables.append(markdown([TITLES[net], *shown.values()], found))
    header = ["net", *shown.values(), "AUROC", "largest gap of the sum", "without a share", "diverged"]
    return "\n\n".join([markdown(header, rows), *tables, hardware()])


def main() -> None:
    """Train the nets of all seeds, count, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=count, default=500)
    parser.add_argument("--epochs", type=count, default=8)
    parser.add_argument("--seeds", type=count, default=3, help="how many, counted from 0")
    parser.add_argument("--size", type=int, nargs=3, default=(32, 24, 32))
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--workers", type=count, default=1)
    parser.add_argument("--out", type=out_folder, default="runs/gradcam_wrong_place")
    args = parser.parse_args()
    shared = {"cases": args.cases, "epochs": args.epochs, "size": list(args.size)}
    jobs = [{"net": net, "seed": seed, **shared} for net in args.nets for seed in range(args.seeds)]
    text = report(finish(jobs, partial(train, out=args.out), args.out, args.workers, lambda job: job["seed"]))
    print(text)
    (args.out / "gradcam_wrong_place.md").write_text(text + "\n")


if __name__ == "__main__":
    start(main)
