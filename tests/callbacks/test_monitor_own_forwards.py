"""AttentionMonitor with methods that need forwards of their own: when they run, on what, and what they are worth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import camtrain as ct
from camtrain.metrics import energy_inside, pointing_game

PAID = ["scorecam", "relevancecam", "lrp", "guided_backprop", "guided_gradcam"]


def monitor(kit, *methods, **options):
    return ct.AttentionMonitor(kit.LAYER, **{"table": kit.TABLE, "methods": ["hirescam", *methods], **options})


def scores_of(trainer, split="val"):
    return {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith(f"{split}/") and k != "val/loss"}


def run(kit, folder, module, added, stage="validate", cases=None):
    trainer = kit.make_trainer(folder, added)
    getattr(trainer, stage)(module, kit.loader(cases or kit.make_cases()), verbose=False)
    return scores_of(trainer, "test" if stage == "test" else "val")


def wanted(kit, net, method, measure, cases=None, layer=None, image=None, fuse=None, **options):
    """The mean over labels of a score, of maps by `ct.explain`, on the grid that the maps have."""
    batch = torch.utils.data.default_collate(cases or kit.make_cases())
    present = batch["label"] == 1
    given = batch["image"] if image is None else image
    maps = ct.explain(net, given, method, layer=layer or kit.LAYER, labels=present, fuse=fuse, **options)
    allowed = ct.OrganTable.load(kit.TABLE).allowed(batch["organs"], size=maps.shape[2:])
    return measure(maps, allowed, batch["label"], batch["organs"].flatten(1).any(1)).nanmean(0).nanmean().item()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_scores_are_those_of_explain(kit, tmp_path, stage):
    net = kit.make_net()
    module = kit.make_lit(net)
    added = monitor(kit, {"name": "scorecam", "channels": 3, "background": 0.2}, *PAID[1:], panel_cases=1)
    found = run(kit, tmp_path, module, added, stage)
    split = "test" if stage == "test" else "val"
    for method in PAID:
        options = {"channels": 3, "background": 0.2} if method == "scorecam" else {}
        for name, measure in {"energy_inside": energy_inside, "pointing_game": pointing_game}.items():
            value = wanted(kit, net, method, measure, **options)
            assert found[f"{split}/{name}@{method}"] == pytest.approx(value, abs=1e-5), (method, name)
    # Guided maps are on the image's grid, and the regions they are compared with too.
    table, batch = ct.OrganTable.load(kit.TABLE), torch.utils.data.default_collate(kit.make_cases())
    share = table.allowed(batch["organs"], size=kit.SIZE).flatten(2).double().mean(2)
    chance = share.masked_fill(batch["label"] != 1, torch.nan).nanmean(0).nanmean().item()
    assert found[f"{split}/energy_inside_chance@guided_backprop"] == pytest.approx(chance)
    assert found[f"{split}/energy_inside_chance"] != pytest.approx(chance)
    assert kit.hooks_of(module) == {}
    assert len(list(tmp_path.rglob("case*.png"))) == 2


@pytest.mark.slow
def test_of_several_layers_the_mean_on_the_finest_grid(kit, tmp_path):
    net, layers = kit.make_net("mlp"), ["features.3", "features.1"]
    added = ct.AttentionMonitor(layers, kit.TABLE, methods=["hirescam", "lrp", "guided_backprop"])
    found = run(kit, tmp_path, kit.make_lit(_relu(net)), added)
    for method, at in {"hirescam": "", "lrp": "@lrp", "guided_backprop": "@guided_backprop"}.items():
        value = wanted(kit, net, method, energy_inside, layer=layers, fuse="mean")
        assert found[f"val/energy_inside{at}"] == pytest.approx(value, abs=1e-5)


def _relu(net):
    net.head[2] = nn.ReLU()
    return net


@pytest.mark.slow
def test_gradient_methods_alone_add_no_forward(kit, tmp_path):
    net = kit.make_net("mlp")
    run(kit, tmp_path, kit.make_lit(net), monitor(kit, "gradcam", "layercam"))
    assert net.calls == 3
    run(kit, tmp_path, kit.make_lit(net), monitor(kit, "lrp"))
    assert net.calls == 3 + 6


@pytest.mark.slow
def test_only_epochs_with_pictures_pay(kit, tmp_path):
    net, seen, calls = kit.make_net(), [], []

    class Follow(ct.AttentionMonitor):
        def on_validation_epoch_start(self, trainer, pl_module):
            super().on_validation_epoch_start(trainer, pl_module)
            calls.append(net.calls)

        def on_validation_end(self, trainer, pl_module):
            super().on_validation_end(trainer, pl_module)
            calls[-1] = net.calls - calls[-1]
            seen.append({score.method for score in self.scores.get("val", [])} - {None})

    added = Follow(kit.LAYER, kit.TABLE, methods=["hirescam", "lrp"], every_n_epochs=2, alarms=[])
    trainer = kit.make_trainer(tmp_path, added, max_epochs=3, num_sanity_val_steps=1)
    data = kit.loader(kit.make_cases())
    trainer.fit(kit.make_lit(net), data, data)
    # The sanity check, with its one batch, is a trial of the first epoch.
    # Once in a fit the report's footer asks how much of the image a cell has seen.
    assert calls == [2, 6 + 1, 3, 6]
    assert seen == [set(), {"hirescam", "lrp"}, {"hirescam"}, {"hirescam", "lrp"}]
    assert set(added.thresholds) == {"hirescam", "lrp"}
    state = added.state_dict()
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["thresholds"].keys() == {"hirescam", "lrp"}


@pytest.mark.slow
def test_thresholds_of_paid_methods_outlive_an_epoch_without_them(kit, tmp_path):
    added, module = monitor(kit, "lrp", every_n_epochs=2), kit.make_lit(kit.make_net())
    data = kit.loader(kit.make_cases())
    # By steps, so that the second epoch is not known to be the last one.
    trainer = kit.make_trainer(tmp_path, added, max_epochs=-1, max_steps=2 * len(data))
    trainer.fit(module, data, data)
    assert {score.method for score in added.scores["val"]} == {None, "hirescam"}
    assert set(added.thresholds) == {"hirescam", "lrp"}
    kept = added.thresholds["lrp"].clone()
    trainer.test(module, data, verbose=False)
    assert torch.equal(added.thresholds["lrp"], kept)
    again = monitor(kit, "lrp", panel_cases=1)
    again.load_state_dict({"thresholds": {"hirescam": added.thresholds["hirescam"]}})
    with pytest.warns(UserWarning, match="no validation has scored them, so OrganIoU thresholds of lrp are chosen on"):
        kit.make_trainer(tmp_path, again).test(module, data, verbose=False)


@pytest.mark.slow
def test_cases_without_a_present_label_cost_nothing(kit, tmp_path):
    cases, net = kit.make_cases(), kit.make_net()
    for row, case in enumerate(cases):
        if row != 4:
            case["label"] = torch.zeros(3)
    sizes = []
    net.features[0].register_forward_hook(lambda m, a, out: sizes.append(len(out)))
    found = run(kit, tmp_path, kit.make_lit(net), monitor(kit, "lrp"), cases=cases)
    assert sizes == [3, 3, 1, 2]
    value = wanted(kit, net, "lrp", energy_inside, cases=cases)
    assert found["val/energy_inside@lrp"] == pytest.approx(value, abs=1e-6)
    for case in cases:
        case["label"] = torch.zeros(3)
    found = run(kit, tmp_path, kit.make_lit(net), monitor(kit, "lrp"), cases=cases)
    assert not any("lrp" in key for key in found)


class Clinical(nn.Module):
    """Image and age go in by name; a dict with more than the logits comes out."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, words, scale=1.0):
        logits = self.net(words["image"] * scale + words["age"].reshape(-1, 1, 1, 1, 1))
        return {"scores": logits, "other": logits.sigmoid()}


