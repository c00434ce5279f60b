"""The arms of the shortcut study: what is added to a plain training, and one training with its scores.

Not a recipe.
"""

from __future__ import annotations

import tempfile
from functools import lru_cache
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from _runs import Diverged, Job
from _shortcut_data import StudyData
from _shortcut_nets import make_net
from torch import nn

import camtrain as ct
from camtrain.anatomy.donors import DonorPool
from camtrain.data import PhantomDataModule
from camtrain.evaluation.predicting import logits_of
from camtrain.evaluation.reliance import REPLACEMENTS, reliance_probabilities
from camtrain.metrics import LabelAUROC, PointingGame, shortcut_reliance
from camtrain.models import LitClassifier

LABELS = ["consolidation", "effusion", "cardiomegaly", "aneurysm"]
SPLITS = ["test", "shift_free", "shift_random", "shift_reversed"]
JUDGED = 60
"""Test cases on which reliance is measured."""


class Arm(NamedTuple):
    """What is added to a plain training."""

    mask_loss: dict[str, Any] | None = None
    swap: dict[str, Any] | None = None
    inputs: str = "image"
    shortcut: float | None = None


ARMS = {
    "plain": Arm(),
    "ceiling": Arm(shortcut=0.5),
    "softplus": Arm({"form": "softplus", "weight": 1 / 3}),
    "l2": Arm({"form": "l2", "weight": 0.1}),
    "l2_normalised": Arm({"form": "l2_normalised", "weight": 1.0}),
    "energy": Arm({"form": "energy", "weight": 1 / 3}),
    "gradcam loss": Arm({"method": "gradcam", "form": "softplus", "weight": 1 / 3}),
    "masked input": Arm(inputs="masked"),
    "masked pooling": Arm(inputs="with_organs"),
    "swap": Arm(swap={}),
    "swap + mask loss": Arm({"form": "softplus", "weight": 1 / 3}, {}),
}


@lru_cache(maxsize=1)
def phantom(place: str, shortcut: float, seed: int, cases: int, test_cases: int, size: tuple[int, int, int],
            cooccurrence: float, organs: str) -> PhantomDataModule:  # fmt: skip
    """One phantom; arms of one worker share its cases."""
    return PhantomDataModule(
        labels=LABELS, cases=cases, val_cases=test_cases // 2, test_cases=test_cases, size=size, batch_size=32,
        seed=seed, shortcut=shortcut, shortcut_at=place, cooccurrence=cooccurrence, organs=organs, test_splits=SPLITS,
    )  # fmt: skip


def train(job: Job) -> dict[str, Any]:
    """One training and its test scores: {split: {measure: {label or mean: value}}}, and reliance by replacement."""
    torch.set_num_threads(1)
    arm = ARMS[job["arm"]]
    cooccurring = job["place"] == "co-occurring"
    own = phantom(
        "skin" if cooccurring else job["place"], arm.shortcut or job["shortcut"], job["seed"], job["cases"],
        job["test_cases"], tuple(job["size"]), 0.6 if cooccurring else 0.0,
        "holes" if job["masks"] == "holes" else "exact",
    )  # fmt: skip
    data = StudyData(own, job["organs_share"], job["masks"], arm.inputs)
    pl.seed_everything(job["seed"], verbose=False)
    net, layer = make_net(job["net"], data, own.phantom.size, arm.inputs == "with_organs")
    net.to(memory_format=torch.channels_last_3d)  # up to twice as fast on a CPU, nothing else
    model = LitClassifier(net, labels=data.labels, lr=2e-3, weight_decay=1e-2, schedule="one_cycle")
    monitor = ct.AttentionMonitor(layer=layer, methods=["hirescam"], every_n_epochs=0)
    added: list[pl.Callback] = [ct.MaskLossCallback(layer=layer, **arm.mask_loss)] if arm.mask_loss else []
    added += [ct.OutsideSwap(**(arm.swap | job.get("swap", {})))] if arm.swap is not None else []
    trainer = pl.Trainer(
        max_epochs=job["epochs"], callbacks=[*added, monitor], logger=False, enable_checkpointing=False,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        precision=job.get("precision", "32-true"), check_val_every_n_epoch=job["epochs"],
        default_root_dir=tempfile.mkdtemp(prefix="camtrain-"),
    )  # fmt: skip
    trainer.fit(model, data)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise Diverged(f"weights are not finite after {job['epochs']} epochs")
    trainer.test(model, data, verbose=False)
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for split, rows in monitor.scores.items():
        for row in rows:
            scores.setdefault(split, {}).setdefault(row.measure, {})[row.label or "mean"] = row.value
    cases = list(data.test_dataloader()[0])
    judged = {kind: judge(model.eval(), cases, data.table, kind) for kind in REPLACEMENTS}
    return {
        "scores": scores,
        "reliance": {kind: each[0] for kind, each in judged.items()},
        "auroc_outside_replaced": {kind: each[1] for kind, each in judged.items()},
        "lesion_hits": lesion_hits(model, cases, layer),
    }


def judge(
    model: nn.Module, batches: list[dict[str, Any]], table: ct.OrganTable, kind: str
) -> tuple[list[float], list[float]]:
    """ShortcutReliance of each label on the first cases of the test, and AUROC once their outside is replaced."""
    donors, rows = DonorPool(count=12, search=24), []
    for batch in batches:
        donors.offer(batch["id"], batch["image"], batch["label"])
    for batch in batches[: -(-JUDGED // len(batches[0]["id"]))]:
        image, label = batch["image"], batch["label"]
        changed = reliance_probabilities(
            model, image, batch["organs"], table, label, kind,
            donors if kind == "case" else None, batch["id"], chunk=16,
        )  # fmt: skip
        rows.append((logits_of(model, image).sigmoid(), *changed, label))
    before, outside, inside, label = (torch.cat(parts) for parts in zip(*rows, strict=True))
    turned = LabelAUROC(num_labels=len(LABELS), average="none")
    turned.update(outside.nan_to_num(0), label.masked_fill(outside.isnan(), torch.nan))
    return shortcut_reliance(before, outside, inside, label).share.tolist(), turned.compute().tolist()


def lesion_hits(model: nn.Module, batches: list[dict[str, Any]], layer: str | None) -> float:
    """Share of present findings whose strongest cell holds voxels of the finding itself."""
    game = PointingGame(num_labels=len(LABELS), average="micro")
    for batch in batches:
        maps = ct.explain(model, batch["image"], layer=layer)
        game.update(maps, batch["lesions"], batch["label"])
    return float(game.compute())
