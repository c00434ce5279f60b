"""One batch through a network: cost, layers, faults; and data modules without a manifest, by the batch contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from camtrain import OrganMaskLoss, OrganTable
from camtrain.data import CryoETDataModule, PascalVOCDataModule, PhantomDataModule, make_rad_chestct_tree, make_voc_tree
from camtrain.data.rad_chestct_module import RadChestCTDataModule
from camtrain.doctor import CHECKS, Extent, examine, network, run_checks
from camtrain.doctor.facts import Content, Facts, OrganSize, Row
from camtrain.doctor.net_facts import NetFacts, StepCost, WatchedLayer
from camtrain.doctor.network import Trial, Watch, try_network
from camtrain.models import FlattenNet, LitClassifier

SIZE = (16, 18, 24)
LABELS = ["nodule", "cardiomegaly"]


def phantom(**arguments):
    given = {"labels": LABELS, "cases": 3, "val_cases": 2, "test_cases": 1, "size": SIZE, "batch_size": 2}
    return PhantomDataModule(**given | arguments)


def classifier(labels=tuple(LABELS)):
    torch.manual_seed(0)
    return LitClassifier(FlattenNet(size=SIZE, widths=(4, 6, 8, 5)), labels=list(labels))


def tried(model, **arguments):
    data = phantom()
    batch = next(iter(data.val_dataloader()))
    return try_network(Trial(model, batch, data.table, train_cases=3, **arguments))


def test_a_step_is_measured_and_leaves_the_model_as_it_was():
    model = classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    watch = Watch("MaskLossCallback", "net.relu", loss=OrganMaskLoss())
    facts = tried(model, watches=[watch])
    assert facts.fault == facts.skipped == ""
    assert facts.parameters == 4 * sum(p.numel() for p in model.parameters())
    assert facts.steps == 2
    assert facts.masked_step.held > facts.step.held > 0
    assert facts.memory == facts.parameters + 3 * facts.trainable + facts.batch + facts.masked_step.held
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_what_is_held_is_what_autograd_holds():
    """By hand: the convolution keeps its input, the ReLU its output, which is what the linear layer keeps as well."""

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 56, 2))

        def forward(self, image):
            return self.net(image)

        def training_step(self, batch, batch_idx):
            return self(batch["image"]).sum()

    batch = {"image": torch.rand(5, 1, 8, 7), "label": torch.zeros(5, 2)}
    facts = try_network(Trial(Three(), batch))
    assert facts.fault == ""
    assert facts.step.held == 4 * 5 * 56 * (1 + 3)


def test_step_with_a_wrong_number_of_outputs():
    model = classifier()
    model.net = nn.Sequential(nn.Conv3d(1, 3, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    facts = Facts("data", net=tried(model))
    assert "3 outputs for 2 labels" in run_checks(facts, ["network"])[0].got
    assert run_checks(facts, ["network"])[0].check == "step"


def test_step_with_a_shape_that_does_not_fit():
    model = LitClassifier(FlattenNet(size=(32, 32, 32), widths=(4, 6, 8, 5)), labels=LABELS)
    finding = run_checks(Facts("data", net=tried(model)), ["network"])[0]
    assert (finding.check, finding.severity) == ("step", "error")


def test_layers_that_are_not_there_or_give_no_map():
    watches = [Watch("MaskLossCallback", "net.rely"), Watch("AttentionMonitor", "net.head")]
    model = classifier()
    head = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    facts = Facts("data", net=tried(model, watches=[watches[0], Watch("AttentionMonitor", head)]))
    found = {finding.title: finding for finding in run_checks(facts, ["network"]) if finding.check == "layers"}
    assert len(found) == 2
    assert any("nearest: net.relu" in f.got for f in found.values())


def test_small_organs_beside_large_cells():
    table = OrganTable(organs={"liver": 1, "adrenal": 2}, labels={"mass": ["liver", "adrenal"]})
    sizes = {1: OrganSize(9, 9, 900.0, (100.0,) * 3, (0.0,) * 3), 2: OrganSize(1, 1, 4.0, (20.0,) * 3, (0.0,) * 3)}
    net = NetFacts("Net", layers=[WatchedLayer("layer=None", "net.last", (8, 2, 2, 2), (8.0,) * 3, (24.0,) * 3)])
    facts = Facts("d", ["mass"], table, [Row("row", "a", "train")], contents={0: Content(organs=sizes)}, net=net)
    finding = CHECKS["small_organs"].run(facts)[0]
    assert finding.got == "adrenal (4 ml in cells of 13.8)"
    assert finding.severity == "warning"


def test_memory_that_is_not_there():
    net = NetFacts("Net", parameters=2**20, step=StepCost(1.0, 2**31), skipped="too long")
    facts = Facts("d", cached_bytes=2**32, free_memory=2**30, net=net)
    titles = [finding.title for finding in CHECKS["memory"].run(facts)]
    assert len(titles) == 3
    assert "cached" in titles[0]


def test_config_built_and_made_are_errors():
    facts = Facts("x.yaml", config="data.sise: no such key", refused="a", unbuilt="b", untested="c")
    found = {(f.check, f.severity) for f in run_checks(facts, ["form"])}
    assert found == {("config", "error"), ("made", "error"), ("built", "error"), ("built", "warning")}


def test_a_phantom_by_the_batch_contract():
    data = phantom(cases=8, val_cases=6, test_cases=6)
    found = examine(data=data, model=classifier(), extent=Extent(cases=6))
    assert not found.fails
    assert found.facts.splits[:2] == ["train", "val"]
    assert found.facts.net.step is not None
    assert len(found.facts.rows) == 6 * 6
    assert any("all but 6" in reason for reason in found.left_out)
    assert not [f for f in found.findings if f.check == "duplicates"]


def test_pictures_and_particles(tmp_path):
    root = make_voc_tree(tmp_path / "voc", train=4, val=3, test=0, size=32)
    found = examine(data=PascalVOCDataModule(root, size=32, batch_size=2))
    assert not found.fails
    assert found.facts.splits == ["train", "val"]
    particles = CryoETDataModule(classes=["torus", "rod"], cases=4, val_cases=2, test_cases=1, size=20)
    assert not examine(data=particles).fails


@pytest.mark.slow
def test_rad_chestct_and_the_organs_that_are_still_to_be_made(tmp_path):
    root = make_rad_chestct_tree(tmp_path / "rad", train=3, val=2, test=1, size=(20, 24, 24))
    data = RadChestCTDataModule(root, organs=tmp_path / "lungs", make_organs=True, size=(18, 26, 26))
    found = examine(data=data, extent=Extent(cases=2))
    assert not found.fails
    assert not (tmp_path / "lungs").exists()
    assert any("make_organs" in reason for reason in found.left_out)
    assert not [f for f in found.findings if f.check == "segmented"]
    damaged = next(root.glob("*.npz"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    again = examine(data=RadChestCTDataModule(root, size=(18, 26, 26)))
    assert [f.check for f in again.findings if f.severity == "error"] == ["unreadable"]


def test_a_network_on_a_manifest_with_a_damaged_first_case(study):
    from camtrain.data import ManifestDataModule

    (study.folder / "c0.nii.gz").write_bytes(b"nothing")
    size = (16, 16, 16)
    data = ManifestDataModule(study.write(), study.folder / "table.yaml", spacing=3, size=size, augment=True)
    model = LitClassifier(FlattenNet(size=size, widths=(4, 6, 8, 5)), labels=data.labels)
    found = examine(data=data, model=model)
    assert [f.check for f in found.findings if f.severity == "error"] == ["unreadable"]
    assert found.facts.net.batch_size == 2
    assert {layer.cell_mm for layer in found.facts.net.layers} == {tuple(3 * n for n in found.facts.net.layers[0].cell)}
    assert found.facts.net.read_seconds > 0
    assert np.prod(found.facts.net.image_shape) == 2 * 16**3


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_every_check_asks_a_question(name):
    assert CHECKS[name].asks
    assert CHECKS[name].run(Facts("nothing")) == []


def test_what_is_too_large_to_run_is_told_from_its_shapes(monkeypatch):
    """No forward is made, and layers, cells and bytes are those of a real one."""
    model, watch = classifier(), Watch("AttentionMonitor", "net.relu")
    ran = tried(model, watches=[watch])
    outputs = []
    for module in model.modules():
        if not any(module.children()):
            module.register_forward_hook(lambda m, i, o: outputs.append(o))
    model(next(iter(phantom().val_dataloader()))["image"])
    expected = sum(o.numel() * 4 for o in outputs)
    outputs.clear()
    monkeypatch.setattr(network, "free_memory", lambda: expected)
    told = tried(model, watches=[watch])
    assert all(o.device.type == "meta" for o in outputs)
    assert told.layers == ran.layers
    assert len(told.layers) == 2
    assert "the feature maps of a batch take" in told.skipped
    assert told.step is None
    outputs.clear()
    monkeypatch.setattr(network, "free_memory", lambda: 2 * expected)
    assert tried(model).skipped == ""
    monkeypatch.setattr(network, "_RATE", 1e3)
    assert "trillion operations" in tried(model).skipped
