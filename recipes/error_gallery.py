"""Where did the network look when it was wrong? Missed findings and false alarms with their counterfactual maps.

    python recipes/error_gallery.py --out runs/error_gallery        # about two minutes on one core

A network learns the phantom with a marker on the skin that agrees with each label in 95 % of the cases, and is shown
cases in which markers mean nothing. Its errors go to one HTML page and one picture: Grad-CAM and HiResCAM of the label,
and the counterfactual map (Selvaraju et al.): what, taken away, would raise the label's logit. Beside each the mass by
organ, which for a missed finding says what argued against it.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from _runs import finite, hardware, markdown
from _start import count, out_folder, start
from PIL import Image

import camtrain as ct
from camtrain.data import PhantomDataModule
from camtrain.evaluation import organ_mass
from camtrain.evaluation.case_filter import chosen_pairs
from camtrain.models import FlattenNet, LitClassifier, PoolNet
from camtrain.reporting import ErrorCard, Row, geometry, side_by_side, write_error_gallery

NETS = {"flatten": FlattenNet, "pool": PoolNet}
LABELS = ["consolidation", "effusion", "cardiomegaly", "aneurysm"]
METHODS = ["gradcam", "hirescam", "counterfactual"]
TITLES = ("CT, allowed organ", "Grad-CAM, clipped at 0", "HiResCAM, signed", "counterfactual (warm: against)")
COLUMNS = ("logit by HiResCAM", "Grad-CAM's mass", "counterfactual mass", "share of the volume")
SPLITS = ["test", "shift_free", "shift_random", "shift_reversed"]
NAN = float("nan")


def train(data: PhantomDataModule, net: str, epochs: int, seed: int) -> LitClassifier:
    """A few epochs, no mask loss."""
    pl.seed_everything(seed, verbose=False)
    model = LitClassifier(NETS[net](len(LABELS), size=data.phantom.size), labels=LABELS, lr=2e-3, weight_decay=1e-2,
                          schedule="one_cycle")  # fmt: skip
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "limit_val_batches": 0}
    pl.Trainer(max_epochs=epochs, accelerator="cpu", **quiet).fit(model, data)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise ct.InputError(f"expected finite weights, but the training of --seed {seed} diverged: take another seed")
    return model.eval()


def card(model: LitClassifier, data: PhantomDataModule, case: Any, kind: str, column: int) -> tuple[ErrorCard, Row]:
    """One error: maps, picture, and mass by organ."""
    image, organs, label = case["image"][None], case["organs"][None], LABELS[column]
    maps = {method: ct.explain(model, image, method, labels=[column]) for method in METHODS}
    shown = [maps[m] if m == "hirescam" else maps[m].relu() for m in METHODS]
    with torch.no_grad():
        probability = float(model(image).sigmoid()[0, column])
    axes, spacing = geometry(np.asarray(case["affine"]))
    (signed,) = ct.describe(model, {"image": image, "organs": organs}, data.table, labels=[column])
    grad, counter = (organ_mass(maps[m], organs, data.table) for m in ("gradcam", "counterfactual"))
    parts = {"bias": (signed.bias, NAN, NAN, NAN)}
    for i, part in enumerate(grad.names):
        masses = (float(value) for value in (grad.shares[0, 0, i], counter.shares[0, 0, i], grad.volume[0, i]))
        parts[part] = (signed.by_organ[part], *masses)
    number = int(case["id"].rsplit("-", 1)[1])
    marker = f"its marker is {'' if data.phantom.case(data.test_splits[0], number).marker[column] else 'not '}there"
    caption = f"{label}, {case['id']}: {'missed' if kind == 'fn' else 'false alarm'}, p = {probability:.2f}; {marker}"
    row = Row(image[0].numpy(), [m[0, 0].numpy() for m in shown], plane="coronal", spacing=spacing, axes=axes,
              allowed=data.table.select([label]).allowed(organs)[0, 0].numpy(), caption=caption)  # fmt: skip
    picture = side_by_side([row], TITLES, width=1100)
    alt = f"Coronal slice with the organ of {label} outlined, and three attention maps on it"
    note = f"Truth: {'present' if kind == 'fn' else 'absent'}; {marker}."
    return ErrorCard(kind, case["id"], label, probability, picture, alt, COLUMNS, parts, note), row


def against(cards: list[ErrorCard]) -> str:
    """Mean over the missed findings of a label: what argued against it, by organ."""
    lines = []
    for label in LABELS:
        of = [c for c in cards if (c.kind, c.label) == ("fn", label)]
        for part in of[0].rows if of else ():
            known = [finite(c.rows[part][i] for c in of) for i in range(len(COLUMNS))]
            lines.append([label, len(of), part, *(f"{np.mean(v):.2f}" if v else "-" for v in known)])
    return markdown(["label", "missed", "part", *COLUMNS], lines)


def main() -> None:
    """Train, find the errors, draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=count, default=500)
    parser.add_argument("--epochs", type=count, default=8)
    parser.add_argument("--test-cases", type=count, default=100)
    parser.add_argument("--net", choices=NETS, default="flatten")
    parser.add_argument("--split", choices=SPLITS, default="shift_random")
    parser.add_argument("--shortcut", type=float, default=0.95)
    parser.add_argument("--shown", type=count, default=6, help="errors of a kind and label, the surest first")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=out_folder, default="runs/error_gallery")
    args = parser.parse_args()
    data = PhantomDataModule(LABELS, args.cases, (32, 24, 32), args.shortcut, seed=args.seed,
                             test_cases=args.test_cases, test_splits=[args.split])  # fmt: skip
    model = train(data, args.net, args.epochs, args.seed)
    cases = list(data.test_dataloader()[0].dataset)
    image, truth = (torch.stack([case[key] for case in cases]) for key in ("image", "label"))
    with torch.no_grad():
        probability = model(image).sigmoid()
    cards, rows, counts = [], [], {}
    for kind in ("fn", "fp"):
        wrong = chosen_pairs(truth, probability, kind)
        for column, label in enumerate(LABELS):
            found = wrong[:, column].nonzero()[:, 0].tolist()
            counts[label, kind] = len(found)
            found.sort(key=lambda i, c=column, k=kind: float(probability[i, c]) * (1 if k == "fn" else -1))
            made = [card(model, data, cases[i], kind, column) for i in found[: args.shown]]
            cards += [c for c, _ in made]
            rows += [row for _, row in made[:1]]
    lead = (
        f"{args.net} net, trained with markers that agree with the label in {args.shortcut:.0%} of the cases, seed "
        f"{args.seed}; split {args.split}, {len(cases)} cases; up to {args.shown} errors of each label and kind."
    )
    write_error_gallery(args.out / "errors.html", cards, "Where the network looked when it was wrong", lead)
    if rows:
        sheet = side_by_side(rows[:4], TITLES, width=1000, caption="The network's surest error of each label.")
        Image.fromarray(sheet).quantize(200, dither=Image.Dither.NONE).save(args.out / "errors.png", optimize=True)
    table = markdown(["label", "missed", "false alarms"], [[n, counts[n, "fn"], counts[n, "fp"]] for n in LABELS])
    text = f"{lead}\n\n{table}\n\n{against(cards)}\n\n{hardware()}\n"
    (args.out / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    start(main)