@pytest.mark.slow
@pytest.mark.parametrize("logits", ["net.net.head", None])
def test_a_step_with_arguments_of_its_own(kit, tmp_path, logits):
    cases = [{**case, "age": torch.tensor(0.1 * row)} for row, case in enumerate(kit.make_cases())]
    net = kit.make_net()

    def validation_step(self, batch, batch_idx):
        self.net({"image": batch["image"], "age": batch["age"]}, scale=2.0)

    module = kit.make_lit(Clinical(net), validation_step=validation_step)
    added = monitor(kit, "relevancecam", logits=logits)
    found = run(kit, tmp_path, module, added, cases=cases)
    seen = torch.stack([case["image"] * 2.0 + case["age"] for case in cases])
    value = wanted(kit, net, "relevancecam", energy_inside, cases=cases, image=seen)
    assert found["val/energy_inside@relevancecam"] == pytest.approx(value, abs=1e-6)


@pytest.mark.slow
def test_the_users_step_and_its_modes_are_undisturbed(kit, tmp_path):
    states, outputs = [], []

    def step(self, batch, batch_idx):
        logits = self(batch["image"])
        states.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), logits.requires_grad))
        outputs.append(logits)

    net = kit.make_net()
    net.features.insert(3, nn.BatchNorm3d(6))
    net.head.insert(1, nn.Dropout(0.5))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    module = kit.make_lit(net, validation_step=step)
    torch.manual_seed(3)
    run(kit, tmp_path, module, monitor(kit, *PAID, panel_cases=1))
    after = torch.rand(2)
    torch.manual_seed(3)
    run(kit, tmp_path, module, monitor(kit, panel_cases=1))
    assert torch.equal(after, torch.rand(2))
    assert set(states) == {(False, True, False)}
    assert all(torch.equal(a, b) for a, b in zip(outputs[:3], outputs[3:], strict=True))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.slow
