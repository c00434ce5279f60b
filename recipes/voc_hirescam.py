"""Faithful or expanded? HiResCAM and Grad-CAM on PASCAL VOC, or on drawn pictures in its format.

    python recipes/voc_hirescam.py --workers 2                            # draws its pictures
    python recipes/voc_hirescam.py --root VOCdevkit/VOC2012 --size 224    # the real ones; use a GPU

Nets with a flattened last layer learn what is in the picture; one with a global average pool is the control, where the
two maps are one. Each map is compared with what the net does (how far does the logit fall without the activations of
one cell?) and with where the object is (class masks).
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from _runs import Diverged, Job, Run, finish, hardware, markdown, spread
from _start import count, drawn_tree, out_folder, start, voc_tree
from monai.networks.nets import ResNet
from PIL import Image
from torch import Tensor, nn

import camtrain as ct
from camtrain.data import PascalVOCDataModule
from camtrain.evaluation import cell_effects
from camtrain.metrics import energy_inside, label_auroc, mask_iou, wrong_place
from camtrain.models import FlattenNet, LitClassifier
from camtrain.reporting import Row, side_by_side


def resnet(labels: int, size: tuple[int, int], flatten: bool = True) -> nn.Module:
    """MONAI's ResNet-10 with a quarter of its channels, cells of 16 pixels; its pool taken out for `flatten`."""
    shape = {"layers": [1, 1, 1, 1], "block_inplanes": [16, 32, 64, 128], "conv1_t_stride": 2, "no_max_pool": True}
    net = ResNet(block="basic", spatial_dims=2, n_input_channels=3, num_classes=labels, **shape)
    if flatten:
        net.avgpool, net.fc = nn.Identity(), nn.Linear(128 * math.prod(math.ceil(n / 16) for n in size), labels)
    return net


CELLS_OF_8 = partial(FlattenNet, channels=3, widths=(16, 32, 32, 32), pool=4)
NETS: dict[str, tuple[str, Any, Any]] = {  # tapped layer, net, from its output to the logits
    "flatten": ("relu", CELLS_OF_8, lambda net, a: net.head(a.flatten(1))),
    "resnet": ("layer4", resnet, lambda net, a: net.fc(a.flatten(1))),
    "pool": ("layer4", partial(resnet, flatten=False), lambda net, a: net.fc(net.avgpool(a).flatten(1))),
}
TITLES = {"flatten": "FlattenNet", "resnet": "ResNet-10 / 4, flattened", "pool": "ResNet-10 / 4, pool (control)"}
METHODS = {"gradcam": "Grad-CAM", "hirescam": "HiResCAM"}


