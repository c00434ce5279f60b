"""What AttentionMonitor computes, against an evaluation written here, and what it leaves alone."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torchmetrics.classification import BinaryAveragePrecision, BinaryCalibrationError

import camtrain as ct
from camtrain import InputError
from camtrain.metrics import (
    class_sensitivity,
    empty_map_rate,
    energy_inside,
    label_auroc,
    mask_iou,
    organ_iou,
    pointing_game,
    relevance_rank,
    sum_to_score,
)

METHODS = ["hirescam", "gradcam", "gradcam++", "layercam", "xgradcam", "respondcam"]
PAIRS = {
    "organ_iou": organ_iou,
    "energy_inside": energy_inside,
    "pointing_game": pointing_game,
    "mask_iou": mask_iou,
    "relevance_rank": relevance_rank,
    "empty_map_rate": empty_map_rate,
}


def expected(kit, net, cases, methods, split="val", layer=None, names=None, table=None, thresholds=None):
    """All scores of a set, from `ct.explain` over all cases at once."""
    batch = torch.utils.data.default_collate(cases)
    image, label, organs = batch["image"], batch["label"], batch["organs"]
    table, names = table or ct.OrganTable.load(kit.TABLE), names or kit.LABELS
    calls = net.calls
    logits = net(image).detach()
    scores = {f"{split}/auroc": label_auroc(logits, label)}
    for name, rate in {"auprc": BinaryAveragePrecision, "calibration_error": BinaryCalibrationError}.items():
        found = torch.full((label.shape[1],), torch.nan)
        for column, truth in enumerate(label.unbind(1)):
            known = ~truth.isnan()
            if name == "calibration_error" or len(truth[known].unique()) == 2:
                found[column] = rate()(logits[known, column].double().sigmoid(), truth[known].long())
        scores[f"{split}/{name}"] = found
    for method in methods:
        at = "" if method == methods[0] else f"@{method}"
        maps = ct.explain(net, image, method=method, layer=layer or kit.LAYER, labels=label == 1)
        allowed = table.allowed(organs, size=maps.shape[2:])
        has_organs = organs.flatten(1).any(1)
        for measure, function in PAIRS.items():
            options = {"thresholds": thresholds} if measure == "organ_iou" else {}
            pairs = function(maps, allowed, label, has_organs, **options)
            scores[f"{split}/{measure}{at}"] = pairs.nanmean(0)
            if measure == "organ_iou":
                scores[f"{split}/organ_iou_micro{at}"] = pairs.nanmean()
        made = maps[has_organs]  # without organs no map is made
        sums = sum_to_score(made, net(image).detach()[has_organs])
        scores[f"{split}/class_sensitivity{at}"] = class_sensitivity(made, label[has_organs]).nanmean(0)
        scores[f"{split}/sum_to_score_l1{at}"] = sums.gap.nanmean(0)
        scores[f"{split}/bias_share{at}"] = sums.bias_share.nanmean(0)
        counted = (label == 1) & has_organs[:, None] & allowed.flatten(2).any(2)
        share = torch.where(counted, allowed.flatten(2).double().mean(2), torch.nan)
        scores[f"{split}/energy_inside_chance{at}"] = share.nanmean(0).nanmean()
    net.calls = calls
    named = {}
    for key, value in scores.items():
        named[key] = value.nanmean()
        if value.ndim:
            named |= {f"{key}/{name}": v for name, v in zip(names, value, strict=True)}
    return {key: float(value) for key, value in named.items() if not value.isnan()}


def logged(trainer, split="val"):
    return {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith(f"{split}/") and k != "val/loss"}


def monitor(kit, **options):
    return ct.AttentionMonitor(**{"layer": kit.LAYER, "table": kit.TABLE, "every_n_epochs": 0, **options})


def validate(kit, folder, net, *callbacks, cases=None, methods=None, batch_size=3, **options):
    trainer = kit.make_trainer(folder, *callbacks, **options)
    module = kit.make_lit(net, **(methods or {}))
    trainer.validate(module, kit.loader(cases or kit.make_cases(), batch_size), verbose=False)
    return trainer


def awkward_cases(kit):
    """Unknown labels, a case without organs, an organ that is missing, a label without negatives."""
    cases = kit.make_cases()
    cases[0]["label"][2] = torch.nan
    cases[3]["organs"] = torch.zeros_like(cases[3]["organs"])
    cases[5]["organs"] = cases[5]["organs"] % 3
    cases[5]["label"][1] = 1
    for case in cases:
        case["label"][0] = 1
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("head", ["flatten", "mlp"])
def test_scores_equal_an_evaluation_of_the_whole_set(kit, tmp_path, head):
    net, cases = kit.make_net(head), awkward_cases(kit)
    trainer = validate(kit, tmp_path, net, monitor(kit, methods=METHODS), cases=cases)
    assert net.calls == 3
    assert logged(trainer) == pytest.approx(expected(kit, net, cases, METHODS), abs=2e-6)
    assert "val/auroc/nodule" not in trainer.callback_metrics
    assert "val/auroc/stent" in trainer.callback_metrics


def test_scores_of_every_epoch_of_a_fit_are_those_of_its_weights(kit, tmp_path):
    net, cases, seen = kit.make_net("mlp"), kit.make_cases(), []

    class Follow(ct.AttentionMonitor):
        def on_validation_end(self, trainer, pl_module):
            super().on_validation_end(trainer, pl_module)
            if not trainer.sanity_checking:
                seen.append((logged(trainer), expected(kit, net, cases, ["hirescam"])))

    trainer = kit.make_trainer(tmp_path, Follow(kit.LAYER, kit.TABLE, every_n_epochs=0, alarms=[]), max_epochs=3)
    trainer.fit(kit.make_lit(net), kit.loader(cases), kit.loader(cases))
    assert net.calls == 3 * 6
    assert len(seen) == 3
    for found, wanted in seen:
        assert found == pytest.approx(wanted, abs=2e-6)
    assert seen[0][0]["val/energy_inside"] != seen[2][0]["val/energy_inside"]


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_the_users_step_is_undisturbed(kit, tmp_path, stage):
    outputs, modes = [], []

    def step(self, batch, batch_idx):
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        logits = self(batch["image"])
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        outputs.append(logits)
        return {"logits": logits, "nested": [logits * 2]}

    results = {}
    for added in ([], [monitor(kit)]):
        net = kit.make_net()
        module = kit.make_lit(net, validation_step=step, test_step=step)
        trainer, data = kit.make_trainer(tmp_path, *added), kit.loader(kit.make_cases())
        if stage == "fit":
            trainer.fit(module, data, data)
        else:
            getattr(trainer, stage)(module, data, verbose=False)
        results[bool(added)] = (list(modes), torch.cat(outputs), net.calls)
        assert not any(out.requires_grad or out.grad_fn is not None for out in outputs)
        assert kit.hooks_of(module) == {}
        assert not {"validation_step", "test_step"} & set(vars(module))
        outputs.clear()
        modes.clear()
    assert results[True][0] == results[False][0]
    torch.testing.assert_close(results[True][1], results[False][1])
    assert results[True][2] == results[False][2]


@pytest.mark.parametrize("methods", [{}, {"in_step": True}])
def test_a_head_beside_the_backbone(kit, tmp_path, methods):
    net, states = kit.make_net(), []

    def validation_step(self, batch, batch_idx):
        features = self.net.features(batch["image"])
        logits = self.net.head(features)
        states.append((logits.requires_grad, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        self.log("val/loss", kit.bce(logits, batch["label"]))

    if not methods:
        with pytest.raises(ct.InputError, match=r"logits='name\.of\.the\.head'"):
            validate(kit, tmp_path, net, monitor(kit), methods={"validation_step": validation_step})
        return
    added = monitor(kit, logits="net.head")
    trainer = validate(kit, tmp_path, net, added, methods={"validation_step": validation_step})
    assert logged(trainer) == pytest.approx(expected(kit, net, kit.make_cases(), ["hirescam"]), abs=2e-6)
    assert set(states[1:]) == {(False, False, True)}


def test_two_forwards_in_a_step(kit, tmp_path):
    def validation_step(self, batch, batch_idx):
        self(batch["image"].flip(2))
        self.log("val/loss", kit.bce(self(batch["image"]), batch["label"]))

    steps = {"validation_step": validation_step}
    with pytest.raises(ct.InputError, match="ran 2 times"):
        validate(kit, tmp_path, kit.make_net(), monitor(kit), methods=steps)
    net = kit.make_net()
    trainer = validate(kit, tmp_path, net, monitor(kit, call=1), methods=steps)
    assert logged(trainer) == pytest.approx(expected(kit, net, kit.make_cases(), ["hirescam"]), abs=2e-6)


@pytest.mark.slow
def test_layer_none_takes_the_last_run_of_a_shared_activation(kit, tmp_path):
    """Methods of the graph, and one with forwards of its own, which runs the network again."""

    class Shared(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.first, self.relu, self.second = net.features[0], net.features[1], net.features[2]
            self.head = net.head

        def forward(self, image):
            return self.head(self.relu(self.second(self.relu(self.first(image)))))

    net = kit.make_net("mlp")
    methods = ["hirescam", "relevancecam"]
    found = logged(validate(kit, tmp_path, Shared(net), monitor(kit, layer=None, methods=methods, every_n_epochs=1)))
    named = monitor(kit, layer=kit.LAYER, methods=methods, every_n_epochs=1)
    separate = logged(validate(kit, tmp_path, net, named))
    assert any("relevancecam" in key for key in found)
    assert found == pytest.approx(separate, abs=2e-6, nan_ok=True)


def test_a_frozen_net_and_an_inplace_relu_behind_the_layer(kit, tmp_path):
    net, twin = kit.make_net("mlp", inplace=True).requires_grad_(False), kit.make_net("mlp")
    trainer = validate(kit, tmp_path, net, monitor(kit, layer="features.2"))
    wanted = expected(kit, twin, kit.make_cases(), ["hirescam"], layer="features.2")
    assert logged(trainer) == pytest.approx(wanted, abs=2e-6)


def test_batch_norm_and_dropout_stay_as_they_are(kit, tmp_path):
    net = kit.make_net()
    net.features.insert(3, nn.BatchNorm3d(6))
    net.head.insert(1, nn.Dropout(0.5))
    state = {k: v.clone() for k, v in net.state_dict().items()}
    trainer = validate(kit, tmp_path, net, monitor(kit, layer="features.4"))
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    wanted = expected(kit, net.eval(), kit.make_cases(), ["hirescam"], layer="features.4")
    assert logged(trainer) == pytest.approx(wanted, abs=2e-6)


def test_bf16(kit, tmp_path):
    net = kit.make_net("mlp")
    trainer = validate(kit, tmp_path, net, monitor(kit), precision="bf16-mixed")
    wanted = expected(kit, net, kit.make_cases(), ["hirescam"])
    assert logged(trainer)["val/energy_inside"] == pytest.approx(wanted["val/energy_inside"], abs=0.02)
    assert set(logged(trainer)) == set(wanted)


def test_one_case_one_label_two_dimensions(kit, tmp_path):
    cases = []
    for row in range(3):
        organs = torch.zeros(1, 16, 20, dtype=torch.uint8)
        organs[:, 4:9, 3 + row : 9] = 3
        cases.append({"image": torch.rand(1, 16, 20), "label": torch.tensor(float(row > 0)), "organs": organs})
    net = kit.make_net(outputs=1, size=(16, 20))
    forward = {"forward": lambda self, image: self.net(image)}
    step = {"validation_step": lambda self, batch, batch_idx: self(batch["image"])[:, 0]}
    added = monitor(kit, layer=None, names=["stent"])
    trainer = validate(kit, tmp_path, net, added, cases=cases, batch_size=1, methods=forward | step)
    for case in cases:
        case["label"] = case["label"][None]
    table = ct.OrganTable.load(kit.TABLE).select(["stent"])
    wanted = expected(kit, net, cases, ["hirescam"], names=["stent"], table=table)
    assert logged(trainer) == pytest.approx(wanted, abs=2e-6)


def test_without_organs_or_table(kit, tmp_path):
    net, cases = kit.make_net(), [{k: c[k] for k in ("image", "label")} for c in kit.make_cases()]
    trainer = validate(kit, tmp_path, net, monitor(kit, table=None, names=kit.LABELS), cases=cases)
    ranking = ("val/auroc", "val/auprc", "val/calibration_error")
    free = (*ranking, "val/class_s", "val/sum_to", "val/bias_share")
    every = expected(kit, net, kit.make_cases(), ["hirescam"])
    assert all(case["organs"].any() for case in kit.make_cases())
    wanted = {k: v for k, v in every.items() if k.startswith(free)}
    assert logged(trainer) == pytest.approx(wanted, abs=2e-6)
    wanted = {k: v for k, v in wanted.items() if k.startswith(ranking)}
    # A table, and cases that were never segmented: nothing to score but the logits, and no NaN.
    trainer = validate(kit, tmp_path, net, monitor(kit), cases=cases)
    assert logged(trainer) == pytest.approx(wanted, abs=2e-6)


def test_one_affine_for_a_whole_batch_is_unknown_geometry(kit, tmp_path):
    def adapter(batch):
        return {**batch, "affine": torch.eye(4)}

    with pytest.warns(UserWarning, match="geometry counts as unknown: use monai.data.DataLoader"):
        validate(kit, tmp_path, kit.make_net(), monitor(kit, adapter=adapter))
    table = {**kit.TABLE, "labels": {**kit.TABLE["labels"], "stent": {"organs": ["heart"], "dilate_mm": 3}}}
    with pytest.raises(ct.InputError, match="mm options need an affine/spacing"):
        validate(kit, tmp_path, kit.make_net(), monitor(kit, adapter=adapter, table=table))
    shear = torch.tensor([[0.0, 2, 0, 1], [1, 0, 0, 1], [0, 0, 3, 1], [0, 0, 0, 1]])
    cases = [{**case, "affine": shear} for case in kit.make_cases()]
    trainer = validate(kit, tmp_path, kit.make_net(), monitor(kit, table=table), cases=cases)
    wanted = ct.OrganTable.load(table)
    batch = torch.utils.data.default_collate(cases)
    allowed = wanted.allowed(batch["organs"], size=(3, 4, 5), spacing=[1, 2, 3])
    share = allowed[:, 1].flatten(1).double().mean(1)[batch["label"][:, 1] == 1]
    assert not torch.equal(allowed, wanted.allowed(batch["organs"], size=(3, 4, 5), spacing=[2, 1, 3]))
    maps = ct.explain(trainer.lightning_module.net, batch["image"], layer=kit.LAYER, labels=batch["label"] == 1)
    inside = energy_inside(maps, allowed, batch["label"])[:, 1].nanmean()
    assert trainer.callback_metrics["val/energy_inside/stent"].item() == pytest.approx(inside.item(), abs=1e-5)
    assert 0 < share.mean() < 1


def test_unnamed_labels(kit, tmp_path):
    trainer = validate(kit, tmp_path, kit.make_net(), monitor(kit, table=None))
    assert {"val/auroc", "val/auroc/label_0", "val/auroc/label_2"} <= set(trainer.callback_metrics)


def test_undefined_scores_are_left_out(kit, tmp_path):
    cases = kit.make_cases()
    for case in cases:
        case["label"] = torch.tensor([0.0, torch.nan, 0.0])
    trainer = validate(kit, tmp_path, kit.make_net(), monitor(kit), cases=cases, methods={
        "validation_step": lambda self, batch, batch_idx: self(batch["image"])
    })  # fmt: skip
    # Probabilities of absent cases alone can be off; labels 0 and 2 are known, label 1 is not.
    kept = {f"val/calibration_error{end}" for end in ("", f"/{kit.LABELS[0]}", f"/{kit.LABELS[2]}")}
    assert set(logged(trainer)) == kept


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["step", "net"])
def test_nothing_is_left_after_an_exception(kit, tmp_path, error, where):
    net = kit.make_net()

    def broken(*_):
        raise error

    def validation_step(self, batch, batch_idx):
        logits = self(batch["image"])
        if where == "step":
            raise error
        return logits

    handle = net.head.register_forward_hook(broken) if where == "net" else None
    module = kit.make_lit(net, validation_step=validation_step)
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        kit.make_trainer(tmp_path, monitor(kit)).validate(module, kit.loader(kit.make_cases()), verbose=False)
    if handle is not None:
        handle.remove()
    assert kit.hooks_of(module) == {}
    assert "validation_step" not in vars(module)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_wrong_arguments(kit, tmp_path):
    with pytest.raises(ct.InputError, match="methods= expects a list"):
        ct.AttentionMonitor(methods="hirescam")
    with pytest.raises(ct.InputError, match="unknown method 'gradcamm'; nearest: gradcam"):
        ct.AttentionMonitor(methods=["gradcamm"])
    with pytest.raises(ct.InputError, match="every_n_epochs= expects 0"):
        ct.AttentionMonitor(every_n_epochs=-1)
    with pytest.raises(ct.InputError, match=r"no layer 'features\.33'"):
        validate(kit, tmp_path, kit.make_net(), monitor(kit, layer="features.33"))
    with pytest.raises(ct.InputError, match="names= has 2 names, but the network gives 3 outputs"):
        validate(kit, tmp_path, kit.make_net(), monitor(kit, names=["nodule", "stent"]))


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_many_labels_are_in_callback_metrics_all_the_same(kit, tmp_path, stage):
    class Spy(pl.Callback):
        seen = None

        def on_validation_end(self, trainer, pl_module):
            self.seen = dict(trainer.callback_metrics)

    found = []
    for most in (20, 2):
        spy = Spy()
        trainer = kit.make_trainer(tmp_path / str(most), monitor(kit, max_label_keys=most), spy, max_epochs=1)
        module, loader = kit.make_lit(kit.make_net()), kit.loader(kit.make_cases(), 3)
        torch.manual_seed(0)
        trainer.fit(module, loader, loader) if stage == "fit" else trainer.validate(module, loader, verbose=False)
        found.append({k: v for k, v in spy.seen.items() if k.startswith("val/") and k != "val/loss"})
        kept = {k for k in trainer.callback_metrics if k.startswith("val/")}
        assert kept >= set(found[-1])
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert found[1][key].dtype == value.dtype
        torch.testing.assert_close(found[1][key], value, msg=key)


@pytest.mark.parametrize("name", ["mean", ""])
def test_a_label_that_would_take_the_row_of_the_mean_is_refused(kit, tmp_path, name):
    names = [name, "stent", "effusion"]
    table = {**kit.TABLE, "labels": {name: ["lungs"], "stent": ["heart"], "effusion": ["lung_right"]}}
    added = ct.AttentionMonitor(kit.LAYER, table if name else None, names=names)
    trainer = kit.make_trainer(tmp_path, added, num_sanity_val_steps=1)
    data = kit.loader(kit.make_cases())
    with pytest.raises(InputError, match=f"other than 'mean' and '', got '{name}': .*rename the label"):
        trainer.fit(kit.make_lit(kit.make_net()), data, data)
