"""What `respond_cam.py` trains, adds up and draws. Not a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _runs
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor, nn

import camtrain as ct
from camtrain.data import CryoETDataModule, PascalVOCDataModule
from camtrain.models import LitClassifier, SubtomogramCNN
from camtrain.reporting import Row, side_by_side
from camtrain.reporting.sums_plot import plot_sums

TITLES = {"gradcam": "Grad-CAM", "respondcam": "Respond-CAM", "account": "Respond-CAM + biases"}
DATA = {"clean": "volumes, no noise", "noisy": "volumes, SNR 0.1", "pictures": "pictures (2D)"}
NETS = {"cnn1": "CNN-1", "cnn2": "CNN-2"}
SHOWN = ("torus", "dumbbell", "helix")
LAYER = "net.maxpool2"


def load(job: _runs.Job) -> tuple[Any, LitClassifier]:
    """Data, and a model with fresh weights."""
    net = {"variant": job["net"], "widths": job["widths"], "hidden": job["hidden"]}
    if job["data"] == "pictures":
        data: Any = PascalVOCDataModule(
            job["voc"], job["picture"], batch_size=16, test_splits=["val"], seed=job["seed"]
        )
        loss, shape = None, {"size": data.size, "channels": 3}  # several classes in a picture: sigmoids
    else:
        data = CryoETDataModule(size=job["size"], voxel=job["voxel"], snr=0.1 if job["data"] == "noisy" else None,
                                cases=job["cases"], test_cases=job["test_cases"], seed=job["seed"],
                                batch_size=16)  # fmt: skip
        loss, shape = nn.CrossEntropyLoss(), {"size": job["size"]}
    pl.seed_everything(job["seed"], verbose=False)
    model = SubtomogramCNN(len(data.labels), **net, **shape)
    if len(model.size) == 3:
        model = model.to(memory_format=torch.channels_last_3d)  # on a CPU nearly twice as fast
    return data, LitClassifier(model, labels=data.labels, lr=1e-3, loss=loss, schedule="one_cycle")


def add_up(model: LitClassifier, image: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Logits (B, L), maps of the two methods (B, L, *S'), and all sums (B, L)."""
    found = ct.account(model, image, LAYER)
    maps = {name: ct.explain(model, image, name, LAYER) for name in ("gradcam", "respondcam")}
    sums = {name: each.flatten(2).sum(2) for name, each in maps.items()}
    return found.logits, maps, sums | {"account": sums["respondcam"] + found.bias}


def weights(out: Path, job: _runs.Job) -> Path:
    """Where the trained weights of a job are."""
    return out / f"{job['data']}_{job['net']}_{job['seed']}.pt"


def figures(jobs: list[_runs.Job], out: Path) -> str:
    """Sums against scores of the nets of a seed, and the maps of three volumes; a table of what biases can disturb."""
    panels, spreads = {}, []
    for job in (job for job in jobs if weights(out, job).exists()):
        data, model = load(job)
        model.load_state_dict(torch.load(weights(out, job), weights_only=True))
        batch = next(iter(data.test_dataloader()[0]))
        logits, maps, sums = add_up(model, batch["image"])
        panels[f"{DATA[job['data']]}, {NETS[job['net']]}"] = {
            TITLES[m]: (logits.numpy(), sums[m].numpy()) for m in maps
        }
        # Order is lost where what a map leaves out differs between classes as much as the logits do.
        parts = (part.std(dim=1).mean() for part in (logits, logits - sums["respondcam"]))
        spreads.append([DATA[job["data"]], NETS[job["net"]], *(f"{float(part):.3f}" for part in parts)])
        if (job["data"], job["net"]) != ("clean", "cnn1"):
            continue
        rows = []
        for i in map(data.labels.index, SHOWN):  # classes take turns: case i is of class i
            where = batch["particle"][i, 0]
            said = ", ".join(f"sum of {TITLES[m]} {sums[m][i, i]:.2f}" for m in maps)
            rows.append(Row(batch["image"][i].numpy(), [m[i, i].numpy() for m in maps.values()], where.numpy(),
                            f"{data.labels[i]}: logit {logits[i, i]:.2f}, {said}",
                            point=where.nonzero().float().mean(dim=0).round().int().tolist()))  # fmt: skip
        sheet = side_by_side(rows, ["volume", *(TITLES[m] for m in maps)], width=720)
        Image.fromarray(sheet).save(out / "respond_cam.png", optimize=True)
    Image.fromarray(plot_sums(panels, size=(360, 300))).quantize(128).save(out / "respond_cam_sums.png", optimize=True)
    return _runs.markdown(["data", "net", "std of logits over classes", "std of logit - sum of Respond-CAM"], spreads)
