"""Do attention maps depend on what the network learnt? Cascading randomisation, and a twin trained on shuffled labels.

    python recipes/sanity_checks.py            # under five minutes on two cores
    python recipes/sanity_checks.py --quick    # seconds, and numbers that mean nothing

Two small networks (a flatten head, and a global average pool) learn the phantom: twice with its labels, and once with
the labels of other cases. Then their weights are randomised from the head on (Adebayo et al. 2018).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from monai.networks.nets import ResNet
from PIL import Image
from rich.console import Console

import camtrain as ct
from camtrain.data import PhantomDataModule
from camtrain.data.phantom import LABELS
from camtrain.evaluation.randomising import Cascade
from camtrain.evaluation.sanity import sanity_check, spread_stages
from camtrain.evaluation.sanity_table import ALL_LIMIT, HEAD_LIMIT, SanityTable
from camtrain.evaluation.shuffled import compare_models, shuffle_labels
from camtrain.metrics import LabelAUROC
from camtrain.models import FlattenNet, LitClassifier, PoolNet
from camtrain.reporting import Row, geometry, side_by_side
from camtrain.reporting.sanity_plot import plot_cascade

METHODS = ["hirescam", "gradcam", "respondcam", "relevancecam", "layercam"]
# Known to fail: they show the image, or the same for every label.
CONTROLS = ["guided_backprop", {"name": "relevancecam", "contrast": "none"}]
LAYERS = {"resnet": "layer3"}  # its last map has 3 x 3 x 3 cells here: too few to compare
console = Console()


def resnet(labels: int, size: tuple[int, ...]) -> torch.nn.Module:
    """MONAI's ResNet18 with a quarter of its channels; several times as slow as the others."""
    shape = {"layers": [2, 2, 2, 2], "block_inplanes": [16, 32, 64, 128], "spatial_dims": len(size)}
    return ResNet(block="basic", n_input_channels=1, num_classes=labels, **shape)


NETS = {"flatten": FlattenNet, "pool": PoolNet, "resnet": resnet}


def train(make: Callable[..., torch.nn.Module], data: PhantomDataModule, epochs: int, seed: int) -> LitClassifier:
    """A few epochs without any mask loss."""
    pl.seed_everything(seed, verbose=False)
    net = make(len(data.labels), size=data.phantom.size)
    model = LitClassifier(net, labels=data.labels, lr=2e-3, weight_decay=1e-2, schedule="one_cycle")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "limit_val_batches": 0}
    pl.Trainer(max_epochs=epochs, accelerator="cpu", **quiet).fit(model, data)
    return model.eval()


def auroc(model: LitClassifier, image: torch.Tensor, label: torch.Tensor) -> float:
    """Mean over labels."""
    metric = LabelAUROC(num_labels=label.shape[1])
    with torch.no_grad():
        metric.update(model(image), label)
    return float(metric.averaged("macro"))


def figure(table: SanityTable, title: str, path: Path) -> None:
    """Strength and SSIM by stage, a line per method."""
    means = table.means()
    titles = list(dict.fromkeys(row.method for row in means))
    stages = list(dict.fromkeys(f"{row.stage} {row.module}" for row in means))
    curves = {
        shown: {t: [getattr(row, name) for row in means if row.method == t] for t in titles}
        for shown, name in {"mean |Spearman|": "strength", "SSIM of |map|": "ssim"}.items()
    }
    limits = {"mean |Spearman|": [(1, HEAD_LIMIT), (len(stages), ALL_LIMIT)]}
    controls = {row.method for row in means if row.control}
    drawn = Image.fromarray(plot_cascade(curves, stages, controls, title=title, limits=limits))
    drawn.quantize(256, kmeans=4, dither=Image.Dither.NONE).save(path, optimize=True)


def strip(model: LitClassifier, case: dict[str, Any], layer: str | None, label: str, seed: int, path: Path) -> None:
    """One slice of one case: a line per method, a column per stage."""
    image, column = case["image"][None], model.labels.index(label)
    cascade = Cascade(model, image, seed=seed)
    stages = [cascade.stage(n) for n in (0, *spread_stages(len(cascade), 4))]
    axes, spacing = geometry(np.asarray(case["affine"]))
    where = case["lesions"][column].nonzero().float().mean(dim=0).round().int().tolist()
    rows = []
    for given in (*METHODS, *CONTROLS):
        options = dict(given) if isinstance(given, dict) else {"name": given}
        name = options.pop("name")
        maps = [ct.explain(s.model, image, name, layer, labels=[column], **options)[0, 0].numpy() for s in stages]
        text = f"{name} {' '.join(options.values())}" + (" (control)" if given in CONTROLS else "")
        rows.append(Row(case["image"].numpy(), maps, None, text, "coronal", spacing, axes, where))
    titles = ["CT", *(f"{s.number} {s.module}" if s.number else "trained" for s in stages)]
    Image.fromarray(side_by_side(rows, titles, width=800, caption=f"{case['id']}: {label}")).save(path, quality=78)


def main() -> None:
    """Train, randomise, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--test-cases", type=int, default=12, help="cases to explain")
    parser.add_argument("--stages", type=int, default=5)
    parser.add_argument("--draws", type=int, default=2, help="cascades to average over")
    parser.add_argument("--size", type=int, nargs=3, default=(48, 36, 48))
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["flatten", "pool"])
    parser.add_argument("--label", choices=LABELS, default="effusion", help="label of the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/sanity_checks"))
    args = parser.parse_args()
    if args.quick:
        args.cases, args.epochs, args.test_cases, args.stages, args.draws, args.size = 12, 1, 4, 2, 1, (24, 24, 24)
    args.out.mkdir(parents=True, exist_ok=True)
    data = PhantomDataModule(cases=args.cases, test_cases=args.test_cases, size=tuple(args.size), shortcut=None,
                             seed=args.seed, test_splits=["test"])  # fmt: skip
    cases = [case for loader in data.test_dataloader() for case in loader.dataset]
    image, label = (torch.stack([case[key] for case in cases]) for key in ("image", "label"))
    shown = next((case for case in cases if case["label"][data.labels.index(args.label)]), None)
    for name in args.nets:
        model = train(NETS[name], data, args.epochs, args.seed)
        others = {"again": train(NETS[name], data, args.epochs, args.seed + 1)}
        with shuffle_labels(data, args.seed):
            others["shuffled"] = train(NETS[name], data, args.epochs, args.seed + 1)
        said = [f"{title} {auroc(m, image, label):.2f}" for title, m in {"true labels": model, **others}.items()]
        console.rule(f"{name}: test AUROC {', '.join(said)}")
        table = sanity_check(model, image, METHODS, LAYERS.get(name), label=label, stages=args.stages, seed=args.seed,
                             controls=CONTROLS, draws=args.draws)  # fmt: skip
        console.print(table)
        for title, other in others.items():
            found = compare_models(model, other, image, METHODS, LAYERS.get(name), label=label, controls=CONTROLS)
            console.print(f"Against a network of another seed, {title}:", found)
            (args.out / f"{name}_{title}.csv").write_text(found.as_csv())
        (args.out / f"{name}.csv").write_text(table.as_csv())
        figure(table, f"{name} head: what is left of the maps as weights are randomised", args.out / f"{name}.png")
        if shown is not None:
            strip(model, shown, LAYERS.get(name), args.label, args.seed, args.out / f"{name}_strip.jpg")
    console.print(f"Tables and pictures: {args.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
