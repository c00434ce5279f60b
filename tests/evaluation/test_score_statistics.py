"""Average precision, calibration error and rows per patient, against torchmetrics, scikit-learn and loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_average_precision, binary_calibration_error

from camtrain.evaluation.case_store import CaseRecord
from camtrain.evaluation.evaluation import Evaluation
from camtrain.evaluation.intervals import intervals
from camtrain.evaluation.resampling import Units, bootstrap_weights
from camtrain.evaluation.score_statistics import AveragePrecision, CalibrationError, one_row_per_patient
from camtrain.evaluation.statistics import AUROC

NAMES = ["a", "b", "c"]


def data(n=60, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    truth = (rng.random((n, 3)) < [0.5, 0.2, 0.05]).astype(float)
    scores = rng.random((n, 3)) * 0.7 + truth * 0.3
    truth[rng.random((n, 3)) < 0.15] = np.nan
    return (scores.round(1) if ties else scores), truth


def repeated(values, times):
    """The cases of a resampling, written out."""
    return np.repeat(values, times.astype(int), axis=0)


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_of_every_resampling(ties):
    scores, truth = data(ties=ties)
    statistic = AveragePrecision(scores, truth)
    weights = np.concatenate([np.ones((1, 60)), bootstrap_weights(Units.of(list(map(str, range(60)))), 40)])
    for row, found in zip(weights, statistic(weights), strict=True):
        for column in range(3):
            known = ~np.isnan(truth[:, column])
            s, y = (repeated(v[known, column], row[known]) for v in (scores, truth))
            if 0 < y.sum() < len(y):
                expected = binary_average_precision(torch.tensor(s), torch.tensor(y).long())
                assert found[column] == pytest.approx(expected.item(), abs=1e-6)
            else:
                assert np.isnan(found[column])


def test_scikit_learn_says_the_same():
    metrics = pytest.importorskip("sklearn.metrics")
    scores, truth = data(ties=True)
    found = AveragePrecision(scores, truth)(np.ones((1, 60)))[0]
    for column in range(3):
        known = ~np.isnan(truth[:, column])
        assert found[column] == pytest.approx(
            metrics.average_precision_score(truth[known, column], scores[known, column])
        )


def test_calibration_error_of_every_resampling():
    chance, truth = data(seed=1)
    weights = np.concatenate([np.ones((1, 60)), bootstrap_weights(Units.of(list(map(str, range(60)))), 40)])
    for row, found in zip(weights, CalibrationError(chance, truth)(weights), strict=True):
        for column in range(3):
            known = ~np.isnan(truth[:, column])
            p, y = (torch.tensor(repeated(v[known, column], row[known])) for v in (chance, truth))
            expected = binary_calibration_error(p, y.long(), n_bins=15, norm="l1")
            assert found[column] == pytest.approx(expected.item(), abs=1e-6)


def test_pooled_calibration_is_that_of_one_long_label():
    chance, truth = data(seed=2)
    pooled = CalibrationError(chance, truth)
    long = CalibrationError(chance.reshape(-1, 1), truth.reshape(-1, 1))
    sums = np.ones((1, 60)) @ pooled.columns
    assert pooled.finish(sums, pool=range(3))[0, 0] == pytest.approx(long(np.ones((1, 180)))[0, 0])


def test_one_row_per_patient_in_loops():
    chance, truth = data(30)
    patients = [f"p{i % 11}" if i < 25 else None for i in range(30)]
    found = one_row_per_patient(chance, truth, patients)
    assert found is not None
    for patient in sorted({p for p in patients if p}):
        rows = [i for i in range(30) if patients[i] == patient]
        for column in range(3):
            known = [i for i in rows if not np.isnan(truth[i, column])]
            if known:
                assert found[0][rows[0], column] == pytest.approx(np.mean([chance[i, column] for i in known]))
                assert found[1][rows[0], column] == max(truth[i, column] for i in known)
            assert np.isnan(found[0][rows[1:]]).all()
    assert one_row_per_patient(chance, truth, [None] * 30) is None


def test_the_bootstrap_draws_patients_with_their_one_row():
    """The interval is that of as many cases as there are patients, whatever scans they have."""
    chance, truth = data(40)
    patients = [f"p{i // 2}" for i in range(40)]
    rows, labels = one_row_per_patient(chance, truth, patients)
    units = Units.of([str(i) for i in range(40)], patients)
    table = intervals({"x": AUROC(rows, labels)}, units, repeats=200)["x"]
    alone = Units.of([f"p{i}" for i in range(20)])
    expected = intervals({"x": AUROC(rows[::2], labels[::2])}, alone, repeats=200)["x"]
    for one, other in zip(table.labels, expected.labels, strict=True):
        assert (one.mean, one.low, one.high) == pytest.approx((other.mean, other.low, other.high), nan_ok=True)


def record(i, patient, label, logits):
    return CaseRecord(
        id=f"c{i}", split="val", patient=patient, label=label, logits=logits, segmented=False, geometry=False, seen=0
    )


def test_rows_of_an_evaluation():
    chance, truth = data(40, seed=3)
    logits = np.log(chance.clip(0.01, 0.99) / (1 - chance.clip(0.01, 0.99)))
    rows = [[None if np.isnan(v) else v for v in row] for row in truth]
    measures = ("auroc", "auprc", "calibration_error", "auroc_per_patient", "auprc_per_patient")
    records = [record(i, f"p{i // 2}", rows[i], logits[i].tolist()) for i in range(40)]
    groups = {"two": ["a", "b"]}
    found = Evaluation.of({"val": records}, NAMES, measures, {}, groups, {}, [], repeats=50)
    assert {row.measure for row in found.rows} == set(measures)
    for measure in measures:
        labels = [found.row(measure, name).mean for name in NAMES]
        assert found.row(measure).mean == pytest.approx(np.mean([v for v in labels if v is not None]))
        low, high = found.row(measure, "a").low, found.row(measure, "a").high
        assert low <= high
        assert low <= found.row(measure, "a").mean <= high or measure == "calibration_error"  # biased upwards in draws
    assert found.row("auprc", "group:two").mean == pytest.approx(np.mean([found.row("auprc", n).mean for n in "ab"]))
    assert found.row("auroc_per_patient", "a").units == 20
    assert found.row("auroc_per_patient", "a").n <= 20
    single = Evaluation.of({"val": records[::2]}, NAMES, measures, {}, None, {}, [], repeats=20)
    assert {row.measure for row in single.rows} == {"auroc", "auprc", "calibration_error"}
