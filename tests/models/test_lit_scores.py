"""LitClassifier's scores and class weights: against sums by hand, per patient, under a Trainer."""

from __future__ import annotations

import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from camtrain._errors import InputError
from camtrain.losses import AsymmetricLoss
from camtrain.models import FlattenNet, LitClassifier
from camtrain.models._label_scores import LabelScores, of_patients
from camtrain.models.lit_classifier import masked_bce

NAN = float("nan")
NAMES = ["nodule", "effusion", "stent"]


def data(cases=40, labels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(cases, labels, generator=generator) * 3
    label = (torch.rand(cases, labels, generator=generator) < (logits / 3).sigmoid()).float()
    label[torch.rand(cases, labels, generator=generator) < 0.2] = NAN
    return logits, label


def by_hand(logits, label):
    """AUROC by pairs, average precision by ranks, calibration error by bins: loops only, of one label."""
    rows = [(1 / (1 + math.exp(-z)), y) for z, y in zip(logits.tolist(), label.tolist(), strict=True) if y == y]
    positives, negatives = ([p for p, y in rows if y == truth] for truth in (1, 0))
    wins = sum((p > n) + (p == n) / 2 for p in positives for n in negatives)
    precision = 0.0
    for cut in sorted({p for p, _ in rows}, reverse=True):
        above = [y for p, y in rows if p >= cut]
        new = sum(y for p, y in rows if p == cut)
        precision += new / len(positives) * sum(above) / len(above)
    error = 0.0
    for b in range(15):
        inside = [(p, y) for p, y in rows if b / 15 < p <= (b + 1) / 15]
        if inside:
            error += abs(sum(p for p, _ in inside) - sum(y for _, y in inside)) / len(rows)
    return {"auroc": wins / len(positives) / len(negatives), "auprc": precision, "calibration_error": error}


def test_scores_by_hand():
    logits, label = data()
    metric = LabelScores(3, ["auroc", "auprc", "calibration_error"])
    for part in range(0, 40, 7):
        metric.update(logits[part : part + 7], label[part : part + 7])
    found = metric.compute()
    for column in range(3):
        for name, value in by_hand(logits[:, column], label[:, column]).items():
            assert found[name][column].item() == pytest.approx(value, abs=1e-5), name


def test_many_batches_leave_few_tensors_and_the_same_scores():
    (logits, label), scores = data(), ["auroc", "auprc", "calibration_error"]
    whole, parts = (LabelScores(3, scores, per_patient=True) for _ in range(2))
    ids, patients = [f"c{i % 37}" for i in range(40)], [f"p{i % 9}" for i in range(40)]
    whole.update(logits, label, ids, patients)
    for row in range(40):
        parts.update(logits[row : row + 1], label[row : row + 1], ids[row : row + 1], patients[row : row + 1])
    assert max(len(getattr(parts, name)) for name in ("probabilities", "labels", "ids", "patients")) <= 6
    for name, values in whole.compute().items():
        torch.testing.assert_close(parts.compute()[name], values, equal_nan=True)


def test_patients_count_once():
    logits, label = data()
    patients = [f"p{i // 3}" if i < 30 else "" for i in range(40)]
    metric = LabelScores(3, ["auroc", "auprc"], per_patient=True)
    metric.update(logits, label, [str(i) for i in range(40)], patients)
    groups: dict[str, list[int]] = {}
    for i, patient in enumerate(patients):
        groups.setdefault(patient or f"alone {i}", []).append(i)
    for column in range(3):
        rows = []
        for scans in groups.values():
            known = [i for i in scans if label[i, column] == label[i, column]]
            if known:
                mean = sum(logits[i, column].double().sigmoid().item() for i in known) / len(known)
                rows.append((math.log(mean / (1 - mean)), max(label[i, column].item() for i in known)))
        expected = by_hand(*(torch.tensor(c, dtype=torch.float64) for c in zip(*rows, strict=True)))
        for name in ("auroc", "auprc"):
            assert metric.compute()[name][column].item() == pytest.approx(expected[name], abs=1e-6)


def test_repeated_cases_count_once():
    logits, label = data(10)
    one, twice = (LabelScores(3, ["auprc"]) for _ in range(2))
    names = [str(i) for i in range(10)]
    one.update(logits, label, names)
    twice.update(torch.cat([logits, logits[:4]]), torch.cat([label, label[:4]]), names + names[:4])
    torch.testing.assert_close(one.compute()["auprc"], twice.compute()["auprc"], equal_nan=True)


def test_large_logits_are_told_apart_and_one_class_is_undefined():
    metric = LabelScores(2, ["auroc", "auprc", "calibration_error"])
    metric.update(torch.tensor([[20.0, 1], [21.0, 2], [19.0, 3]]), torch.tensor([[1.0, 1], [1, 1], [0, 1]]))
    found = metric.compute()
    assert found["auroc"][0] == 1
    assert found["auprc"][0] == 1
    assert found["auroc"][1].isnan()
    assert not found["calibration_error"][1].isnan()
    assert LabelScores(2, ["auroc"]).compute()["auroc"].isnan().all()


def test_patients_whose_labels_are_unknown():
    probability, label = of_patients(torch.tensor([[0.5], [0.7]]), torch.tensor([[NAN], [NAN]]), torch.tensor([1, 1]))
    assert probability.isnan().all()
    assert label.isnan().all()


class Cases(pl.LightningDataModule):
    class_weights = (2.0, 0.5, 4.0)

    def __init__(self, loaders=1):
        super().__init__()
        self.loaders = loaders
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(12, 1, 12, 12, 12, generator=generator)
        label = torch.randint(0, 2, (12, 3), generator=generator).float()
        label[0, 0] = label[3, 1] = NAN
        self.rows = [
            {"image": i, "label": y, "id": f"c{n}", "patient": f"p{n // 2}"}
            for n, (i, y) in enumerate(zip(image, label, strict=True))
        ]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.rows, batch_size=5)

    def val_dataloader(self):
        return self.train_dataloader()

    def test_dataloader(self):
        return [self.train_dataloader() for _ in range(self.loaders)]


