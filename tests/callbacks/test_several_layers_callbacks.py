"""Both callbacks with several layers: means of losses, maps fused on the finest grid."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import camtrain as ct
from camtrain.callbacks._figures import Figures
from camtrain.metrics import energy_inside, organ_iou

BOTH = ["features.3", "features.1"]


def fit(kit, folder, module, *callbacks, cases=None, **options):
    trainer = kit.make_trainer(folder, *callbacks, **options)
    data = kit.loader(cases or kit.make_cases())
    trainer.fit(module, data, data if options.get("num_sanity_val_steps") is not None else None)
    return trainer


def callback(kit, **options):
    return ct.MaskLossCallback(**{"layer": BOTH, "table": kit.TABLE, **options})


def by_hand(kit, net, loss_fn, epochs=1, method="hirescam", cases=None):
    """Plain training with the mean of the losses of both layers; gives task loss and the losses of each layer."""
    table, optimizer = ct.OrganTable.load(kit.TABLE), torch.optim.SGD(net.parameters(), 0.05)
    seen = []
    for batch in list(kit.loader(cases or kit.make_cases())) * epochs:
        with ct.LayerTap(net, BOTH) as tap:
            logits = net(batch["image"])
            each = [
                loss_fn(maps, table.allowed(batch["organs"], size=maps.shape[2:]), batch["label"])
                for maps in tap.maps(logits, method).values()
            ]
        task = kit.bce(logits, batch["label"])
        seen.append((task.item(), *(part.item() / loss_fn.weight for part in each)))
        optimizer.zero_grad()
        (task + (each[0] + each[1]) / 2).backward()
        optimizer.step()
    return torch.tensor(seen)


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("head", ["flatten", "mlp"])
@pytest.mark.parametrize("options", [{}, {"form": "l2_normalised"}, {"labels": "present", "scale": "sum"}])
def test_training_equals_a_loop_with_the_mean_of_two_losses(kit, tmp_path, head, options):
    nets = [kit.make_net(head) for _ in range(3)]
    module = kit.make_lit(nets[0])
    trainer = fit(kit, tmp_path, module, callback(kit, weight=2.0, **options), max_epochs=2)
    seen = by_hand(kit, nets[1], ct.OrganMaskLoss(weight=2.0, **options), epochs=2)[3:].mean(0)
    kit.same_weights(nets[0], nets[1])
    kit.by_hand(nets[2], kit.loader(kit.make_cases()), ct.OrganMaskLoss(weight=2.0, **options), epochs=2)
    assert not torch.allclose(nets[0].features[0].weight, nets[2].features[0].weight, atol=1e-5)
    metrics = trainer.callback_metrics
    figures = [metrics["train/task_loss"], *(metrics[f"train/mask_loss/{layer}"] for layer in BOTH)]
    torch.testing.assert_close(torch.stack(figures), seen)
    torch.testing.assert_close(metrics["train/mask_loss"], seen[1:].mean())
    assert kit.hooks_of(module) == {}


def test_figures_of_several_layers(kit, tmp_path):
    cases = kit.make_cases()
    cases[0]["label"] = torch.tensor([1.0, torch.nan, 0.0])
    cases[3]["organs"] = torch.zeros_like(cases[3]["organs"])
    cases[4]["label"], cases[4]["organs"] = torch.tensor([0.0, 1.0, 0.0]), cases[4]["organs"] % 3
    net = kit.make_net("mlp")
    added = callback(kit, name="both", weight=0.0)
    metrics = fit(kit, tmp_path, kit.make_lit(net), added, cases=cases, limit_train_batches=1).callback_metrics
    losses = ("mask_loss", *(f"mask_loss/{layer}" for layer in BOTH))
    counts = {"unknown_labels": 1, "cases_without_organs": 0, "labels_without_region": 0}
    known = {f"train/both/{key}" for key in ("task_loss", *losses, "outside_evidence", *counts)}
    assert set(metrics) == known
    assert {key: metrics[f"train/both/{key}"].item() for key in counts} == counts
    shares, twin, table = [], kit.make_net("mlp"), ct.OrganTable.load(kit.TABLE)
    batch = next(iter(kit.loader(cases)))
    for layer in BOTH:
        maps = ct.explain(twin, batch["image"], layer=layer).relu() * (batch["label"] == 1)[:, :, None, None, None]
        shares.append((maps * ~table.allowed(batch["organs"], size=maps.shape[2:])).sum() / maps.sum())
    assert abs(shares[0] - shares[1]) > 1e-3
    torch.testing.assert_close(metrics["train/both/outside_evidence"], torch.stack(shares).mean())
    every = fit(kit, tmp_path, kit.make_lit(kit.make_net()), callback(kit), cases=cases).callback_metrics
    wanted = {"unknown_labels": 1, "cases_without_organs": 1, "labels_without_region": 1}
    assert {key: every[f"train/{key}"].item() for key in wanted} == wanted


@pytest.mark.parametrize("order", [("fine", "coarse"), ("coarse", "fine")])
def test_labels_without_region_are_those_of_the_layer_that_lost_most(order):
    loss, label, without = ct.OrganMaskLoss(), torch.tensor([[1.0, 1.0, 1.0, 0.0]]), {"fine": 1, "coarse": 2}
    parts = {}
    for layer in order:
        cells = {"fine": (4, 6), "coarse": (2, 3)}[layer]
        allowed = torch.ones(1, 4, *cells, dtype=torch.bool)
        allowed[..., 0] = False
        allowed[:, : without[layer]] = False
        parts[layer] = loss.parts(torch.rand(1, 4, *cells), allowed, label)
        assert parts[layer].labels_without_region == without[layer]
    figures = Figures(torch.device("cpu"))
    for _ in range(3):
        figures.update(parts)
    assert figures.compute()["labels_without_region"] == 3 * 2


def test_none_among_the_layers_and_layers_as_modules(kit, tmp_path):
    nets = [kit.make_net() for _ in range(3)]
    trainer = fit(kit, tmp_path, kit.make_lit(nets[0]), callback(kit, layer=[None, "features.1"]))
    fit(kit, tmp_path, kit.make_lit(nets[1]), callback(kit, layer=(nets[1].features[1], nets[1].features[3])))
    by_hand(kit, nets[2], ct.OrganMaskLoss())
    kit.same_weights(nets[0], nets[2])
    kit.same_weights(nets[1], nets[2])
    assert {"train/mask_loss/net.features", "train/mask_loss/features.1"} <= set(trainer.callback_metrics)


def test_one_layer_in_a_list_is_one_layer(kit, tmp_path):
    nets = [kit.make_net(), kit.make_net()]
    trainers = [
        fit(kit, tmp_path, kit.make_lit(net), callback(kit, layer=layer))
        for net, layer in zip(nets, (["features.3"], "features.3"), strict=True)
    ]
    kit.same_weights(*nets)
    assert trainers[0].callback_metrics == trainers[1].callback_metrics
    assert not any("mask_loss/" in key for key in trainers[0].callback_metrics)


def test_a_frozen_stem_and_an_inplace_relu(kit, tmp_path):
    nets = [kit.make_net("mlp", inplace=inplace) for inplace in (True, False)]
    for net in nets:
        net.features[:2].requires_grad_(False)
        fit(kit, tmp_path, kit.make_lit(net), callback(kit, layer=["features.0", "features.2"]))
    kit.same_weights(*nets)
    assert not torch.equal(nets[0].features[2].weight, kit.make_net("mlp").features[2].weight)


class Branched(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.features, self.head, self.side = net.features, net.head, nn.Conv3d(6, 1, 1)

    def forward(self, image):
        features = self.features(image)
        self.side(features)
        return self.head(features)


def test_lists_that_cannot_work(kit, tmp_path):
    def refused(words, **options):
        module = kit.make_lit(Branched(kit.make_net()))
        for added in (callback(kit, **options), monitor(kit, **options)):
            with pytest.raises(ct.InputError, match=words):
                fit(kit, tmp_path, module, added, num_sanity_val_steps=1)
            assert kit.hooks_of(module) == {}
            assert not {"training_step", "validation_step"} & set(vars(module))

    refused("layer= is an empty list", layer=[])
    refused(r"lists 'net\.features\.3' twice", layer=["features.3", "net.features.3"])
    refused("lists None twice", layer=[None, None])
    refused(r"no layer 'features\.9'", layer=["features.3", "features.9"])
    refused(r"layer='input' is not for callbacks.*ct\.LayerTap\(model, 'input'\)", layer=["input", "features.3"])
    refused(r"layer='input' is not for callbacks.*ct\.explain", layer="input")
    refused("do not depend on layer 'side': it lies in another branch", layer=["features.3", "side"])


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_restored_after_an_exception(kit, tmp_path, error):
    def step(self, batch, batch_idx):
        self(batch["image"])
        raise error

    for name in ("training_step", "validation_step"):
        module = kit.make_lit(kit.make_net(), **{name: step})
        with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
            fit(kit, tmp_path, module, callback(kit), monitor(kit), num_sanity_val_steps=0)
        assert kit.hooks_of(module) == {}
        assert name not in vars(module)
        assert torch.is_grad_enabled()


def test_methods_that_no_loss_trains_through(kit):
    for method in ("scorecam", "lrp", "guided_gradcam"):
        with pytest.raises(ct.InputError, match=f"'{method}' is not differentiable.*take one of hirescam, gradcam, "):
            callback(kit, method=method)


def test_the_seen_share_of_every_layer_above_the_limit(kit, tmp_path, caplog):
    class Mixing(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.features, self.head = net.features, net.head
            self.mixed = nn.Identity()

        def forward(self, image):
            features = self.features(image)
            return self.head(self.mixed(features + features.mean(dim=(2, 3, 4), keepdim=True)))

    module = kit.make_lit(Mixing(kit.make_net()))
    fit(kit, tmp_path, module, callback(kit, layer=["features.1", "mixed"]))
    said = [r.getMessage() for r in caplog.records if "a central cell of" in r.getMessage()]
    assert len(said) == 1
    assert "'net.mixed'" in said[0]


# The monitor ---------------------------------------------------------------------------------------------------------


def monitor(kit, **options):
    return ct.AttentionMonitor(**{"layer": BOTH, "table": kit.TABLE, "every_n_epochs": 0, **options})


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_the_monitor_scores_the_mean_map_on_the_finest_grid(kit, tmp_path, stage):
    net, cases = kit.make_net("mlp"), kit.make_cases()
    module, data = kit.make_lit(net), kit.loader(cases)
    trainer = kit.make_trainer(tmp_path, monitor(kit, methods=["hirescam", "gradcam"]))
    if stage == "fit":
        trainer.fit(module, data, data)
        assert net.calls == 6
    else:
        getattr(trainer, stage)(module, data, verbose=False)
        assert net.calls == 3
    batch = torch.utils.data.default_collate(cases)
    split = "test" if stage == "test" else "val"
    for method, at in {"hirescam": "", "gradcam": "@gradcam"}.items():
        each = ct.explain(net, batch["image"], method, layer=BOTH, labels=batch["label"] == 1)
        fine = F.interpolate(each["features.3"], size=(6, 8, 10), mode="trilinear", align_corners=False)
        maps = (fine + each["features.1"]) / 2
        allowed = ct.OrganTable.load(kit.TABLE).allowed(batch["organs"], size=(6, 8, 10))
        for measure, function in {"energy_inside": energy_inside, "organ_iou": organ_iou}.items():
            wanted = function(maps, allowed, batch["label"]).nanmean(0).nanmean().item()
            assert trainer.callback_metrics[f"{split}/{measure}{at}"].item() == pytest.approx(wanted, abs=2e-6)
    assert kit.hooks_of(module) == {}


def test_pictures_of_a_fused_map(kit, tmp_path):
    trainer = fit(kit, tmp_path, kit.make_lit(kit.make_net()), monitor(kit, every_n_epochs=1), num_sanity_val_steps=0)
    assert len(list(tmp_path.rglob("epochs/0000/*.png"))) >= len(kit.LABELS)
    assert trainer.callback_metrics["val/organ_iou"] > 0