def train(job: Job, out: Path) -> dict[str, Any]:
    """Plain training, and the scores of both maps on the validation pictures; nothing is chosen on them."""
    layer, make, head = NETS[job["net"]]
    data = PascalVOCDataModule(job["root"], size=job["size"], seed=job["seed"])
    pl.seed_everything(job["seed"], verbose=False)
    net = make(len(data.labels), data.size)
    model = LitClassifier(net, labels=data.labels, lr=2e-3, weight_decay=1e-2, schedule="one_cycle")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "limit_val_batches": 0}
    pl.Trainer(max_epochs=job["epochs"], devices=1, enable_progress_bar=False, **quiet).fit(model, data)
    model.eval().cpu()
    logits, labels, found, rows, kept = [], [], [], [], {}
    net.get_submodule(layer).register_forward_hook(lambda *seen: kept.update(output=seen[2].detach()))
    for batch in data.val_dataloader():
        with torch.no_grad():
            logits.append(model(batch["image"]))
        labels.append(batch["label"])
        effect = cell_effects(partial(head, net), kept["output"])
        rise = logits[-1] - head(net, torch.zeros_like(kept["output"])).detach()
        maps = {m: ct.explain(model, batch["image"], m, layer) for m in METHODS}
        allowed, whole = (data.table.allowed(batch["organs"], size) for size in (effect.shape[2:], None))
        pairs = ((batch["label"] == 1) & allowed.flatten(2).any(dim=2)).nonzero(as_tuple=True)
        found.append({m: scores(maps[m][pairs], effect[pairs], allowed[pairs], rise[pairs]) for m in METHODS})
        for at in zip(*pairs, strict=True):
            image, both = batch["image"][at[0]].numpy(), [maps[m][at].numpy() for m in METHODS]
            rows.append(Row(image, both, whole[at].numpy(), data.labels[at[1]]))
    if not torch.cat(logits).isfinite().all():
        raise Diverged("logits are not finite")
    if job["seed"] == 0:
        shown = rows[:: max(1, len(rows) // 4)][:4]  # evenly spaced, not chosen by hand
        drawn = side_by_side(shown, ["", *METHODS.values()], width=620, caption=TITLES[job["net"]], region="object")
        Image.fromarray(drawn).quantize(256, dither=Image.Dither.NONE).save(out / f"{job['net']}.png", optimize=True)
    tables = {m: {s: torch.cat([part[m][s] for part in found]) for s in found[0][m]} for m in METHODS}
    ratio = (tables["gradcam"]["area / object"] / tables["hirescam"]["area / object"]).log().nanmean().exp().item()
    means = {m: {s: values.nanmean().item() for s, values in table.items()} for m, table in tables.items()}
    auroc = label_auroc(torch.cat(logits), torch.cat(labels)).nanmean().item()
    return {"scores": means, "ratio": ratio, "auroc": auroc}


def scores(maps: Tensor, effect: Tensor, allowed: Tensor, rise: Tensor) -> dict[str, Tensor]:
    """Scores (P,) of maps (P, *S') of pairs; `rise` (P,) is the logit without what an empty layer gives."""
    one = torch.ones(len(maps), 1)
    shown, truth, inside = (t.flatten(1)[:, None] for t in (maps, effect, allowed))
    top = shown.amax(dim=2).clamp(min=0)
    half = (shown > 0.5 * top[..., None]).sum(dim=2)
    steps = torch.stack([maps.diff(dim=axis).abs().flatten(1).sum(dim=1) for axis in range(1, maps.ndim)]).sum(dim=0)
    one_way, other = (t[:, 0] - t.mean(dim=2) for t in (shown, truth))
    return {
        "correlation with effect": (one_way * other).sum(dim=1) / (one_way.norm(dim=1) * other.norm(dim=1)),
        "gap of the sum": (maps.flatten(1).sum(dim=1) - rise).abs(),
        "wrong place": wrong_place(shown, truth, one)[:, 0],
        "energy inside": energy_inside(shown, inside, one)[:, 0],
        "chance": inside[:, 0].float().mean(dim=1),
        "IoU": mask_iou(shown, inside, one)[:, 0],
        "area / object": (half / inside.sum(dim=2)).masked_fill(top == 0, torch.nan)[:, 0],
        "roughness": steps / maps.flatten(1).abs().sum(dim=1),
        "empty": (top[:, 0] == 0).float(),
    }


def report(runs: list[Run]) -> str:
    """A line per net and map."""
    shown = next((list(run["result"]["scores"]["gradcam"]) for run in runs if "result" in run), [])
    rows = []
    for net in dict.fromkeys(run["job"]["net"] for run in runs):
        own = [run for run in runs if run["job"]["net"] == net]
        good = [run["result"] for run in own if "result" in run]
        for method, title in METHODS.items():
            cells = [spread(r["scores"][method][key] for r in good) for key in shown]
            ratio = spread((r["ratio"] for r in good), 2) if method == "gradcam" else "1"
            rows.append([TITLES[net], title, *cells, ratio, spread(r["auroc"] for r in good), len(own) - len(good)])
    return f"{markdown(['net', 'map', *shown, 'area / HiResCAM', 'AUROC', 'diverged'], rows)}\n\n{hardware()}"


def main() -> None:
    """Train the nets of all seeds, score, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=voc_tree, help="a VOC tree; default: pictures are drawn into OUT/tree")
    parser.add_argument("--cases", type=count, default=900, help="training pictures to draw")
    parser.add_argument("--epochs", type=count, default=8)
    parser.add_argument("--seeds", type=count, default=3, help="how many, counted from 0")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--workers", type=count, default=1)
    parser.add_argument("--out", type=out_folder, default="runs/voc_hirescam")
    args = parser.parse_args()
    drawn = {"train": args.cases, "val": max(8, args.cases // 4), "test": 0, "size": args.size}
    root = args.root or drawn_tree(args.out / f"tree_{args.cases}_{args.size}", **drawn)
    shared = {"root": str(root), "size": args.size, "epochs": args.epochs}
    jobs = [{"net": net, "seed": seed, **shared} for net in args.nets for seed in range(args.seeds)]
    text = report(finish(jobs, partial(train, out=args.out), args.out, args.workers))
    print(text)
    (args.out / "voc_hirescam.md").write_text(text + "\n")


if __name__ == "__main__":
    start(main)
