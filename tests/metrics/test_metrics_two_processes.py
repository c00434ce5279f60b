"""Two processes with uneven shares of the data agree with one process that saw everything."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, multiprocessing

from camtrain.metrics import (
    AverageDrop,
    AverageIncrease,
    ChannelSparseness,
    ClassSensitivity,
    DeletionAUC,
    EmptyMapRate,
    EnergyInside,
    InsertionAUC,
    LabelAUROC,
    MaskIoU,
    OrganIoU,
    PointingGame,
    RelevanceRank,
    ShortcutReliance,
    SumToScore,
    WrongPlace,
)

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
        "average_drop": AverageDrop(LABELS),
        "average_increase": AverageIncrease(LABELS, "micro", min_probability=0.3),
        "insertion": InsertionAUC(LABELS, "none"),
        "deletion": DeletionAUC(LABELS, "micro", num_points=4),
        "reliance": ShortcutReliance(LABELS),
        "reliance pooled": ShortcutReliance(LABELS, "micro", floor=0.3),
        "rank": RelevanceRank(LABELS, "micro"),
        "sensitivity": ClassSensitivity(LABELS),
        "wrong place": WrongPlace(LABELS, tolerance=0.1),
        "sparseness": ChannelSparseness(LABELS, "none", num_channels=60),
    }


def _of_changed_images(scores):
    """Probabilities and curves, for the scores that take these and not maps."""
    before = scores.sigmoid()
    after = before.flip(0).masked_fill(scores > 1.5, torch.nan)
    curve = torch.stack([before, after, before.flip(1)], dim=2)
    share = torch.tensor([0.0, 0.25, 1.0]).expand_as(curve)
    masked, curves = (before, after), (curve, share)
    sides = (before, after, before.flip(1))
    found = {"average_drop": masked, "average_increase": masked, "insertion": curves, "deletion": curves}
    return found | {"reliance": sides, "reliance pooled": sides}


def _answers(rows, batch):
    """Every number that a metric hands out, after updates in batches of these rows."""
    maps, allowed, label, scores = _data()
    answers = {}
    others = {"auroc": (scores,), "sensitivity": (maps,), "sparseness": (maps.flatten(2),)} | _of_changed_images(scores)
    others |= {"wrong place": (maps, maps.flip(2))}
    for name, metric in _metrics().items():
        for part in torch.tensor(rows, dtype=torch.long).split(batch) if rows else ():
            inputs = others.get(name, (maps, allowed))
            metric.update(*(t[part] for t in inputs), label[part])
        answers[name] = metric.averaged("none")
        answers[f"{name} undefined"] = metric.undefined_rate()
        answers[f"{name} pairs"] = metric.pairs
        answers[f"{name} computed"] = metric.compute()
        answers[f"{name} again"] = metric.averaged("macro")
        if isinstance(metric, InsertionAUC | DeletionAUC):
            answers[f"{name} curve"] = metric.curve()
        if isinstance(metric, ShortcutReliance):
            answers[f"{name} per label"] = torch.stack(metric.per_label())
            answers[f"{name} unmeasured"] = metric.unmeasured_rate("none")
            answers |= {f"{name} risk": metric.risk("none"), f"{name} mean risk": metric.risk()}
        if name == "sparseness":
            answers |= {"sparseness curve": metric.curve(), "effective share": metric.effective_share()}
    swept, energy, rank = OrganIoU(LABELS), EnergyInside(LABELS), RelevanceRank(LABELS)
    for metric in (swept, energy, rank):
        if rows:
            metric.update(maps[rows], allowed[rows], label[rows])
    answers |= {"thresholds": swept.best_thresholds(), "chance": energy.chance("none"), "rank chance": rank.chance()}
    answers |= swept.grouped({"first two": [0, 1], "last": [4]})
    return answers | _sums(rows, batch, maps, 3 * scores)


def _sums(rows, batch, maps, logits):
    """SumToScore answers in dicts."""
    metric = SumToScore(LABELS)
    for part in torch.tensor(rows, dtype=torch.long).split(batch) if rows else ():
        metric.update(maps[part], logits[part])
    rates = {f"sum undefined {name}": rate for name, rate in metric.undefined_rate().items()}
    per_label = {"l1 per label": metric.l1_per_label(), "bias per label": metric.bias_share_per_label()}
    return metric.compute() | rates | per_label | {"sum pairs": metric.pairs}


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
