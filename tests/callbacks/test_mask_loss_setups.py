"""MaskLossCallback with other people's nets, batches, names, schedules and precisions."""

from __future__ import annotations

import copy
import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import camtrain as ct


def fit(kit, folder, module, *callbacks, data=None, **options):
    trainer = kit.make_trainer(folder, *callbacks, **options)
    if isinstance(data, pl.LightningDataModule):
        trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, data or kit.loader(kit.make_cases()))
    return trainer


def callback(kit, **options):
    return ct.MaskLossCallback(**{"layer": kit.LAYER, "table": kit.TABLE, **options})


def check_like_by_hand(kit, module, net, **options):
    """The module's net after the fit equals the same start trained by hand."""
    twin = kit.make_net(**options)
    kit.by_hand(twin, kit.loader(kit.make_cases()), ct.OrganMaskLoss())
    kit.same_weights(net, twin)


# Schedules ---------------------------------------------------------------------------------------------------------


def test_warm_up_and_ramp_go_on_after_a_resume(kit, tmp_path):
    options = {"warmup_steps": 2, "ramp_steps": 5}
    factors = [0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1]
    first = kit.make_lit(kit.make_net())
    trainer = fit(kit, tmp_path, first, callback(kit, **options), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "mid.ckpt")
    second = kit.make_lit(kit.make_net(seed=1))
    again = kit.make_trainer(tmp_path, callback(kit, **options), max_epochs=3)
    again.fit(second, kit.loader(kit.make_cases()), ckpt_path=tmp_path / "mid.ckpt", weights_only=True)
    twin = kit.make_net()
    kit.by_hand(twin, kit.loader(kit.make_cases()), ct.OrganMaskLoss(), epochs=3, factors=factors)
    kit.same_weights(second.net, twin)


def test_wrong_input_shows_in_the_first_step_of_a_warm_up(kit, tmp_path):
    with pytest.raises(ct.InputError, match="names= has 2 names, but the network gives 3 outputs"):
        fit(kit, tmp_path, kit.make_lit(kit.make_net()), callback(kit, warmup_steps=99, names=["nodule", "stent"]))


def test_the_first_step_of_a_warm_up_does_not_change_the_training(kit, tmp_path):
    nets = [kit.make_net(), kit.make_net()]
    trainer = fit(kit, tmp_path, kit.make_lit(nets[0]), callback(kit, warmup_steps=99))
    kit.by_hand(nets[1], kit.loader(kit.make_cases()))
    kit.same_weights(nets[0], nets[1])
    assert set(trainer.callback_metrics) == {"train/task_loss"}


# Where the logits are ----------------------------------------------------------------------------------------------


class TwoParts(nn.Module):
    """Gives (B, K) features; the head is somebody else's."""

    def __init__(self, net):
        super().__init__()
        self.features, self.flat = net.features, net.head[0]

    def forward(self, image):
        return self.flat(self.features(image))


def beside(kit, in_step):
    """A module with a head beside the backbone, put together in forward or in the step itself."""
    net = kit.make_net()

    def init(self, backbone):
        type(self).__mro__[1].__init__(self)
        self.backbone, self.head = backbone, net.head[1]

    def forward(self, image):
        return self.head(self.backbone(image))

    def training_step(self, batch, batch_idx):
        logits = self.head(self.backbone(batch["image"])) if in_step else self(batch["image"])
        return kit.bce(logits, batch["label"])

    methods = {"__init__": init, "forward": forward, "training_step": training_step}
    return kit.make_lit(TwoParts(net), **methods), net


def test_the_module_around_that_fits_the_labels_is_taken(kit, tmp_path):
    module, net = beside(kit, in_step=False)
    fit(kit, tmp_path, module, callback(kit))
    check_like_by_hand(kit, module, net)


@pytest.mark.parametrize("given", ["head", "Lit.head"])
def test_logits_by_the_name_of_a_module(kit, tmp_path, given):
    module, net = beside(kit, in_step=True)
    if given == "Lit.head":
        with pytest.raises(ct.InputError, match=r"no layer 'Lit\.head'; nearest: head"):
            fit(kit, tmp_path, module, callback(kit, logits=given))
        return
    fit(kit, tmp_path, module, callback(kit, logits=given))
    check_like_by_hand(kit, module, net)


