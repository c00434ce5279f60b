"""What MaskLossCallback adds, and that it leaves the user's module as it was."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import camtrain as ct

NAMESPACES = ["pytorch_lightning", "lightning.pytorch"]


def fit(kit, folder, module, *callbacks, cases=None, namespace="pytorch_lightning", **options):
    trainer = kit.make_trainer(folder, *callbacks, namespace=namespace, **options)
    trainer.fit(module, kit.loader(cases or kit.make_cases()))
    return trainer


def callback(kit, **options):
    return ct.MaskLossCallback(**{"layer": kit.LAYER, "table": kit.TABLE, **options})


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("head", ["flatten", "mlp"])
def test_training_equals_a_loop_written_by_hand(kit, tmp_path, namespace, head):
    nets = [kit.make_net(head) for _ in range(3)]
    module = kit.make_lit(nets[0], namespace)
    trainer = fit(kit, tmp_path, module, callback(kit), max_epochs=2, namespace=namespace)
    losses = kit.by_hand(nets[1], kit.loader(kit.make_cases()), ct.OrganMaskLoss(), epochs=2)
    kit.by_hand(nets[2], kit.loader(kit.make_cases()), None, epochs=2)
    kit.same_weights(nets[0], nets[1])
    assert not torch.allclose(nets[0].features[2].weight, nets[2].features[2].weight, atol=1e-4)
    task, mask = (torch.tensor(column).mean() for column in zip(*losses[3:], strict=True))
    torch.testing.assert_close(trainer.callback_metrics["train/task_loss"], task)
    torch.testing.assert_close(trainer.callback_metrics["train/mask_loss"], mask)


@pytest.mark.parametrize("form", ["softplus", "l2", "l2_normalised", "energy"])
def test_every_form(kit, tmp_path, form):
    nets = [kit.make_net("flatten"), kit.make_net("flatten")]
    options = {"form": form, "weight": 0.7, "reduction": "per_label", "label_weights": [1.0, 2.0, 0.5]}
    fit(kit, tmp_path, kit.make_lit(nets[0]), callback(kit, **options, scale="sum"))
    kit.by_hand(nets[1], kit.loader(kit.make_cases()), ct.OrganMaskLoss(**options, scale="sum"))
    kit.same_weights(nets[0], nets[1])


@pytest.mark.parametrize("head", ["flatten", "mlp"])
def test_labels_present_equals_the_loss_on_present_labels(kit, tmp_path, head):
    nets = [kit.make_net(head), kit.make_net(head)]
    fit(kit, tmp_path, kit.make_lit(nets[0]), callback(kit, labels="present", method="gradcam"))
    batches = kit.loader(kit.make_cases())
    kit.by_hand(nets[1], batches, ct.OrganMaskLoss(labels="present"), method="gradcam")
    kit.same_weights(nets[0], nets[1])


def only_batch(kit, seen):
    def training_step(self, batch):
        return kit.bce(self(batch["image"]), batch["label"])

    return training_step


def as_dict(kit, seen):
    def training_step(self, batch, batch_idx):
        logits = self(batch["image"])
        seen.append({"loss": kit.bce(logits, batch["label"]), "logits": logits.detach(), "extra": "kept"})
        return seen[-1]

    return training_step


def decorated(kit, seen):
    def nothing(function):
        @functools.wraps(function)
        def inner(*args, **kwargs):
            return function(*args, **kwargs)

        return inner

    return nothing(only_batch(kit, seen))


def popping(kit, seen):
    def training_step(self, batch, batch_idx):
        organs, label = batch.pop("organs"), batch.pop("label")
        assert organs.any()
        return kit.bce(self(batch.pop("image")), label)

    return training_step


@pytest.mark.parametrize("variant", [only_batch, as_dict, decorated, popping])
def test_variants_of_training_step(kit, tmp_path, variant):
    seen = []
    nets = [kit.make_net(), kit.make_net()]
    fit(kit, tmp_path, kit.make_lit(nets[0], training_step=variant(kit, seen)), callback(kit))
    kit.by_hand(nets[1], kit.loader(kit.make_cases()), ct.OrganMaskLoss())
    kit.same_weights(nets[0], nets[1])


def test_a_dict_stays_the_users_own(kit, tmp_path):
    seen, outputs = [], []

    class Outputs(ct.MaskLossCallback):
        def on_train_batch_end(self, trainer, pl_module, outputs_, batch, batch_idx):
            outputs.append(outputs_)

    net = kit.make_net()
    twin = copy.deepcopy(net)
    fit(kit, tmp_path, kit.make_lit(net, training_step=as_dict(kit, seen)), Outputs(kit.LAYER, kit.TABLE))
    (task, mask), *_ = kit.by_hand(twin, kit.loader(kit.make_cases()), ct.OrganMaskLoss())
    assert set(outputs[0]) == {"loss", "logits", "extra"}
    assert outputs[0]["extra"] == "kept"
    assert outputs[0]["logits"] is seen[0]["logits"]
    assert seen[0]["loss"].item() == pytest.approx(task)
    assert float(outputs[0]["loss"]) == pytest.approx(task + mask / 3, rel=1e-5)


def test_none_skips_the_step(kit, tmp_path):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else kit.bce(self(batch["image"]), batch["label"])

    nets = [kit.make_net(), kit.make_net()]
    fit(kit, tmp_path, kit.make_lit(nets[0], training_step=training_step), callback(kit))
    batches = list(kit.loader(kit.make_cases()))
    kit.by_hand(nets[1], [batches[0], batches[2]], ct.OrganMaskLoss())
    kit.same_weights(nets[0], nets[1])


def test_a_step_that_returns_something_else(kit, tmp_path):
    def training_step(self, batch, batch_idx):
        self(batch["image"])
        return {"score": 1.0}

    with pytest.raises(ct.InputError, match="key 'loss', got dict with the keys score"):
        fit(kit, tmp_path, kit.make_lit(kit.make_net(), training_step=training_step), callback(kit))


def test_the_module_is_as_before_and_can_be_fitted_again(kit, tmp_path):
    module = kit.make_lit(kit.make_net())
    before = set(vars(module))
    added, twin = callback(kit), kit.make_net()
    for _ in range(2):
        fit(kit, tmp_path, module, added)
        assert "training_step" not in vars(module)
        assert set(vars(module)) - before <= {"_hparams"}  # that is Lightning's own
        assert kit.hooks_of(module) == {}
    kit.by_hand(twin, kit.loader(kit.make_cases()), ct.OrganMaskLoss(), epochs=2)
    kit.same_weights(module.net, twin)
    fit(kit, tmp_path, module)
    kit.by_hand(twin, kit.loader(kit.make_cases()), None)
    kit.same_weights(module.net, twin)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), "in the net"])
def test_restored_after_an_exception(kit, tmp_path, error):
    def training_step(self, batch, batch_idx):
        if error == "in the net":
            return self(batch["image"][:, :, :2])
        logits = self(batch["image"])
        if batch_idx == 1:
            raise error
        return kit.bce(logits, batch["label"])

    module = kit.make_lit(kit.make_net(), training_step=training_step)
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        fit(kit, tmp_path, module, callback(kit))
    assert "training_step" not in vars(module)
    assert kit.hooks_of(module) == {}


def test_a_step_that_is_an_attribute_of_the_instance_comes_back(kit, tmp_path):
    module, calls = kit.make_lit(kit.make_net()), []

    def training_step(batch, batch_idx):
        calls.append(batch_idx)
        return kit.bce(module(batch["image"]), batch["label"])

    module.training_step = training_step
    fit(kit, tmp_path, module, callback(kit))
    assert module.training_step is training_step
    assert calls == [0, 1, 2]


def test_two_callbacks_add_up_and_leave_nothing_behind(kit, tmp_path):
    module, twin = kit.make_lit(kit.make_net()), kit.make_net()
    pair = [callback(kit, weight=0.1), callback(kit, weight=0.2, name="second")]
    trainer = fit(kit, tmp_path, module, *pair)
    kit.by_hand(twin, kit.loader(kit.make_cases()), ct.OrganMaskLoss(weight=0.3))
    kit.same_weights(module.net, twin)
    assert "training_step" not in vars(module)
    assert pair[0].state_key != pair[1].state_key
    metrics = trainer.callback_metrics
    torch.testing.assert_close(metrics["train/mask_loss"], metrics["train/second/mask_loss"])


def test_gradient_accumulation_is_a_mean_of_means(kit, tmp_path):
    nets = [kit.make_net(), kit.make_net()]
    fit(kit, tmp_path, kit.make_lit(nets[0]), callback(kit), accumulate_grad_batches=3)
    table, loss_fn = ct.OrganTable.load(kit.TABLE), ct.OrganMaskLoss()
    for batch in kit.loader(kit.make_cases()):
        with ct.LayerTap(nets[1], kit.LAYER) as tap:
            logits = nets[1](batch["image"])
            maps = tap.maps(logits)
            allowed = table.allowed(batch["organs"], size=maps.shape[2:])
            loss = kit.bce(logits, batch["label"]) + loss_fn(maps, allowed, batch["label"])
        (loss / 3).backward()
    torch.optim.SGD(nets[1].parameters(), 0.05).step()
    kit.same_weights(nets[0], nets[1])


def test_refusals(kit, tmp_path):
    from pytorch_lightning.strategies import DDPStrategy

    def by_hand_init(self, net):
        type(self).__mro__[1].__init__(self)
        self.net, self.automatic_optimization = net, False

    def dataloader_iter_step(self, dataloader_iter):
        return None

    manual = kit.make_lit(kit.make_net(), __init__=by_hand_init)
    with pytest.raises(ct.InputError, match=r"optimises by hand.*LayerTap"):
        fit(kit, tmp_path, manual, callback(kit))
    with pytest.raises(ct.InputError, match="takes dataloader_iter: take batch instead"):
        fit(kit, tmp_path, kit.make_lit(kit.make_net(), training_step=dataloader_iter_step), callback(kit))
    trainer = kit.make_trainer(tmp_path, callback(kit))
    trainer.strategy._ddp_kwargs = DDPStrategy(static_graph=True)._ddp_kwargs
    with pytest.raises(ct.InputError, match=r"static_graph=False"):
        trainer.fit(kit.make_lit(kit.make_net()), kit.loader(kit.make_cases()))
    with pytest.raises(ct.InputError, match="needs an organ table: pass table="):
        fit(kit, tmp_path, kit.make_lit(kit.make_net()), callback(kit, table=None))
    with pytest.raises(ct.InputError, match=r"no layer 'features\.33'; nearest: .*net\.features\.3"):
        fit(kit, tmp_path, kit.make_lit(kit.make_net()), callback(kit, layer="features.33"))
    with pytest.raises(ct.InputError, match=r"no layer 'haed'; nearest: net\.head"):
        fit(kit, tmp_path, kit.make_lit(kit.make_net()), callback(kit, logits="haed"))
    with pytest.raises(ct.InputError, match="unknown method 'hires'"):
        callback(kit, method="hires")


def test_a_method_without_gradients_is_refused(kit, monkeypatch):
    import dataclasses

    from camtrain.cam import method_table

    row = dataclasses.replace(method_table.find_method("gradcam"), name="scorecam", differentiable=False)
    monkeypatch.setitem(method_table._BY_NAME, "scorecam", row)
    with pytest.raises(ct.InputError, match="'scorecam' is not differentiable"):
        callback(kit, method="scorecam")


def test_logged_keys(kit, tmp_path):
    cases = kit.make_cases()
    cases[0]["label"] = torch.tensor([1.0, torch.nan, 0.0])
    cases[3]["organs"] = torch.zeros_like(cases[3]["organs"])
    cases[4]["label"], cases[4]["organs"] = torch.tensor([0.0, 1.0, 0.0]), cases[4]["organs"] % 3
    trainer = fit(kit, tmp_path, kit.make_lit(kit.make_net()), callback(kit, name="organs"), cases=cases)
    metrics = trainer.callback_metrics
    figures = ("task_loss", "mask_loss", "outside_evidence")
    counts = {"unknown_labels": 1, "cases_without_organs": 1, "labels_without_region": 1}
    assert set(metrics) == {f"train/organs/{key}" for key in (*figures, *counts)}
    assert {key: metrics[f"train/organs/{key}"].item() for key in counts} == counts
    assert 0 < metrics["train/organs/outside_evidence"] < 1


def test_outside_evidence_is_the_share_of_the_epochs_positive_evidence(kit, tmp_path):
    net = kit.make_net()
    trainer = fit(kit, tmp_path, kit.make_lit(net), callback(kit, weight=0.0), limit_train_batches=2)
    twin, table, sums = kit.make_net(), ct.OrganTable.load(kit.TABLE), torch.zeros(2)
    for batch in list(kit.loader(kit.make_cases()))[:2]:
        maps = ct.explain(twin, batch["image"], layer=kit.LAYER).relu()
        allowed = table.allowed(batch["organs"], size=maps.shape[2:])
        maps = maps * (batch["label"] == 1)[:, :, None, None, None]
        sums += torch.stack([(maps * ~allowed).sum(), maps.sum()])
        kit.by_hand(twin, [batch])
    torch.testing.assert_close(trainer.callback_metrics["train/outside_evidence"], sums[0] / sums[1])


def test_a_figure_that_the_module_logs_too(kit, tmp_path):
    def training_step(self, batch, batch_idx):
        loss = kit.bce(self(batch["image"]), batch["label"])
        self.log("train/task_loss", 3.0, on_epoch=True)
        return loss

    with pytest.raises(ct.InputError, match="'train/task_loss' is logged by camtrain and by somebody else"):
        fit(kit, tmp_path, kit.make_lit(kit.make_net(), training_step=training_step), callback(kit))


def test_cases_without_organs_leave_the_plain_loss(kit, tmp_path):
    cases = kit.make_cases()
    for row, case in enumerate(cases):
        case["organs"] = torch.zeros_like(case["organs"]) if row < 3 else case["organs"]
        case["has_organs"] = torch.tensor(row < 3)
        if row >= 6:
            case["label"] = torch.full((3,), torch.nan)
    nets = [kit.make_net(), kit.make_net()]

    def training_step(self, batch, batch_idx):
        return kit.bce(self(batch["image"]), batch["label"].nan_to_num(0.0))

    # Batches: a segmented scan of which nothing is in the crop; not segmented; nothing known.
    module = kit.make_lit(nets[0], training_step=training_step)
    trainer = fit(kit, tmp_path, module, callback(kit, form="l2"), cases=cases)
    for case in cases:
        case["label"] = case["label"].nan_to_num(0.0)
    kit.by_hand(nets[1], kit.loader(cases), None)
    kit.same_weights(nets[0], nets[1])
    assert trainer.callback_metrics["train/mask_loss"] == 0
    assert trainer.callback_metrics["train/cases_without_organs"] == 5


def test_a_batch_without_the_key_organs(kit, tmp_path):
    cases, nets = kit.make_cases(), [kit.make_net(), kit.make_net()]
    for case in cases:
        del case["organs"]
    trainer = fit(kit, tmp_path, kit.make_lit(nets[0]), callback(kit), cases=cases)
    kit.by_hand(nets[1], kit.loader(cases), None)
    kit.same_weights(nets[0], nets[1])
    assert trainer.callback_metrics["train/mask_loss"] == 0


@pytest.mark.parametrize(("head", "layer"), [("flatten", None), ("mlp", "features.3"), ("pool", "features.1")])
def test_what_takes_backward_passes_is_told_once(kit, tmp_path, caplog, head, layer):
    caplog.set_level("INFO")
    fit(kit, tmp_path, kit.make_lit(kit.make_net(head)), callback(kit, layer=layer))
    lines = [r.getMessage() for r in caplog.records if "backward pass per present label" in r.getMessage()]
    assert len(lines) == (layer is not None)
    assert all(layer in line for line in lines)
