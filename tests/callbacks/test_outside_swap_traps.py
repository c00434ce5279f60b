"""Modules, losses and batches with which a swap could train something else than it says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import camtrain as ct
from camtrain import InputError


def fit(kit, folder, module, *callbacks, cases=None, batch_size=4, **options):
    trainer = kit.make_trainer(folder, *callbacks, **options)
    trainer.fit(module, kit.loader(cases or kit.make_cases(8), batch_size))
    return trainer


def trained(kit, folder, step, *, swap=None, cases=None, prepare=None, **options):
    """A module with this training step, trained for two epochs."""
    module = kit.make_lit(kit.make_net(), training_step=step)
    if prepare is not None:
        prepare(module)
    fit(kit, folder, module, swap or ct.OutsideSwap(kit.TABLE, seed=3, p=1.0), cases=cases, max_epochs=2, **options)
    return module


def pairs(logits, label):
    return F.binary_cross_entropy_with_logits(logits, label, reduction="none")


def plain_step(self, batch, batch_idx):
    return F.binary_cross_entropy_with_logits(self(batch["image"]), batch["label"])


def criterion_step(self, batch, batch_idx):
    return self.criterion(self(batch["image"]), batch["label"]).mean()


def teacher_step(self, batch, batch_idx):
    loss = plain_step(self, batch, batch_idx)
    with torch.no_grad():
        self(batch["image"])
    return loss


def metric_step(self, batch, batch_idx):
    logits = self(batch["image"])
    self.sigmoid(logits.detach())
    return F.binary_cross_entropy_with_logits(logits, batch["label"])


def two_views_step(self, batch, batch_idx):
    views = (batch["image"], batch["image"].flip(2))
    return sum(F.binary_cross_entropy_with_logits(self(view), batch["label"]) for view in views) / 2


def add_parts(module):
    module.criterion, module.sigmoid = nn.BCEWithLogitsLoss(reduction="none"), nn.Sigmoid()


@pytest.mark.parametrize("step", [criterion_step, teacher_step, metric_step])
@pytest.mark.parametrize("loss", [None, pairs])
def test_only_the_logits_of_the_network_go_through_the_gate(kit, tmp_path, step, loss):
    plain = trained(kit, tmp_path, plain_step)
    other = trained(kit, tmp_path, step, prepare=add_parts, swap=ct.OutsideSwap(kit.TABLE, seed=3, p=1.0, loss=loss))
    kit.same_weights(plain.net, other.net, atol=1e-6, rtol=1e-5)


def test_all_views_of_a_step_are_taught(kit, tmp_path):
    gated = trained(kit, tmp_path, two_views_step)
    own = trained(kit, tmp_path, two_views_step, swap=ct.OutsideSwap(kit.TABLE, seed=3, p=1.0, loss=pairs))
    kit.same_weights(gated.net, own.net, atol=1e-6, rtol=1e-5)


def test_features_as_wide_as_the_logits_are_refused(kit, tmp_path):
    def step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self.head(self(batch["image"])), batch["label"])

    def add_head(module):
        module.head = nn.Linear(3, 3)

    with pytest.raises(InputError, match="which of the two are the logits"):
        trained(kit, tmp_path, step, prepare=add_head)
    named = ct.OutsideSwap(kit.TABLE, seed=3, p=1.0, logits="head")
    module = trained(kit, tmp_path, step, prepare=add_head, swap=named)
    assert not torch.equal(module.net.features[0].weight, kit.make_net().features[0].weight)


def test_unknown_truths_do_not_reach_a_loss_of_ones_own(kit, tmp_path):
    cases = kit.make_cases(8)
    for row, case in enumerate(cases):
        case["label"][row % 3] = torch.nan
    own = trained(
        kit, tmp_path, lambda s, b, _: kit.bce(s(b["image"]), b["label"]), cases=cases,
        swap=ct.OutsideSwap(kit.TABLE, seed=3, p=1.0, loss=pairs),
    )  # fmt: skip
    nan = trained(
        kit, tmp_path, lambda s, b, _: kit.bce(s(b["image"]), b["label"]), cases=cases,
        swap=ct.OutsideSwap(kit.TABLE, seed=3, p=1.0, leave_out="nan"),
    )  # fmt: skip
    kit.same_weights(own.net, nan.net, atol=1e-6, rtol=1e-5)


def test_with_a_loss_of_ones_own_the_value_stays_the_modules(kit, tmp_path):
    values = []

    def step(self, batch, batch_idx):
        values.append(7.0 + 0 * self(batch["image"]).sum())
        return values[-1]

    mask = ct.MaskLossCallback(kit.LAYER, kit.TABLE, weight=0.0)
    module = kit.make_lit(kit.make_net(), training_step=step)
    trainer = fit(kit, tmp_path, module, mask, ct.OutsideSwap(kit.TABLE, loss=pairs))
    assert trainer.callback_metrics["train/task_loss"] == 7
    assert not torch.equal(module.net.head[1].weight, kit.make_net().head[1].weight)


class Opaque(torch.autograd.Function):
    """A cross-entropy whose gradient has no graph."""

    @staticmethod
    def forward(ctx, logits, label):
        ctx.save_for_backward(logits, label)
        return pairs(logits, label).mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logits, label = ctx.saved_tensors
        return grad * (logits.sigmoid() - label) / label.numel(), None


def test_a_loss_that_cannot_be_checked_is_told(kit, tmp_path):
    with pytest.warns(UserWarning, match="mixes labels cannot be checked"):
        opaque = trained(kit, tmp_path, lambda s, b, _: Opaque.apply(s(b["image"]), b["label"]))
    kit.same_weights(opaque.net, trained(kit, tmp_path, plain_step).net, atol=1e-6, rtol=1e-5)


def test_set_ups_that_cannot_work(kit, tmp_path):
    module = kit.make_lit(kit.make_net())
    with pytest.raises(InputError, match="expected one OutsideSwap"):
        fit(kit, tmp_path, module, ct.OutsideSwap(kit.TABLE, name="a"), ct.OutsideSwap(kit.TABLE, name="b"))
    mask = ct.MaskLossCallback(kit.LAYER, kit.TABLE)
    with pytest.raises(InputError, match="give both the same"):
        fit(kit, tmp_path, module, mask, ct.OutsideSwap(kit.TABLE, logits="net.head"))
    module.automatic_optimization = False
    with pytest.raises(InputError, match="optimises by hand"):
        fit(kit, tmp_path, module, ct.OutsideSwap(kit.TABLE))


def test_a_named_head_leaves_the_maps_of_the_mask_loss_alone(kit, tmp_path):
    nets = []
    for logits in (None, "net.head"):
        mask = ct.MaskLossCallback(kit.LAYER, kit.TABLE, weight=2.0, logits=logits)
        module = kit.make_lit(kit.make_net("mlp"))
        fit(kit, tmp_path, module, mask, ct.OutsideSwap(kit.TABLE, seed=3, p=1.0, logits=logits), max_epochs=2)
        nets.append(module.net)
    kit.same_weights(*nets, atol=1e-6, rtol=1e-5)


def test_a_remainder_of_one_borrows_from_the_batch_before(kit, tmp_path):
    cases, seen = kit.make_cases(5), []

    def step(self, batch, batch_idx):
        seen.append(batch["image"].clone())
        batch["image"].mul_(0)  # what the user does to the batch must not reach the donor
        return plain_step(self, batch, batch_idx)

    module = kit.make_lit(kit.make_net(), training_step=step)
    fit(kit, tmp_path, module, ct.OutsideSwap(kit.TABLE, p=1.0, seam=0), cases=cases)
    own, lent = seen[1][0] == cases[4]["image"], seen[1][0] == cases[3]["image"]
    assert bool((own | lent).all())
    assert 0 < own.float().mean() < 1


def test_a_batch_of_one_under_a_rule_in_mm(kit, tmp_path):
    """Each case has a voxel size of its own, so that a donor's region is made with the donor's."""
    table = kit.TABLE | {"labels": {"nodule": {"organs": ["heart"], "dilate_mm": 4}, "stent": ["lung_left"],
                                    "effusion": ["lung_right"]}}  # fmt: skip
    cases = kit.make_cases(6)
    for row, case in enumerate(cases):
        case["affine"] = torch.diag(torch.tensor([1.0 + row, 2.0, 2.0, 1.0], dtype=torch.float64))
    module = kit.make_lit(kit.make_net())
    trainer = fit(kit, tmp_path, module, ct.OutsideSwap(table, p=1.0), cases=cases, batch_size=1)
    assert trainer.callback_metrics["train/swapped_cases"] == pytest.approx(5 / 6)
    for case in cases:
        del case["affine"]
    with pytest.raises(InputError, match="spacing"):
        fit(kit, tmp_path, module, ct.OutsideSwap(table, p=1.0), cases=cases)


def test_the_organs_in_the_batch_are_those_of_the_composite(kit, tmp_path):
    cases, batches = kit.make_cases(8), []

    def step(self, batch, batch_idx):
        batches.append(batch)
        return plain_step(self, batch, batch_idx)

    module = kit.make_lit(kit.make_net(), training_step=step)
    fit(kit, tmp_path, module, ct.OutsideSwap(kit.TABLE, p=1.0, seam=0, cover=False, seed=1), cases=cases)
    images, organs = (torch.cat([batch[key] for batch in batches]) for key in ("image", "organs"))
    for row, case in enumerate(cases):
        own = images[row] == case["image"]
        kept = set(case["organs"][own].unique().tolist()) - {0}
        assert kept
        for organ in kept:
            # An organ of the case's own shows nowhere else, and the donor's organ of that kind is not called one.
            assert torch.equal(organs[row] == organ, (case["organs"] == organ) & own)


def test_a_batch_of_another_mapping_keeps_its_type(kit, tmp_path):
    class Words(dict):
        pass

    kinds = []

    def step(self, batch, batch_idx):
        kinds.append(type(batch))
        return plain_step(self, batch, batch_idx)

    batch = Words({k: torch.stack([c[k] for c in kit.make_cases(4)]) for k in ("image", "label", "organs")})
    module = kit.make_lit(kit.make_net(), training_step=step)
    trainer = kit.make_trainer(tmp_path, ct.OutsideSwap(kit.TABLE, p=1.0))
    trainer.fit(module, torch.utils.data.DataLoader([batch], batch_size=None))
    assert kinds == [Words]


def softmax_step(self, batch, batch_idx):
    return F.cross_entropy(self(batch["image"]), batch["label"])


def indexed(kit, count=6):
    return [case | {"label": torch.tensor(row % 3)} for row, case in enumerate(kit.make_cases(count))]


NAMES = ["nodule", "stent", "effusion"]


def test_class_indices_where_an_organ_is_missing(kit, tmp_path):
    cases = indexed(kit)
    cases[2]["organs"] = cases[2]["organs"].masked_fill(cases[2]["organs"] == 3, 0)  # no heart: class 1 cannot show
    module = kit.make_lit(kit.make_net(), training_step=softmax_step)
    swap = ct.OutsideSwap(kit.TABLE, p=1.0, keep="union", names=NAMES)
    trainer = fit(kit, tmp_path, module, swap, cases=cases, batch_size=6)
    assert trainer.callback_metrics["train/swapped_cases"] == pytest.approx(5 / 6)
    assert trainer.callback_metrics["train/left_out_labels"] == 0
    table = kit.TABLE | {"labels": kit.TABLE["labels"] | {"stent": "anywhere"}}
    with pytest.raises(InputError, match="class of the table may be read from anywhere"):
        fit(kit, tmp_path, module, ct.OutsideSwap(table, p=1.0, keep="union", names=NAMES), cases=cases)


def test_under_the_union_a_label_from_anywhere_is_left_out(kit, tmp_path):
    table = kit.TABLE | {"labels": kit.TABLE["labels"] | {"stent": "anywhere"}}
    nets = []
    for leave_out in ("gate", "nan"):
        module = kit.make_lit(kit.make_net())
        swap = ct.OutsideSwap(table, p=1.0, keep="union", leave_out=leave_out, seed=3)
        trainer = fit(kit, tmp_path, module, swap, max_epochs=2)
        assert trainer.callback_metrics["train/left_out_labels"] == pytest.approx(1 / 3)
        nets.append(module.net)
    kit.same_weights(*nets, atol=1e-6, rtol=1e-5)


def test_a_batch_without_organs_is_told(kit, tmp_path, caplog):
    cases = [{k: v for k, v in case.items() if k != "organs"} for case in kit.make_cases(4)]
    fit(kit, tmp_path, kit.make_lit(kit.make_net()), ct.OutsideSwap(kit.TABLE), cases=cases)
    assert "without the key 'organs'" in caplog.text
