"""A stand-in for ImageNet weights: a slice trunk that has seen other patients and never heard of a finding.

    python recipes/pretrain_slices.py --size 32 24 24 --out runs/hirescam_paper      # writes trunk.pt; under a minute

Phantoms of another population are cut into pictures of three slices. The trunk of AxialNet, with one fully connected
layer, learns which organs are in a picture and which of them fill more of it than is usual. `hirescam_paper.py` starts
its nets from that trunk, as the paper starts from ImageNet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from _start import count, keep, out_folder, start
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from camtrain import InputError
from camtrain.data import PhantomDataModule
from camtrain.metrics import LabelAUROC
from camtrain.models import AxialNet, LitClassifier

GROUP = 3
POPULATION = 90_000
"""Seed of the phantoms of this file: no study uses it."""


class OrganPictures(Dataset[dict[str, Tensor]]):
    """Pictures (1, h, w, 3) of the cases of a loader, with two labels per organ: there, and larger than usual."""

    def __init__(self, cases: Dataset[dict[str, Tensor]], organs: int, usual: Tensor | None = None) -> None:
        read = [cases[i] for i in range(len(cases))]  # type: ignore[arg-type]
        self.images = torch.cat([torch.stack(case["image"].split(GROUP, dim=3)) for case in read])
        ids = torch.cat([torch.stack(case["organs"].split(GROUP, dim=3)) for case in read]).flatten(1)
        share = torch.stack([(ids == organ).float().mean(dim=1) for organ in range(1, organs + 1)], dim=1)
        if usual is None:
            usual = share.where(share > 0, torch.nan).nanmedian(dim=0).values
        self.usual = usual
        self.labels = torch.cat([share > 0, share > usual], dim=1).float()

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One picture as a volume of three slices."""
        return {"image": self.images[index], "label": self.labels[index]}


def pretrain(size: Sequence[int], cases: int, epochs: int, path: Path) -> float:
    """Train the trunk and keep its weights in `path`; returns the mean AUROC on pictures of other cases."""
    size = tuple(size)
    pl.seed_everything(POPULATION, verbose=False)
    data = PhantomDataModule(cases=cases, val_cases=max(2, cases // 4), size=size, shortcut=None, seed=POPULATION)
    organs = len(data.table.organs)
    train = OrganPictures(data.train_dataloader().dataset, organs)
    val = OrganPictures(data.val_dataloader().dataset, organs, train.usual)
    net = AxialNet(2 * organs, "small", size[:2], slice_axis=2, custom_convs=False)
    model = LitClassifier(net, lr=5e-3, weight_decay=1e-2, schedule="one_cycle")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "limit_val_batches": 0,
             "enable_progress_bar": False}  # fmt: skip
    pl.Trainer(max_epochs=epochs, accelerator="cpu", **quiet).fit(model, DataLoader(train, 64, shuffle=True))
    metric = LabelAUROC(2 * organs)
    with torch.no_grad():
        metric.update(model.eval()(val.images), val.labels)
    keep(net.trunk.state_dict(), path)
    auroc = float(metric.compute())
    told = {"size": list(size), "cases": cases, "epochs": epochs, "pictures": len(train), "auroc": auroc}
    path.with_suffix(".json").write_text(json.dumps(told))
    return auroc


def same_trunk(path: Path, wanted: dict[str, Any]) -> bool:
    """Is there a trunk of these settings? False where there is none.

    Raises:
        InputError: There is another one. Nets of one study start from one trunk, so it is not made anew.
    """
    if not path.exists():
        return False
    about = path.with_suffix(".json")
    told = json.loads(about.read_text()) if about.exists() else {}
    if any(told.get(key, value) != value for key, value in wanted.items()):
        raise InputError(
            f"{path} was pretrained with {told}, but this study asks for {wanted}: name another --out, or delete {path}"
        )
    return True


def load_trunk(net: torch.nn.Module, path: Path) -> None:
    """Give a net's trunk the weights of `pretrain`; its own convolutions behind the ResNet stay as they were."""
    state = torch.load(path, weights_only=True)
    missing = net.trunk.load_state_dict(state, strict=False)
    if missing.unexpected_keys or any(not key.startswith("convs.") for key in missing.missing_keys):
        raise InputError(f"{path} does not fit the net ({missing}): delete it, and it is trained again")


def main() -> None:
    """Pretrain and say how well it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=count, default=160)
    parser.add_argument("--epochs", type=count, default=2)
    parser.add_argument("--size", type=int, nargs=3, default=(32, 24, 24))
    parser.add_argument("--out", type=out_folder, default="runs/hirescam_paper")
    args = parser.parse_args()
    path = args.out / "trunk.pt"
    auroc = pretrain(args.size, args.cases, args.epochs, path)
    print(f"{path}: mean AUROC over organ labels {auroc:.3f} on pictures of other cases")


if __name__ == "__main__":
    start(main)
