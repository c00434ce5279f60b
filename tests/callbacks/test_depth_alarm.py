"""The alarm `depth` on a network that is built so that its last map always lies in the organ, wherever it looked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import camtrain as ct
from camtrain import InputError
from camtrain.reporting.alarm_log import read_alarms

SIZE = (16, 16, 16)
ORGAN = (slice(5, 11),) * 3
SPOTS = {"skin": (slice(0, 2), slice(0, 2), slice(3, 5)), "organ": (slice(6, 8), slice(7, 9), slice(6, 8))}
TABLE = {"organs": {"heart": 1}, "labels": {"stent": ["heart"]}}


def built_net():
    """Finds bright spots cell by cell (`spots`), pools how much there is, and draws that into the organ (`drawn`)."""
    grid = tuple(n // 2 for n in SIZE)
    organ = torch.zeros(grid)
    organ[tuple(slice(3, 5) for _ in grid)] = 1
    find = nn.Conv3d(1, 1, 2, 2)
    spread, head = nn.Linear(1, organ.numel(), bias=False), nn.Linear(1, 1)
    with torch.no_grad():
        find.weight.fill_(1 / 8)
        find.bias.fill_(-0.5)
        spread.weight.copy_(organ.reshape(-1, 1))
        head.weight.fill_(1e3)
        head.bias.fill_(-1.0)
    return nn.Sequential(
        find, nn.LeakyReLU(1e-4), nn.AdaptiveAvgPool3d(1), nn.Flatten(), spread, nn.Unflatten(1, (1, *grid)), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), head,
    )  # fmt: skip


def cases(where, count=8):
    """Half of them have the finding, a bright spot that lies on the skin or in the organ."""
    made = []
    for row in range(count):
        image, organs = torch.full((1, *SIZE), 0.2), torch.zeros(1, *SIZE, dtype=torch.int16)
        organs[(0, *ORGAN)] = 1
        if row % 2 == 0:
            image[(0, *SPOTS[where])] = 1 + row / 10
        truth = torch.tensor([float(row % 2 == 0)])
        made.append({"image": image, "label": truth, "organs": organs, "id": f"case{row}"})
    return made


@pytest.mark.parametrize("method", ["relevancecam", "hirescam"])
@pytest.mark.parametrize(("where", "raised"), [("skin", True), ("organ", False)])
def test_a_tidy_last_map_is_told_from_an_honest_one_by_the_layer_in_the_middle(kit, tmp_path, where, raised, method):
    module = kit.make_lit(built_net(), configure_optimizers=lambda self: torch.optim.SGD(self.parameters(), 0.0))
    added = ct.AttentionMonitor("net.6", TABLE, names=["stent"], every_n_epochs=0, report=False,
                                alarms=[{"name": "depth", "every_n_epochs": 1, "method": method}])  # fmt: skip
    trainer = kit.make_trainer(tmp_path, added, max_epochs=3)
    data = kit.loader(cases(where))
    trainer.fit(module, data, data)
    assert added.alarms.questions.state()["mid"] == "net.1"
    values = added.alarms.values["val"]
    assert values["last_energy_inside"]["stent"] == pytest.approx(1.0)  # the same picture in both
    assert values["mid_energy_inside"]["stent"] == pytest.approx(0.0 if raised else 1.0)
    events = [(event.epoch, event.label, event.state) for event in read_alarms(added.publisher.run_dir.path)]
    assert events == ([(1, "stent", "raised")] if raised else [])


@pytest.mark.parametrize(
    ("option", "says"),
    [({"method": "hirescan"}, "nearest: hirescam"), ({"seen": 2}, "share of the image between 0 and 1, got 2")],
)
def test_a_wrong_method_or_share_is_refused_when_the_monitor_is_made(option, says):
    with pytest.raises(InputError, match=says):
        ct.AttentionMonitor("net.6", TABLE, alarms=[{"name": "depth", **option}])
