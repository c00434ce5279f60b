"""The audit's verdict: by reliance, every replacement, and never by energy inside."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import camtrain as ct
from camtrain import InputError
from camtrain.evaluation import AuditLimits, audit
from camtrain.reporting.evaluation_rows import ScoreRow

MEASURES = ["energy_inside", "energy_inside_chance", "reliance"]


def found(figures, split="val"):
    """An evaluation of one label that consists of these numbers."""
    rows = []
    for name, mean in figures.items():
        measure, _, method = name.partition("@")
        rows.append(ScoreRow(split, method, "relu" if method else "", "stent", measure, 4, mean))
    return SimpleNamespace(rows=rows, records={split: []}, names=["stent"])


def figures(**changes):
    plain = {
        "energy_inside@hirescam": 0.3,
        "energy_inside_chance@hirescam": 0.1,
        "outside_effect/air": 0.4,
        "shortcut_reliance/air": 0.8,
        "outside_effect/case": 0.3,
        "shortcut_reliance/case": 0.7,
    }
    return plain | {name.replace("__", "/"): value for name, value in changes.items()}


def test_all_replacements_above_both_limits_make_a_suspect():
    said = audit(found(figures()))
    (row,) = said.labels
    assert row.suspect
    assert said.suspects == ["stent"]
    assert row.figures["energy_inside@hirescam"] == pytest.approx(3.0)
    assert not row.flags["energy_inside@hirescam"]
    assert row.flags["shortcut_reliance/air"]
    assert str(said) == "1 of 1 labels react more to what lies outside: stent"


@pytest.mark.parametrize("name", ["outside_effect__air", "shortcut_reliance__air", "shortcut_reliance__case"])
def test_one_dissenting_figure_acquits(name):
    (row,) = audit(found(figures(**{name: 0.05}))).labels
    assert row.suspect is False
    assert not row.flags[name.replace("__", "/")]


def test_energy_inside_has_no_vote():
    low = figures() | {"energy_inside@hirescam": 0.05}
    assert audit(found(low)).labels[0].flags["energy_inside@hirescam"]
    assert audit(found(low)).suspects == ["stent"]
    clean = low | {"shortcut_reliance/air": 0.1, "shortcut_reliance/case": 0.1}
    assert audit(found(clean)).suspects == []


def test_limits_decide():
    assert audit(found(figures()), limits=AuditLimits(share=0.75)).suspects == []
    assert audit(found(figures()), limits=AuditLimits(outside=0.35)).suspects == []
    assert audit(found(figures()), limits=AuditLimits(energy=3.1)).labels[0].flags["energy_inside@hirescam"]


def test_what_was_not_measured_is_no_acquittal():
    silent = figures(shortcut_reliance__air=None, shortcut_reliance__case=None, outside_effect__air=0.001)
    said = audit(found(silent))
    assert said.labels[0].suspect is None
    assert said.unknown == ["stent"]
    assert said.suspects == []
    assert math.isnan(said.labels[0].figures["shortcut_reliance/air"])
    assert "not measured: stent" in str(said)
    energy = {k: v for k, v in figures().items() if k.startswith("energy")}
    assert audit(found(energy)).labels[0].suspect is None


def test_bad_input():
    with pytest.raises(InputError, match="'train' was not evaluated"):
        audit(found(figures()), split="train")
    with pytest.raises(InputError, match="nothing to audit by"):
        audit(found({"auroc": 0.9}))
    with pytest.raises(InputError, match="share= expects a limit from 0 to 1"):
        AuditLimits(share=1.5)
    with pytest.raises(InputError, match="energy= expects a limit from 0 to inf"):
        AuditLimits(energy=-1)


class _Reader(nn.Module):
    """Logits of two labels: the first reads the organ (cells 0-1), the second what lies outside (cells 2-5)."""

    def __init__(self):
        super().__init__()
        self.relu, self.head = nn.ReLU(), nn.Linear(6, 2)
        self.head.weight.data = torch.tensor([[4.0, 4, 0, 0, 0, 0], [0.0, 0, 2, 2, 2, 2]])
        self.head.bias.data = torch.tensor([-4.0, -4.0])

    def forward(self, image):
        return self.head(self.relu(image).flatten(1))


def test_the_label_read_outside_is_found_in_a_real_evaluation():
    generator = torch.Generator().manual_seed(0)
    label = (torch.rand(24, 2, generator=generator) < 0.5).float()
    image = 0.1 * torch.rand(24, 1, 6, generator=generator)
    image[:, 0, :2] += 0.9 * label[:, :1]
    image[:, 0, 2:] += 0.9 * label[:, 1:]
    batch = {"image": image, "label": label, "organs": torch.tensor([[[1, 1, 0, 0, 0, 0]]] * 24)}
    batch["id"] = [f"case {i}" for i in range(24)]
    table = {"organs": {"heart": 1}, "labels": {"honest": ["heart"], "cheat": ["heart"]}}
    scores = ct.evaluate(_Reader(), {"val": [batch]}, table, measures=MEASURES, replacements=["case", "air"],
                         layers=["relu"], repeats=20, progress=False)  # fmt: skip
    said = audit(scores)
    honest, cheat = said.labels
    assert said.suspects == ["cheat"]
    assert honest.suspect is False
    assert honest.figures["shortcut_reliance/air"] == pytest.approx(0, abs=0.01)
    assert cheat.figures["shortcut_reliance/air"] == pytest.approx(1, abs=0.01)
    assert honest.figures["energy_inside@hirescam"] == pytest.approx(3, abs=0.01)
    assert cheat.figures["energy_inside@hirescam"] == pytest.approx(0, abs=0.01)