def test_logits_made_in_the_step_without_a_hint(kit, tmp_path):
    module, _ = beside(kit, in_step=True)
    with pytest.raises(ct.InputError, match=r"has 3 names, but the network gives 360 outputs: .* with logits="):
        fit(kit, tmp_path, module, callback(kit))

    def training_step(self, batch, batch_idx):
        return kit.bce(self.net.head(self.net.features(batch["image"])), batch["label"])

    module = kit.make_lit(kit.make_net(), training_step=training_step)
    with pytest.raises(ct.InputError, match=r"no module around layer 'net.features.3' gives logits.*logits='name"):
        fit(kit, tmp_path, module, callback(kit))
    assert kit.hooks_of(module) == {}


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_logits_in_another_output(kit, tmp_path, kind):
    class Wrapped(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, image):
            logits = self.net.head(self.net.features(image))
            other = logits.sigmoid()
            return {"scores": logits, "other": other} if kind == "dict" else (other, logits)

    def training_step(self, batch, batch_idx):
        output = self(batch["image"])
        return kit.bce(output["scores"] if kind == "dict" else output[1], batch["label"])

    pick = (lambda output: output["scores"]) if kind == "dict" else (lambda output: output[1])
    net = kit.make_net()
    module = kit.make_lit(Wrapped(net), training_step=training_step)
    fit(kit, tmp_path, module, callback(kit, logits=pick))
    check_like_by_hand(kit, module, net)


def test_a_layer_that_runs_twice(kit, tmp_path):
    def training_step(self, batch, batch_idx):
        logits = self(batch["image"])
        self(batch["image"].flip(2))
        return kit.bce(logits, batch["label"])

    with pytest.raises(ct.InputError, match=r"ran 2 times in one forward: .*call=0"):
        fit(kit, tmp_path, kit.make_lit(kit.make_net(), training_step=training_step), callback(kit))
    net = kit.make_net()
    fit(kit, tmp_path, kit.make_lit(net, training_step=training_step), callback(kit, call=0))
    check_like_by_hand(kit, None, net)


# Nets --------------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """The usual net with one ReLU for both convolutions, as MONAI's EfficientNet shares its activation."""

    def __init__(self, net):
        super().__init__()
        self.first, self.relu, self.second = net.features[0], net.features[1], net.features[2]
        self.head = net.head

    def forward(self, image):
        return self.head(self.relu(self.second(self.relu(self.first(image)))))


def test_layer_none_takes_the_last_run_of_a_shared_activation(kit, tmp_path):
    net = kit.make_net()
    fit(kit, tmp_path, kit.make_lit(Shared(net)), callback(kit, layer=None))
    check_like_by_hand(kit, None, net)  # whose two ReLUs are two modules
    with pytest.raises(ct.InputError, match=r"'net.relu' ran 2 times in one forward: .*call=0"):
        fit(kit, tmp_path, kit.make_lit(Shared(kit.make_net())), callback(kit, layer="relu"))


def test_layer_none_does_not_choose_between_two_views(kit, tmp_path):
    def training_step(self, batch, batch_idx):
        return kit.bce(self(batch["image"]) + self(batch["image"].flip(2)), batch["label"])

    module = kit.make_lit(Shared(kit.make_net()), training_step=training_step)
    with pytest.raises(ct.InputError, match=r"'net.relu' ran 4 times in one forward: .*call=0"):
        fit(kit, tmp_path, module, callback(kit, layer=None))


def test_layer_none_takes_the_last_feature_map(kit, tmp_path):
    net = kit.make_net()
    fit(kit, tmp_path, kit.make_lit(net), callback(kit, layer=None))
    check_like_by_hand(kit, None, net)


def test_layer_none_without_forward(kit, tmp_path):
    def training_step(self, batch, batch_idx):
        return kit.bce(self.net(batch["image"]), batch["label"])

    module = kit.make_lit(kit.make_net(), training_step=training_step)
    type(module).forward = pl.LightningModule.forward
    with pytest.raises(ct.InputError, match=r"needs a forward\(image\) in Lit, which has none"):
        fit(kit, tmp_path, module, callback(kit, layer=None))


def test_layer_none_with_class_indices(kit, tmp_path):
    cases = kit.make_cases()
    for row, case in enumerate(cases):
        case["label"] = row % 3

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch["image"]), batch["label"])

    module = kit.make_lit(kit.make_net(), training_step=training_step)
    trainer = fit(kit, tmp_path, module, callback(kit, layer=None), data=kit.loader(cases))
    assert trainer.callback_metrics["train/mask_loss"] > 0