def test_bf16(kit, tmp_path):
    net = kit.make_net()
    added = monitor(kit, "lrp", "scorecam", panel_cases=1)
    trainer = kit.make_trainer(tmp_path, added, precision="bf16-mixed")
    trainer.validate(kit.make_lit(net), kit.loader(kit.make_cases()), verbose=False)
    value = wanted(kit, net, "lrp", energy_inside)
    assert scores_of(trainer)["val/energy_inside@lrp"] == pytest.approx(value, abs=0.02)


# What is refused -----------------------------------------------------------------------------------------------------


def test_wrong_methods(kit):
    def refused(words, *methods, **options):
        with pytest.raises(ct.InputError, match=words):
            ct.AttentionMonitor(methods=list(methods), **options)

    refused("the first of methods= has the plain keys.*'scorecam'.*put one of hirescam, gradcam, ", "scorecam")
    refused("methods= lists 'lrp' twice", "hirescam", "lrp", {"name": "lrp", "rules": "epsilon"})
    refused("method 'scorecam' has the options channels, .*got chanels=; nearest: channels", "hirescam",
            {"name": "scorecam", "chanels": 3})  # fmt: skip
    refused("method 'gradcam' has no options, got channels=", {"name": "gradcam", "channels": 3})
    refused("channels= expects how many", "hirescam", {"name": "scorecam", "channels": 0})
    refused("an entry of methods= is a name, or a dict with the key 'name'.*got {'channels': 3}", {"channels": 3})
    refused("unknown method 'scorcam'; nearest: scorecam", "hirescam", {"name": "scorcam"})
    refused("method 'lrp' needs forwards .* every_n_epochs=0 means never", "hirescam", "lrp", every_n_epochs=0)
    with pytest.raises(ct.InputError, match="methods= expects a list"):
        ct.AttentionMonitor(methods={"name": "scorecam"})


@pytest.mark.slow
def test_a_network_that_the_step_calls_in_parts(kit, tmp_path):
    def validation_step(self, batch, batch_idx):
        self.net.head(self.net.features(batch["image"]))

    module = kit.make_lit(kit.make_net(), validation_step=validation_step)
    found = run(kit, tmp_path, module, monitor(kit, logits="net.head"))
    assert "val/energy_inside" in found
    with pytest.raises(ct.InputError, match=r"calls the parts of the network.*or leave these methods"):
        run(kit, tmp_path, module, monitor(kit, "lrp", logits="net.head"))
    assert kit.hooks_of(module) == {}
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.slow
def test_what_the_method_itself_refuses_shows_in_the_sanity_check(kit, tmp_path):
    net, trained = kit.make_net("mlp"), []

    def training_step(self, batch, batch_idx):
        trained.append(batch_idx)
        return kit.bce(self(batch["image"]), batch["label"])

    module = kit.make_lit(net, training_step=training_step)
    net.features[1] = nn.SiLU()
    trainer, data = kit.make_trainer(tmp_path, monitor(kit, "guided_gradcam"), num_sanity_val_steps=1), None
    data = kit.loader(kit.make_cases())
    with pytest.raises(ct.InputError, match="guided backprop is defined on ReLU networks"):
        trainer.fit(module, data, data)
    assert trained == []
    assert kit.hooks_of(module) == {}
    added = monitor(kit, {"name": "guided_gradcam", "approximate": True}, panel_cases=1)
    assert "val/energy_inside@guided_gradcam" in run(kit, tmp_path, module, added)


