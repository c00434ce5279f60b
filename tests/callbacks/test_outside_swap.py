"""OutsideSwap in real Trainer runs: what the network is given, what teaches it, and what is left as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import nn

import camtrain as ct
from camtrain import InputError
from camtrain.evaluation.reliance import trained_replacements

LABELS = 3


def recording(kit, net=None, **methods):
    """A module that keeps the batches that its step was given."""
    seen = []

    def training_step(self, batch, batch_idx):
        seen.append(batch)
        return kit.bce(self(batch["image"]), batch["label"])

    return kit.make_lit(net or kit.make_net(), **{"training_step": training_step, **methods}), seen


def fit(kit, folder, module, *callbacks, cases=None, batch_size=4, **options):
    trainer = kit.make_trainer(folder, *callbacks, **options)
    trainer.fit(module, kit.loader(cases or kit.make_cases(8), batch_size))
    return trainer


def test_a_step_is_given_composites_and_the_module_stays_as_it_was(kit, tmp_path):
    module, seen = recording(kit)
    step = type(module).training_step
    cases = kit.make_cases(8)
    trainer = fit(kit, tmp_path, module, ct.OutsideSwap(kit.TABLE, p=1.0), cases=cases)
    assert type(module).training_step is step
    assert "training_step" not in vars(module)
    assert kit.hooks_of(module) == {}
    images = torch.cat([batch["image"] for batch in seen])
    own = torch.stack([case["image"] for case in cases])
    assert bool((images != own).flatten(1).any(dim=1).all())
    # Of each image one label's region is the case's own.
    table = ct.OrganTable.load(kit.TABLE)
    allowed = table.allowed(torch.stack([case["organs"] for case in cases]))
    same = images == own
    assert bool(((same | ~allowed).flatten(2).all(dim=2)).any(dim=1).all())
    assert trainer.callback_metrics["train/swapped_cases"] == 1
    assert 0 < trainer.callback_metrics["train/left_out_labels"] < 1


def test_the_users_batch_is_left_alone(kit, tmp_path):
    batch = {k: torch.stack([c[k] for c in kit.make_cases(4)]) for k in ("image", "label", "organs")}
    before = {k: v.clone() for k, v in batch.items()}
    module, _ = recording(kit)
    trainer = kit.make_trainer(tmp_path, ct.OutsideSwap(kit.TABLE, p=1.0))
    trainer.fit(module, torch.utils.data.DataLoader([batch], batch_size=None))
    for key, value in before.items():
        assert torch.equal(batch[key], value)


@pytest.mark.parametrize("keep", ["label", "organs"])
@pytest.mark.parametrize("targets", ["kept", "follow"])
def test_the_gate_trains_as_nan_in_the_label_does(kit, tmp_path, keep, targets):
    nets = []
    for leave_out in ("gate", "nan"):
        module, _ = recording(kit)
        swap = ct.OutsideSwap(kit.TABLE, keep=keep, targets=targets, leave_out=leave_out, seed=3)
        fit(kit, tmp_path, module, swap, max_epochs=3)
        nets.append(module.net)
    kit.same_weights(*nets, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(nets[0].parameters(), kit.make_net().parameters(), strict=True))


def test_a_loss_of_ones_own_trains_as_the_gate_does(kit, tmp_path):
    def pairs(logits, label):
        return F.binary_cross_entropy_with_logits(logits, label.nan_to_num(), reduction="none")

    gated, _ = recording(kit)
    fit(kit, tmp_path, gated, ct.OutsideSwap(kit.TABLE, seed=3), max_epochs=3)
    own, _ = recording(kit, training_step=lambda self, batch, batch_idx: F.cross_entropy(
        self(batch["image"]), batch["label"].argmax(dim=1)))  # fmt: skip
    fit(kit, tmp_path, own, ct.OutsideSwap(kit.TABLE, loss=pairs, seed=3), max_epochs=3)
    kit.same_weights(gated.net, own.net, atol=1e-6, rtol=1e-5)


def test_nothing_of_the_run_changes_where_nothing_can_be_swapped(kit, tmp_path):
    cases = kit.make_cases(8)
    for case in cases:
        case["organs"] = torch.zeros_like(case["organs"])
    plain, _ = recording(kit)
    fit(kit, tmp_path, plain, cases=cases)
    swapped, _ = recording(kit)
    other, _ = recording(kit)
    torch.manual_seed(11)
    trainer = fit(kit, tmp_path, swapped, ct.OutsideSwap(kit.TABLE, p=1.0), cases=cases)
    drawn = torch.rand(1)
    torch.manual_seed(11)
    fit(kit, tmp_path, other, cases=cases)
    assert torch.equal(drawn, torch.rand(1))
    kit.same_weights(plain.net, swapped.net, atol=0, rtol=0)
    assert trainer.callback_metrics["train/swapped_cases"] == 0


def test_draws_follow_from_the_seed_alone(kit, tmp_path):
    def images(seed, stir):
        module, seen = recording(kit)
        torch.manual_seed(stir)
        fit(kit, tmp_path, module, ct.OutsideSwap(kit.TABLE, seed=seed), max_epochs=2)
        return torch.cat([batch["image"] for batch in seen])

    first = images(1, 0)
    assert torch.equal(first, images(1, 99))
    assert not torch.equal(first, images(2, 0))
    assert not torch.equal(first[:8], first[8:])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_mask_loss_sees_what_the_network_sees_in_any_order(kit, tmp_path, order):
    cases = kit.make_cases(8)
    module, seen = recording(kit)
    swap, mask = ct.OutsideSwap(kit.TABLE, seed=3, p=1.0), ct.MaskLossCallback(kit.LAYER, kit.TABLE, weight=2.0)
    both = [(swap, mask)[i] for i in order]
    trainer = fit(kit, tmp_path, module, *both, cases=cases)
    # The same training by hand: the composites that the step was given, unknown where the truth is not shown.
    net, table = kit.make_net(), ct.OrganTable.load(kit.TABLE)
    replay = ct.OutsideSwap(kit.TABLE, seed=3, p=1.0, leave_out="nan")
    twin, known = recording(kit)
    fit(kit, tmp_path, twin, replay, cases=cases)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(seen, known, strict=True))
    losses = kit.by_hand(net, known, ct.OrganMaskLoss(weight=2.0), table)
    kit.same_weights(module.net, net, atol=1e-6, rtol=1e-5)
    means = torch.tensor(losses).mean(dim=0)
    assert trainer.callback_metrics["train/mask_loss"] == pytest.approx(means[1].item(), rel=1e-5)


def test_the_organs_of_a_composite_are_those_that_it_shows(kit, tmp_path):
    module, seen = recording(kit)
    cases = kit.make_cases(8)
    fit(kit, tmp_path, module, ct.OutsideSwap(kit.TABLE, p=1.0, keep="organs", targets="follow", seed=1), cases=cases)
    for batch in seen:
        assert set(batch["organs"].unique().tolist()) <= {0, 1, 2, 3}
        assert batch["organs"].dtype == cases[0]["organs"].dtype


def test_a_batch_of_one_borrows_from_the_step_before(kit, tmp_path):
    module, seen = recording(kit)
    cases = kit.make_cases(5)
    trainer = fit(kit, tmp_path, module, ct.OutsideSwap(kit.TABLE, p=1.0), cases=cases, batch_size=1)
    changed = [bool((batch["image"][0] != case["image"]).any()) for batch, case in zip(seen, cases, strict=True)]
    assert changed == [False, True, True, True, True]
    for row in range(1, 5):
        from_last = seen[row]["image"][0] == cases[row - 1]["image"]
        own = seen[row]["image"][0] == cases[row]["image"]
        # All but the seam is of one of the two.
        assert (from_last | own).float().mean() > 0.6
    assert trainer.callback_metrics["train/swapped_cases"] == pytest.approx(0.8)


def test_all_but_one_without_organs(kit, tmp_path):
    cases = kit.make_cases(4)
    for case in cases[1:]:
        case["organs"] = torch.zeros_like(case["organs"])
    module, seen = recording(kit)
    fit(kit, tmp_path, module, ct.OutsideSwap(kit.TABLE, p=1.0), cases=cases)
    changed = (seen[0]["image"] != torch.stack([c["image"] for c in cases])).flatten(1).any(dim=1)
    assert changed.tolist() == [True, False, False, False]


@pytest.mark.slow
def test_one_label_of_shape_b(kit, tmp_path):
    cases = kit.make_cases(6, labels=1)
    for case in cases:
        case["label"] = case["label"][0]
    module, _ = recording(kit, kit.make_net(outputs=1), training_step=lambda self, batch, _: (
        F.binary_cross_entropy_with_logits(self(batch["image"])[:, 0], batch["label"])))  # fmt: skip
    table = kit.TABLE | {"labels": {"nodule": ["lungs"]}}
    trainer = fit(kit, tmp_path, module, ct.OutsideSwap(table, p=1.0), cases=cases)
    assert trainer.callback_metrics["train/swapped_cases"] == 1
    assert trainer.callback_metrics["train/left_out_labels"] == 0


def test_other_keys_and_tuples(kit, tmp_path):
    cases = kit.make_cases(8)
    renamed = [{"img": c["image"], "y": c["label"], "seg": c["organs"]} for c in cases]
    keys = {"image": "img", "label": "y", "organs": "seg"}
    tuples = [(c["image"], c["label"].int(), c["organs"]) for c in cases]
    nets = []
    for given, step, options in (
        (cases, lambda s, b, _: kit.bce(s(b["image"]), b["label"]), {}),
        (renamed, lambda s, b, _: kit.bce(s(b["img"]), b["y"]), {"keys": keys}),
        (tuples, lambda s, b, _: kit.bce(s(b[0]), b[1].float()),
         {"adapter": lambda b: {"image": b[0], "label": b[1], "organs": b[2]}}),
    ):  # fmt: skip
        module, _ = recording(kit, training_step=step)
        fit(kit, tmp_path, module, ct.OutsideSwap(kit.TABLE, seed=1, **options), cases=given)
        nets.append(module.net)
    kit.same_weights(nets[0], nets[1], atol=0, rtol=0)
    kit.same_weights(nets[0], nets[2], atol=0, rtol=0)


def test_a_metatensor_stays_one(kit, tmp_path):
    affine = torch.diag(torch.tensor([2.0, 3, 4, 1], dtype=torch.float64))
    batch = {k: torch.stack([c[k] for c in kit.make_cases(4)]) for k in ("image", "label", "organs")}
    batch["image"] = MetaTensor(batch["image"], affine=affine)
    module, seen = recording(kit)
    kit.make_trainer(tmp_path, ct.OutsideSwap(kit.TABLE, p=1.0)).fit(
        module, torch.utils.data.DataLoader([batch], batch_size=None)
    )
    assert isinstance(seen[0]["image"], MetaTensor)
    assert torch.equal(seen[0]["image"].affine, affine)
    assert not torch.equal(seen[0]["image"].as_tensor(), batch["image"].as_tensor())


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
def test_other_ways_to_train(kit, tmp_path, options):
    swap, mask = ct.OutsideSwap(kit.TABLE), ct.MaskLossCallback(kit.LAYER, kit.TABLE)
    module, _ = recording(kit)
    trainer = fit(kit, tmp_path, module, mask, swap, max_epochs=2, **options)
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert 0 < trainer.callback_metrics["train/swapped_cases"] < 1


@pytest.mark.slow
def test_a_compiled_backbone(kit, tmp_path):
    net = kit.make_net()
    net.features = torch.compile(net.features, backend="eager")
    module, _ = recording(kit, net)
    trainer = fit(kit, tmp_path, module, ct.OutsideSwap(kit.TABLE, p=1.0, seed=1))
    plain, _ = recording(kit)
    fit(kit, tmp_path, plain, ct.OutsideSwap(kit.TABLE, p=1.0, seed=1))
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
    assert trainer.callback_metrics["train/swapped_cases"] == 1


def test_a_run_that_goes_on_draws_as_one_that_never_stopped(kit, tmp_path):
    def images(epochs, ckpt=None, seed=None):
        module, seen = recording(kit)
        trainer = kit.make_trainer(tmp_path, ct.OutsideSwap(kit.TABLE, seed=seed), max_epochs=epochs)
        trainer.fit(module, kit.loader(kit.make_cases(8), 4), ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return torch.cat([batch["image"] for batch in seen])

    whole = images(3, seed=5)
    images(2, seed=5)
    torch.manual_seed(77)
    assert torch.equal(images(3, ckpt=tmp_path / "2.ckpt"), whole[16:])
    saved = torch.load(tmp_path / "3.ckpt", weights_only=True)
    assert trained_replacements(saved) == {"case"}


def test_after_an_exception_nothing_is_left_behind(kit, tmp_path):
    def training_step(self, batch, batch_idx):
        loss = kit.bce(self(batch["image"]), batch["label"])
        if batch_idx == 1:
            raise RuntimeError("of the user's")
        return loss

    module = kit.make_lit(kit.make_net(), training_step=training_step)
    with pytest.raises(RuntimeError, match="of the user's"):
        fit(kit, tmp_path, module, ct.OutsideSwap(kit.TABLE, p=1.0))
    assert "training_step" not in vars(module)
    assert kit.hooks_of(module) == {}


def test_a_step_that_skips(kit, tmp_path):
    module, _ = recording(kit, training_step=lambda self, batch, batch_idx: self(batch["image"]).sum() * 0 and None)
    fit(kit, tmp_path, module, ct.OutsideSwap(kit.TABLE, p=1.0))


def test_class_indices_need_the_union(kit, tmp_path):
    cases = [case | {"label": torch.tensor(row % LABELS)} for row, case in enumerate(kit.make_cases(6))]
    step = {"training_step": lambda self, batch, _: F.cross_entropy(self(batch["image"]), batch["label"])}
    with pytest.raises(InputError, match=r"class indices.*keep='union'"):
        fit(
            kit,
            tmp_path,
            recording(kit, **step)[0],
            ct.OutsideSwap(kit.TABLE, names=["nodule", "stent", "effusion"]),
            cases=cases,
        )
    module, _ = recording(kit, **step)
    swap = ct.OutsideSwap(kit.TABLE, p=1.0, keep="union", names=["nodule", "stent", "effusion"])
    trainer = fit(kit, tmp_path, module, swap, cases=cases)
    assert trainer.callback_metrics["train/swapped_cases"] == 1
    assert trainer.callback_metrics["train/left_out_labels"] == 0


def softmax_step(self, batch, batch_idx):
    return F.cross_entropy(self(batch["image"]), batch["label"].argmax(dim=1))


def own_logits_step(self, batch, batch_idx):
    features = self.net.features(batch["image"])
    return F.binary_cross_entropy_with_logits(F.linear(features.flatten(1), self.weight), batch["label"])


@pytest.mark.parametrize(
    ("table", "methods", "options", "says"),
    [
        ({"labels": {"a": "anywhere", "b": "anywhere", "c": "anywhere"}}, {}, {}, "nothing lies outside"),
        ({}, {"training_step": softmax_step}, {}, "mixes labels or cases"),
        ({}, {"training_step": own_logits_step}, {}, "found no logits"),
        ({}, {}, {"keys": {"image": "picture"}}, "picture"),
        ({}, {}, {"logits": "net.haed"}, "haed"),
        ({}, {}, {"adapter": lambda b: {**b, "image": b["image"] + 0}}, "adapter= makes a new tensor"),
        ({}, {}, {"names": ["nodule"]}, "1 outputs but the batch has 3"),
        ({}, {}, {"loss": lambda y, t: y.sum(dim=1)}, "one value per pair"),
    ],
)
def test_what_cannot_work_is_refused(kit, tmp_path, table, methods, options, says):
    module, _ = recording(kit, **methods)
    module.weight = nn.Parameter(torch.zeros(LABELS, 360))
    with pytest.raises(InputError, match=says):
        fit(kit, tmp_path, module, ct.OutsideSwap(kit.TABLE | table, p=1.0, **options))
    assert "training_step" not in vars(module)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"p": 0}, "probability"), ({"p": 1.5}, "probability"), ({"keep": "lable"}, "label"), ({"seam": -1}, "whole"),
     ({"seam": True}, "whole number"), ({"targets": "all"}, "follow"), ({"leave_out": "mask"}, "gate")],
)  # fmt: skip
def test_arguments_out_of_range(options, says):
    with pytest.raises(InputError, match=says):
        ct.OutsideSwap("phantom", **options)


def test_integer_labels_cannot_hold_nan(kit, tmp_path):
    cases = [case | {"label": case["label"].long()} for case in kit.make_cases(4)]
    module, _ = recording(kit, training_step=lambda s, b, _: kit.bce(s(b["image"]), b["label"].float()))
    with pytest.raises(InputError, match="leave_out='nan' needs labels in floating point"):
        fit(kit, tmp_path, module, ct.OutsideSwap(kit.TABLE, leave_out="nan"), cases=cases)


def test_no_table_anywhere(kit, tmp_path):
    with pytest.raises(InputError, match="needs an organ table"):
        fit(kit, tmp_path, recording(kit)[0], ct.OutsideSwap())


def test_a_head_beside_the_backbone(kit, tmp_path):
    """The step calls backbone and head one after the other; `logits=` names the head."""

    def training_step(self, batch, batch_idx):
        return kit.bce(self.net.head(self.net.features(batch["image"])), batch["label"])

    nets = []
    for options in ({"logits": "net.head"}, {}):
        module, _ = recording(kit, training_step=training_step)
        fit(kit, tmp_path, module, ct.OutsideSwap(kit.TABLE, seed=2, **options))
        nets.append(module.net)
    whole, _ = recording(kit)
    fit(kit, tmp_path, whole, ct.OutsideSwap(kit.TABLE, seed=2))
    for net in nets:
        kit.same_weights(net, whole.net, atol=0, rtol=0)