def test_an_inplace_relu_behind_the_layer(kit, tmp_path):
    nets = [kit.make_net(inplace=True), kit.make_net()]
    for net in nets:
        fit(kit, tmp_path, kit.make_lit(net), callback(kit, layer="features.2"))
    kit.same_weights(*nets)
    assert nets[0].features[3].inplace


def test_a_frozen_backbone(kit, tmp_path):
    net = kit.make_net()
    net.features.requires_grad_(False)
    before = copy.deepcopy(net.features)
    fit(kit, tmp_path, kit.make_lit(net), callback(kit))
    kit.same_weights(net.features, before)
    twin = kit.make_net()
    twin.features.requires_grad_(False)
    for batch in kit.loader(kit.make_cases()):
        activations = twin.features(batch["image"])
        logits = twin.head(activations)
        maps = (activations[:, None] * twin.head[1].weight.view(1, 3, *activations.shape[1:])).sum(2)
        allowed = ct.OrganTable.load(kit.TABLE).allowed(batch["organs"], size=maps.shape[2:])
        loss = kit.bce(logits, batch["label"]) + ct.OrganMaskLoss()(maps, allowed, batch["label"])
        twin.head.zero_grad()
        loss.backward()
        torch.optim.SGD(twin.head.parameters(), 0.05).step()
    kit.same_weights(net.head, twin.head)


class Checkpointed(nn.Module):
    def __init__(self, net, what):
        super().__init__()
        self.features, self.head, self.what = net.features, net.head, what

    def forward(self, image):
        if self.what == "backbone":
            return self.head(checkpoint(self.features, image, use_reentrant=False))
        return checkpoint(lambda i: self.head(self.features(i)), image, use_reentrant=False)


@pytest.mark.parametrize("what", ["backbone", "all"])
@pytest.mark.parametrize("head", ["flatten", "mlp"])
def test_gradient_checkpointing(kit, tmp_path, what, head):
    net = kit.make_net(head)
    fit(kit, tmp_path, kit.make_lit(Checkpointed(net, what)), callback(kit))
    check_like_by_hand(kit, None, net, head=head)


@pytest.mark.parametrize("head", ["flatten", "mlp", "pool"])
def test_bf16(kit, tmp_path, head):
    net, twin = kit.make_net(head), kit.make_net(head)
    trainer = fit(kit, tmp_path, kit.make_lit(net), callback(kit), precision="bf16-mixed")
    losses = kit.by_hand(twin, kit.loader(kit.make_cases()), ct.OrganMaskLoss())
    kit.same_weights(net, twin, atol=3e-3, rtol=0.05)
    mean = sum(mask for _, mask in losses) / len(losses)
    assert trainer.callback_metrics["train/mask_loss"].item() == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize("size", [(16, 20), (12, 16, 20)])
def test_two_dimensions_one_label_one_case(kit, tmp_path, size):
    cases = kit.make_cases(2, labels=1, size=size) if len(size) == 3 else []
    for row in range(0 if cases else 2):
        organs = torch.zeros(1, *size, dtype=torch.uint8)
        organs[:, 2:9, 3:9] = 3
        cases.append({"image": torch.rand(1, *size), "label": torch.tensor([float(row)]), "organs": organs})
    for case in cases:
        case["label"] = case["label"][0]
    module = kit.make_lit(kit.make_net(outputs=1, size=size))
    type(module).forward = lambda self, image: self.net(image)[:, 0]
    trainer = fit(kit, tmp_path, module, callback(kit, names=["stent"]), data=kit.loader(cases, 1))
    assert trainer.callback_metrics["train/mask_loss"] > 0


# Batches and names -------------------------------------------------------------------------------------------------