def test_maps_are_enlarged_linearly_only_to_be_fused(kit):
    from camtrain.cam.fusing import fused

    maps = torch.rand(2, 3, 4, 5)
    assert fused([maps]) is not maps
    assert torch.equal(fused([maps]), maps)
    large = F.interpolate(maps, size=(8, 9), mode="bilinear", align_corners=False)
    torch.testing.assert_close(fused([maps, torch.zeros(2, 3, 8, 9)]), large / 2)


@pytest.mark.slow
def test_paid_methods_are_scored_where_only_every_second_epoch_is_validated(kit, tmp_path):
    """Epochs 1, 3, 5 are no multiples of 2; the first validation of every two epochs is what counts."""
    seen = []

    class Follow(ct.AttentionMonitor):
        def on_validation_end(self, trainer, pl_module):
            super().on_validation_end(trainer, pl_module)
            seen.append({score.method for score in self.scores.get("val", [])} - {None})

    added = Follow(kit.LAYER, kit.TABLE, methods=["hirescam", "lrp"], every_n_epochs=4)
    trainer = kit.make_trainer(tmp_path, added, max_epochs=8, check_val_every_n_epoch=2, num_sanity_val_steps=0)
    data = kit.loader(kit.make_cases())
    trainer.fit(kit.make_lit(kit.make_net()), data, data)
    assert seen == [{"hirescam", "lrp"}, {"hirescam"}, {"hirescam", "lrp"}, {"hirescam", "lrp"}]  # the last one too


def test_the_sanity_check_tries_one_map_only(kit, tmp_path):
    net = kit.make_net()
    added = monitor(kit, {"name": "scorecam", "chunk": 1})
    trainer = kit.make_trainer(tmp_path, added, max_epochs=1, num_sanity_val_steps=1, limit_train_batches=0)
    counts = []
    original = added.on_validation_end
    added.on_validation_end = lambda t, m: counts.append(net.calls) or original(t, m)
    data = kit.loader(kit.make_cases())
    trainer.fit(kit.make_lit(net), data, data)
    channels = dict(net.named_modules())[kit.LAYER](torch.zeros(1, *_before(net, kit))).shape[1]
    # The user's forward, one that records the layer, and one image per channel of one sample.
    assert counts[0] <= 2 + channels


def _before(net, kit):
    """Shape of what goes into the layer."""
    kept = {}
    handle = dict(net.named_modules())[kit.LAYER].register_forward_pre_hook(lambda m, a: kept.update(s=a[0].shape[1:]))
    net(torch.zeros(1, 1, *kit.SIZE))
    handle.remove()
    return kept["s"]


@pytest.mark.parametrize(
    "method",
    [{"name": "lrp", "rules": "foo"}, {"name": "relevancecam", "contrast": "foo"}, {"name": "lrp", "box": [1, 0]}],
)
def test_values_of_options_are_checked_at_once(kit, method):
    with pytest.raises(ct.InputError, match=r"foo|low < high"):
        monitor(kit, method)


def test_half_precision_weights_and_a_second_argument(kit, tmp_path):
    class WithAge(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.relu, self.fc = nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Linear(5, 2)

        def forward(self, image, age):
            pooled = self.relu(self.conv(image)).mean(dim=(2, 3, 4))
            return self.fc(torch.cat([pooled, age[:, None]], dim=1))

    from camtrain.cam.call import Call
    from camtrain.cam.method_table import find_method
    from camtrain.cam.question import WantedLayer
    from camtrain.cam.rerun import Rerun

    net = WithAge().bfloat16().eval()
    image, age = torch.rand(2, 1, 5, 6, 7).bfloat16(), torch.rand(2).bfloat16()
    call = Call.of(net, (image, age), {})
    again = Rerun(call, (WantedLayer("relu", "relu", net.relu, None),), net, 0, None)
    for method in ("lrp", "guided_backprop", "scorecam"):
        (maps,) = again.maps(find_method(method), {}, torch.ones(2, 2, dtype=torch.bool))
        assert maps.dtype == torch.float32
        assert torch.isfinite(maps).all()