def net():
    torch.manual_seed(0)
    return FlattenNet(size=12, widths=(2, 2, 2, 2))


def run(tmp_path, **changes):
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    more = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    return pl.Trainer(**options, **more, **changes)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("per_patient", [False, True])
def test_logged_scores_are_those_of_the_logits(tmp_path, per_patient):
    model = LitClassifier(net(), NAMES, scores=["auprc", "calibration_error"], per_patient=per_patient)
    trainer = run(tmp_path)
    (logged,) = trainer.validate(model, Cases(), verbose=False)
    rows = Cases().rows
    metric = LabelScores(3, ["auprc", "calibration_error"], per_patient)
    logits = model.eval()(torch.stack([row["image"] for row in rows])).detach()
    metric.update(
        logits, torch.stack([r["label"] for r in rows]), [r["id"] for r in rows], [r["patient"] for r in rows]
    )
    for name, values in metric.compute().items():
        assert logged[f"val/{name}"] == pytest.approx(values.nanmean().item(), abs=1e-5)
        for label, value in zip(NAMES, values.tolist(), strict=True):
            if math.isnan(value):
                assert f"val/{name}/{label}" not in logged
            else:
                assert logged[f"val/{name}/{label}"] == pytest.approx(value, abs=1e-5)
    assert any(f"val/auprc/{label}" in logged for label in NAMES)
    trainer.fit(model, Cases())
    assert "val/auprc" in trainer.callback_metrics
    assert not [key for key in model.state_dict() if "score" in key]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_several_test_loaders_and_many_labels(tmp_path, monkeypatch):
    model = LitClassifier(net(), NAMES, scores=["auroc"])
    logged = run(tmp_path).test(model, Cases(loaders=2), verbose=False)
    keys = {key for each in logged for key in each}
    assert {"test/auroc/dataloader_idx_0", "test/auroc/dataloader_idx_1", "test/auroc/stent/dataloader_idx_1"} <= keys
    monkeypatch.setattr("camtrain.models.lit_classifier.MOST_SCALARS", 2)
    keys = run(tmp_path).validate(model, Cases(), verbose=False)[0]
    assert set(keys) == {"val/loss", "val/auroc"}


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("loss", [None, "asymmetric"])
def test_balanced_weights_come_from_the_data(tmp_path, loss):
    own = AsymmetricLoss() if loss else None
    model = LitClassifier(net(), NAMES, class_weights="balanced", loss=own)
    (logged,) = run(tmp_path).validate(model, Cases(), verbose=False)
    rows = Cases().rows
    logits, label = model.eval()(torch.stack([r["image"] for r in rows])), torch.stack([r["label"] for r in rows])
    weights = list(Cases.class_weights)
    expected = (
        AsymmetricLoss(class_weights=weights)(logits, label)
        if loss
        else masked_bce(logits, label, torch.tensor(weights))
    )
    assert logged["val/loss"] == pytest.approx(expected.item(), rel=0.1)  # a mean over batches of unlike known pairs
    plain = (AsymmetricLoss() if loss else masked_bce)(logits, label)
    assert logged["val/loss"] != pytest.approx(plain.item(), rel=0.1)
    trainer = run(tmp_path)
    trainer.fit(model, Cases())
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    again = LitClassifier.load_from_checkpoint(
        tmp_path / "m.ckpt", **({"net": net(), "loss": AsymmetricLoss()} if loss else {})
    )
    assert again.class_weights == "balanced"
    assert again.hparams["scores"] is None


def test_weighted_bce_by_hand():
    logits, label = data(6)
    weights = [2.0, 0.5, 4.0]
    total, known = 0.0, 0
    for z, y in zip(logits.double().tolist(), label.tolist(), strict=True):
        for w, value, truth in zip(weights, z, y, strict=True):
            if truth == truth:
                p = 1 / (1 + math.exp(-value))
                total -= w * math.log(p) if truth else math.log(1 - p)
                known += 1
    assert masked_bce(logits.double(), label, torch.tensor(weights)).item() == pytest.approx(total / known)


def test_wrong_arguments(tmp_path):
    with pytest.raises(
        InputError, match="scores= expects one of auroc, auprc, calibration_error, got 'auprcc'; nearest: auprc"
    ):
        LitClassifier(net(), NAMES, scores=["auprcc"])
    for weights in ([1.0, 2.0], [1.0, -1.0, 1.0], "balance"):
        with pytest.raises(InputError, match="class_weights="):
            LitClassifier(net(), NAMES, class_weights=weights)
    with pytest.raises(InputError, match="cannot be handed on to loss=MultiLabelSoftMarginLoss"):
        LitClassifier(net(), NAMES, class_weights=[1.0, 1, 1], loss=nn.MultiLabelSoftMarginLoss())
    model = LitClassifier(net(), NAMES, class_weights="balanced")
    with pytest.raises(InputError, match="data module with `class_weights`, got none"):
        run(tmp_path).validate(model, Cases().val_dataloader(), verbose=False)
    with pytest.raises(InputError, match="scores= expects labels="):
        run(tmp_path).validate(
            LitClassifier(FlattenNet(size=12, labels=3, widths=(2, 2, 2, 2)), scores=["auprc"]), Cases(), verbose=False
        )
