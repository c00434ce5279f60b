"""Two processes with uneven shares of the data agree with one process that saw everything."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, multiprocessing

from camtrain.metrics import EmptyMapRate, EnergyInside, LabelAUROC, MaskIoU, OrganIoU, PointingGame

LABELS = 5


def _data():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(11, LABELS, 3, 4, 5, generator=generator)
    maps[2] = -maps[2].abs()
    maps[3, 1] = torch.nan
    allowed = torch.rand(11, LABELS, 3, 4, 5, generator=generator) < 0.4
    label = (torch.rand(11, LABELS, generator=generator) < 0.6).float()
    label[5, 2] = torch.nan
    scores = torch.randn(11, LABELS, generator=generator)
    return maps, allowed, label, scores


def _metrics():
    return {
        "organ_iou": OrganIoU(LABELS, "none"),
        "frozen": OrganIoU(LABELS, "micro", thresholds=[0.1, 0.2, 0.3, 0.4, 0.5]),
        "energy": EnergyInside(LABELS),
        "pointing": PointingGame(LABELS, tolerance=1),
        "mask_iou": MaskIoU(LABELS),
        "empty": EmptyMapRate(LABELS, "micro"),
        "auroc": LabelAUROC(LABELS, "none"),
    }


def _answers(rows, batch):
    """Every number that a metric hands out, after updates in batches of these rows."""
    maps, allowed, label, scores = _data()
    answers = {}
    for name, metric in _metrics().items():
        for part in torch.tensor(rows, dtype=torch.long).split(batch) if rows else ():
            inputs = (scores,) if name == "auroc" else (maps, allowed)
            metric.update(*(t[part] for t in inputs), label[part])
        answers[name] = metric.averaged("none")
        answers[f"{name} undefined"] = metric.undefined_rate()
        answers[f"{name} pairs"] = metric.pairs
        answers[f"{name} computed"] = metric.compute()
        answers[f"{name} again"] = metric.averaged("macro")
    swept, energy = OrganIoU(LABELS), EnergyInside(LABELS)
    for metric in (swept, energy):
        if rows:
            metric.update(maps[rows], allowed[rows], label[rows])
    return answers | {"thresholds": swept.best_thresholds(), "chance": energy.chance("none")}


def _worker(rank, store, shares, results):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        torch.save(_answers(shares[rank], batch=2), f"{results}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("cut", [6, 11], ids=["uneven", "one_process_without_data"])
def test_two_processes_equal_one(tmp_path, cut):
    shares = [list(range(cut)), list(range(cut, 11))]
    multiprocessing.spawn(_worker, (str(tmp_path / "store"), shares, str(tmp_path)), nprocs=2)
    expected = _answers(list(range(11)), batch=4)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, atol=1e-9, rtol=0, equal_nan=True, msg=f"{name}, rank {rank}")
