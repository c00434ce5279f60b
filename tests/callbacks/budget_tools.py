"""Helpers of the tests of map_budget."""

from __future__ import annotations

import torch

import camtrain as ct
from camtrain.callbacks import _map_budget
from camtrain.callbacks._scores import ScoreBook
from camtrain.cam.price import WorkCount
from camtrain.cam.watch import ModuleWatch

MID = "features.1"
SECOND = _map_budget.SECOND


def price_of(kit, net, layer=MID, size=None, batch=3):
    """Of a pass in forwards of a batch."""
    count = WorkCount(net, [net.get_submodule(layer)])
    with count.counting(), torch.no_grad():
        net(torch.rand(batch, 1, *(size or kit.SIZE)))
    net.calls = 0
    return (count.behind(0).backward + count.behind(0).forward / 2) / count.whole.forward


class Spy:
    """Of each batch: which pairs were scored, and was a graph recorded?"""

    def __init__(self, monkeypatch):
        self.scored, self.graphs = [], []
        update, update_logits, start = ScoreBook.update, ScoreBook.update_logits, ModuleWatch.start

        def counted(book, logits, label):
            self.scored.append(torch.zeros_like(label, dtype=torch.bool))
            update_logits(book, logits, label)

        def updated(book, maps, allowed, label, has_organs, logits):
            self.scored[-1] = (label == 1) & has_organs[:, None]
            update(book, maps, allowed, label, has_organs, logits)

        def started(watch, graph=True, again=True):
            self.graphs.append(graph)
            start(watch, graph, again)

        monkeypatch.setattr(ScoreBook, "update_logits", counted)

        monkeypatch.setattr(ScoreBook, "update", updated)
        monkeypatch.setattr(ModuleWatch, "start", started)

    def pairs(self):
        return torch.cat(self.scored)


def validate(kit, folder, cases, net=None, layer=MID, batch=3, **options):
    options = {"every_n_epochs": 0, "alarms": [], **options}
    monitor = ct.AttentionMonitor(layer, kit.TABLE, **options)
    trainer = kit.make_trainer(folder, monitor)
    module = kit.make_lit(net or kit.make_net("mlp"))
    trainer.validate(module, kit.loader(cases, batch), verbose=False)
    return {key: value.item() for key, value in trainer.callback_metrics.items()}, monitor, trainer