def test_keys_and_adapter(kit, tmp_path):
    renamed = [{"img": c["image"], "y": c["label"], "seg": c["organs"]} for c in kit.make_cases()]
    tuples = [(c["image"], c["label"], c["organs"]) for c in kit.make_cases()]

    def step(image, label):
        def training_step(self, batch, batch_idx):
            return kit.bce(self(batch[image]), batch[label])

        return training_step

    nets = [kit.make_net(), kit.make_net()]
    by_name = callback(kit, keys={"image": "img", "label": "y", "organs": "seg"}, layer=None)
    fit(kit, tmp_path, kit.make_lit(nets[0], training_step=step("img", "y")), by_name, data=kit.loader(renamed))
    adapted = callback(kit, adapter=lambda b: {"image": b[0], "label": b[1], "organs": b[2]}, layer=None)
    fit(kit, tmp_path, kit.make_lit(nets[1], training_step=step(0, 1)), adapted, data=kit.loader(tuples))
    for net in nets:
        check_like_by_hand(kit, None, net)
    module = kit.make_lit(kit.make_net(), training_step=step(0, 1))
    with pytest.raises(ct.InputError, match=r"expected a dict batch .*got list: pass adapter="):
        fit(kit, tmp_path, module, callback(kit), data=kit.loader(tuples))
    module = kit.make_lit(kit.make_net(), training_step=step("img", "y"))
    with pytest.raises(ct.InputError, match="no key 'label': name yours with keys="):
        fit(kit, tmp_path, module, callback(kit, keys={"image": "img"}), data=kit.loader(renamed))


class Data(pl.LightningDataModule):
    def __init__(self, kit, labels=None, table=None):
        super().__init__()
        self.loader = kit.loader(kit.make_cases())
        self.labels, self.table = labels, table

    def train_dataloader(self):
        return self.loader

    val_dataloader = test_dataloader = train_dataloader


@pytest.mark.slow
def test_where_names_and_table_come_from(kit, tmp_path):
    turned = {**kit.TABLE, "labels": dict(reversed(kit.TABLE["labels"].items()))}
    others = ["a", "b", "c"]

    def trained(data, labels_of_module=None, **options):
        module = kit.make_lit(kit.make_net())
        if labels_of_module is not None:
            module.labels = labels_of_module
        fit(kit, tmp_path, module, callback(kit, **options), data=data)
        return module.net.head[1].weight

    right = trained(Data(kit))  # the table's own labels
    same = [
        trained(Data(kit), others, table=turned, names=kit.LABELS),
        trained(Data(kit, kit.LABELS), others, table=turned),
        trained(Data(kit), kit.LABELS, table=turned),
        trained(Data(kit, kit.LABELS, ct.OrganTable.load(turned)), table=None),
        trained(Data(kit), 14),
        trained(Data(kit), torch.zeros(2)),
    ]
    assert all(torch.equal(right, weight) for weight in same)
    assert not torch.equal(right, trained(Data(kit), table=turned))


FOUR = ["nodule", "effusion", "consolidation", "ground_glass"]


def test_wrong_names(kit, tmp_path):
    def any_outputs(self, batch, batch_idx):
        return self(batch["image"]).sum()

    with pytest.raises(ct.InputError, match="the data module's labels has 2 names, but the network gives 3 outputs"):
        fit(kit, tmp_path, kit.make_lit(kit.make_net()), callback(kit), data=Data(kit, ["nodule", "stent"]))
    with pytest.raises(ct.InputError, match="the organ table has 3 names, but the network gives 5 outputs"):
        fit(kit, tmp_path, kit.make_lit(kit.make_net(outputs=5), training_step=any_outputs), callback(kit))
    names = ["nodul", "stent", "effusion"]
    with pytest.raises(ct.InputError, match="label 'nodul' has no rule; nearest: nodule"):
        fit(kit, tmp_path, kit.make_lit(kit.make_net()), callback(kit, names=names))
    module = kit.make_lit(kit.make_net(outputs=4), training_step=any_outputs)
    with pytest.raises(ct.InputError, match="the network gives 4 outputs but the batch has 3 label columns"):
        fit(kit, tmp_path, module, callback(kit, names=FOUR, table=None), data=Data(kit, None, "phantom"))


def test_a_layer_with_a_single_cell_is_warned_about_once(kit):
    from camtrain._batch import Batch
    from camtrain.callbacks._context import RunContext

    context = RunContext(kit.TABLE, None, None, kit.LABELS, "fill")
    context.setup(object())
    context.resolve(_Untold(), torch.nn.Identity(), 3)
    organs = torch.ones(2, 1, 4, 5, 6, dtype=torch.int16)
    batch = Batch(None, None, organs, torch.ones(2, dtype=torch.bool), None, None)
    with pytest.warns(UserWarning, match="a single cell"):
        context.allowed(batch, (1, 1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        context.allowed(batch, (1, 1, 1))
        context.allowed(batch, (2, 2, 2))


class _Untold:
    """Stands in for a Trainer: it can be remembered, and has no data module."""

    datamodule = None
