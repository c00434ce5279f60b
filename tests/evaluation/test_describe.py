"""Descriptions: sums by hand on small nets, the sum rule on real ones, the sentences, and what is refused."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import camtrain as ct
from camtrain.anatomy import OrganTable
from camtrain.cam.account import account
from camtrain.data import PhantomDataModule
from camtrain.evaluation import BANDS, ChannelNames, Concepts, Description, describe, organ_account
from camtrain.models import AxialNet, FlattenNet

TABLE = {
    "organs": {"lung": [1, 2], "heart": 3, "spine": 7},
    "labels": {"nodule": ["lung"], "stent": ["heart"]},
}


def by_hand():
    """A 1-convolution that copies the image, ReLU, and a head with one weight per cell: cells = weight x image."""
    model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        model[0].weight.fill_(1), model[0].bias.fill_(0)
        model[3].weight.copy_(torch.tensor([[1.0, 2, 3, 4, 5, 6], [-1, 1, -1, 1, -1, 1]]))
        model[3].bias.copy_(torch.tensor([0.5, -0.25]))
    batch = {
        "image": torch.tensor([[[1.0, 1, 1, 0, 1, 1]], [[0, 1, 0, 1, 0, 0]]], dtype=torch.float64),
        "organs": torch.tensor([[[1, 2, 3, 3, 9, 0]], [[0, 0, 0, 7, 7, 7]]]),
        "id": ["anna", "bert"],
    }
    return model, batch


def test_sums_are_those_by_hand():
    model, batch = by_hand()
    found = organ_account(account(model, batch["image"], "1"), batch["organs"], TABLE)
    assert found.names == ("lung", "heart", "spine", "no organ")
    # Image x weight: case 0 lung cells 1 and 2, heart 3 and 4, unknown id 9 and background 0 are no organ.
    expected = [[[3, 3, 0, 11], [0, -1, 0, 0]], [[0, 0, 4, 2], [0, 0, 1, 1]]]
    assert found.sums.tolist() == expected
    assert found.bias.tolist() == [[0.5, -0.25]] * 2
    assert found.valid
    torch.testing.assert_close(found.sums.sum(dim=2) + found.bias + found.residual, found.logits)


def test_a_cell_on_a_border_counts_for_each_organ_by_its_share():
    model = nn.Sequential(nn.AvgPool1d(3, 3), nn.Flatten(), nn.Linear(2, 1, bias=False))
    model[2].weight.data.fill_(1)
    found = organ_account(account(model, torch.ones(1, 1, 6), "0"), torch.tensor([[[1, 3, 3, 0, 0, 2]]]), TABLE)
    assert found.sums[0, 0].tolist() == pytest.approx([2 / 3, 2 / 3, 0, 2 / 3])


def test_one_case_in_words():
    model, batch = by_hand()
    found = describe(model, batch, TABLE, "1", labels=["nodule"])
    assert [(d.case, d.label) for d in found] == [("anna", "nodule"), ("bert", "nodule")]
    anna, bert = found
    assert list(anna.by_organ.items()) == [("no organ", 11), ("lung", 3), ("heart", 3), ("spine", 0)]
    assert list(bert.by_organ) == ["spine", "no organ", "lung", "heart"]
    assert (anna.logit, anna.bias, anna.valid, anna.why) == (17.5, 0.5, True, ())
    assert anna.bias_share == pytest.approx(0.5 / 17.5)
    assert anna.probability == pytest.approx(1 / (1 + math.exp(-17.5)))
    assert str(anna) == (
        "anna: nodule 1.00 (logit +17.50): +11 cells in no organ, +3 lung, +3 heart, 3 % bias (+0.5). "
        "An account of cells at '1': a cell may have seen more than the organ it lies in."
    )
    assert anna.channels == ()
    assert anna.spread == {}


def test_which_labels_are_told():
    model, batch = by_hand()

    def told(**more):
        return [(d.case, d.label) for d in describe(model, batch | more, TABLE, "1")]

    # Logits: nodule 17.5 and 6.5; stent -1.25 and 1.75.
    assert told() == [("anna", "nodule"), ("bert", "nodule"), ("bert", "stent")]
    assert told(label=torch.tensor([[0.0, 1.0], [torch.nan, 1.0]])) == [("anna", "stent"), ("bert", "stent")]
    # Nothing present: the likeliest, so that every case is told.
    assert told(label=torch.zeros(2, 2)) == [("anna", "nodule"), ("bert", "nodule")]
    model[3].bias.data -= 100
    assert told() == [("anna", "nodule"), ("bert", "nodule")]
    assert told(label=torch.tensor([1, 0])) == [("anna", "stent"), ("bert", "nodule")]  # class indices


def test_labels_are_read_as_explain_reads_them():
    model, batch = by_hand()

    def told(labels):
        return sorted({d.label for d in describe(model, batch, TABLE, "1", labels=labels)})

    for mask in ([False, True], torch.tensor([False, True]), np.array([False, True]), [np.False_, np.True_]):
        assert told(mask) == ["stent"]
    assert told([True, True]) == ["nodule", "stent"]
    assert told([False, False]) == told([]) == []
    for one in ("stent", 1, np.int64(1), torch.tensor(1), [torch.tensor(1)], torch.tensor([1])):
        assert told(one) == ["stent"]
    (mean,) = describe(model, [batch | {"label": torch.ones(2, 2)}], TABLE, "1", labels="stent", progress=False)
    assert (mean.label, mean.n) == ("stent", 2)
    for wrong, words in (
        ([True], "one bool for each of the 2 labels"),
        ([True, 1], "one bool for each of the 2 labels"),
        (torch.ones(2, 2) == 1, "expects columns, names or a bool mask"),
        (0.5, "expects columns, names or a bool mask"),
        (True, "expects columns, names or a bool mask"),
        ({0, 1}, "expects columns, names or a bool mask"),
        ([0.5], "expects columns, names or a bool mask"),
        ("stend", "labels= names 'stend', which is none of the labels; nearest: stent"),
    ):
        with pytest.raises(ct.InputError, match=words):
            told(wrong)


def test_signed_parts_and_bias_of_the_sentence_add_up_to_the_logit():
    model, batch = by_hand()
    model[3].bias.data.copy_(torch.tensor([-7.0, 0.0]))
    text = str(describe(model, batch, TABLE, "1", labels=[0])[0])
    assert "29 % bias (-7)." in text
    logit, *parts = (float(number) for number in re.findall(r"[+-][\d.]+", text))
    assert sum(parts) == pytest.approx(logit)


def test_names_come_from_the_user_the_model_or_the_table():
    model, batch = by_hand()
    assert describe(model, batch, TABLE, "1", names=["a", "b"], labels=[1])[0].label == "b"
    assert describe(model, batch, TABLE, "1", labels=[1])[0].label == "stent"
    assert describe(model, batch, window=(0, 1), layer="1", labels=[1])[0].label == "label 1"
    model.labels = ["c", "d"]
    assert describe(model, batch, TABLE, "1", labels=["d"])[0].label == "d"
    other = TABLE | {"labels": {"only": ["heart"]}}
    del model.labels
    assert describe(model, batch, other, "1", labels=[1])[0].label == "label 1"


def test_without_a_table_parts_are_bands_of_hu():
    model, batch = by_hand()
    batch["image"] = torch.tensor([[[0.0, 0.2, 0.51, 0.6, 0.9, 0.4]]], dtype=torch.float64)
    (found,) = describe(model, {"image": batch["image"]}, window=(-1000, 800), layer="1", labels=[0])
    # -1000 air, -640 lung, -82 fat, 80 soft tissue, 620 bone, -280 none.
    cells = batch["image"][0, 0] * torch.arange(1, 7)
    expected = dict(zip(["air", "aerated lung", "fat", "soft tissue", "bone", "no band"], cells.tolist(), strict=True))
    assert dict(found.by_organ) == pytest.approx(expected)
    assert found.case == "case 0"


def test_bands_at_the_ends_of_a_window_are_only_what_is_sure():
    image = torch.tensor([[[0.0, 0.5, 1.0]]])
    narrow = Concepts(window=(-160, 240))
    assert narrow.shares(image, None, (3,)).argmax(dim=1)[0, 1:].tolist() == [3, 4]  # 40 soft tissue, 240 and more bone
    assert narrow.part_shares(image, None, (3,))[0, -1].tolist() == [1, 0, 0]  # -160 and less may be anything
    shifted = Concepts(window=lambda image: 1000 * image - 160)
    assert shifted.shares(image, None, (3,)).argmax(dim=1).tolist() == [[0, 4, 4]]
    assert set(BANDS) == {"air", "aerated lung", "fat", "soft tissue", "bone"}
    mine = Concepts(window=(0, 1000), bands={"low": (0, 500), "high": (500, 1001)})
    assert mine.shares(image, None, (3,))[0].tolist() == [[0, 0, 0], [0, 1, 0]]


def test_an_organ_and_a_band_may_share_a_name():
    table = {"organs": {"bone": 1}, "labels": {"fracture": "anywhere"}}
    assert Concepts(table, window=(-1000, 800)).names[-1] == "bone (HU)"


@pytest.mark.parametrize("net", [
    lambda: AxialNet(labels=3, variant="small", image_size=(30, 24), slice_axis=2),
    lambda: FlattenNet(labels=3, size=(30, 24, 18)),
], ids=["axial", "flatten"])  # fmt: skip
def test_parts_bias_and_residual_add_up_to_the_logit(net):
    torch.manual_seed(0)
    model = net()
    batch = {"image": torch.rand(2, 1, 30, 24, 18), "organs": torch.randint(0, 9, (2, 1, 30, 24, 18))}
    logits = model.eval()(batch["image"]).detach()
    for found in describe(model, batch, "phantom", labels=[0, 1, 2]):
        case, label = int(found.case[-1]), int(found.label[-1])
        assert found.valid
        assert sum(found.by_organ.values()) + found.bias == pytest.approx(found.logit, abs=1e-5)
        assert found.logit == pytest.approx(float(logits[case, label]), abs=1e-6)
        assert abs(found.residual) < 1e-5


def test_an_account_that_does_not_hold_says_so():
    _, batch = by_hand()
    model = nn.Sequential(nn.Conv1d(1, 3, 1), nn.InstanceNorm1d(3), nn.Flatten(), nn.Linear(18, 2))
    batch["image"] = torch.rand(2, 1, 6)
    found = describe(model, batch, TABLE, "0", labels=["stent"])[0]
    assert not found.valid
    assert abs(sum(found.by_organ.values())) < 1e-3
    assert "Not an account of the logit" in str(found)
    assert "sum is 0 whatever the logit is" in str(found)
    # What saturates in one case says nothing about the other.
    model = nn.Sequential(nn.Conv1d(1, 3, 1), nn.ReLU6(), nn.Flatten(), nn.Linear(18, 2))
    batch["image"][1] *= 1000
    one, other = describe(model, batch, TABLE, "0", labels=["stent"])
    assert (one.valid, one.why) == (True, ())
    assert not other.valid
    assert "Not an account" not in str(one)


def test_a_case_without_organs_is_told_as_a_whole():
    model, batch = by_hand()
    found = describe(model, batch | {"has_organs": torch.tensor([True, False])}, TABLE, "1", labels=[0])
    assert len(found[0].by_organ) == 4
    assert found[1].by_organ == {"a case without organs": 6}


def averaged_by_hand():
    model, batch = by_hand()
    more = {
        "image": torch.tensor([[[0.0, 0, 0, 2, 0, 0]], [[1.0] * 6], [[3.0] * 6]], dtype=torch.float64),
        "organs": torch.tensor([[[3] * 6], [[0] * 6], [[1] * 6]]),
        "has_organs": torch.tensor([True, False, True]),
        "label": torch.tensor([[1.0, 0.0], [1.0, 1.0], [torch.nan, 0.0]]),
    }
    return model, [batch | {"label": torch.tensor([[1.0, 0.0], [0.0, torch.nan]])}, more]


def test_an_average_is_over_the_present_cases_that_are_known():
    model, batches = averaged_by_hand()
    nodule, stent = describe(model, batches, TABLE, "1", progress=False)
    # Nodule is present and known in anna (lung 3, heart 3, no organ 11) and in the third case (heart 8).
    assert (nodule.n, nodule.case) == (2, None)
    assert dict(nodule.by_organ) == {"heart": 5.5, "no organ": 5.5, "lung": 1.5, "spine": 0}
    deviations = {"heart": 5, "no organ": 11, "lung": 3, "spine": 0}
    assert nodule.spread == pytest.approx({name: d / math.sqrt(2) for name, d in deviations.items()})
    assert nodule.logit == (17.5 + 8.5) / 2
    assert nodule.left_out == {"without organs": 1, "unknown": 1}
    assert nodule.valid
    text = "nodule, mean of 2 present cases 1.00 (logit +13.00): +5.5 ± 3.5 cells in heart, +5.5 ± 7.8 no organ"
    assert str(nodule).startswith(text)
    assert "(left out: 1 without organs, 1 unknown)" in str(nodule)
    assert stent.n == 0
    assert stent.by_organ == {}
    assert str(stent).startswith("stent: no present case with known organs to average (left out: 1 without organs")


def test_neuron_importance_with_and_without_the_class():
    model, batches = averaged_by_hand()
    nodule, stent = describe(model, batches, TABLE, "1", progress=False)
    # Behind a linear head the mean gradient is the mean weight, in every case.
    assert nodule.importance.tolist() == [3.5]
    assert nodule.importance_absent.tolist() == [3.5]
    assert stent.importance is None
    assert stent.importance_absent.tolist() == [0]
    below = describe(model, batches, TABLE, "0", progress=False)[0]
    # At the convolution, cells that are 0 have gradient 0: anna has weights 1 2 3 5 6, the third case 4; bert 2 4.
    assert below.importance.tolist() == pytest.approx([(17 + 4) / 12])
    assert below.importance_absent.tolist() == pytest.approx([1.0])
    # The case without organs counts on neither side: absent, it would add the mean weight 3.5.
    batches[1]["label"][1, 0] = 0.0
    (nodule, _) = describe(model, batches, TABLE, "0", progress=False)
    assert nodule.importance_absent.tolist() == pytest.approx([1.0])
    assert nodule.left_out["without organs"] == 0


def test_the_default_layer_is_looked_up_once_also_where_its_module_is_shared():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.act = nn.Conv1d(1, 2, 1), nn.Conv1d(2, 2, 1), nn.ReLU()
            self.head = nn.Linear(12, 2)

        def forward(self, image):
            return self.head(self.act(self.two(self.act(self.one(image)))).flatten(1))

    model, runs = Shared().double(), []
    model.register_forward_hook(lambda *_: runs.append(1))
    _, batches = averaged_by_hand()
    names = ChannelNames.fit(model, batches, TABLE, progress=False)
    assert (names.layer, len(runs)) == ("act", 3)
    found = describe(model, batches, TABLE, channels=names, progress=False)[0]
    assert (found.layer, len(runs), found.valid) == ("act", 6, True)
    assert found.bias == pytest.approx(model.head.bias[0].item())  # the last call: only the head's bias lies behind it


def test_an_average_equals_the_mean_of_the_single_descriptions():
    torch.manual_seed(0)
    data = PhantomDataModule(labels=["nodule", "effusion"], cases=6, size=24, batch_size=4)
    data.setup("fit")
    model = FlattenNet(labels=2, size=24)
    single = [
        d
        for batch in data.train_dataloader()
        for d in describe(model, batch, data.table, labels=["effusion"])
        if batch["label"][batch["id"].index(d.case), 1] == 1
    ]
    (mean,) = describe(model, data.train_dataloader(), data.table, labels=["effusion"], progress=False)
    assert mean.n == len(single) > 0
    for name, value in mean.by_organ.items():
        assert value == pytest.approx(sum(d.by_organ[name] for d in single) / len(single), abs=1e-6)
    assert mean.probability == pytest.approx(sum(d.probability for d in single) / len(single))


def test_the_phantom_in_words(capfd):
    torch.manual_seed(0)
    data = PhantomDataModule(labels=["nodule", "effusion"], cases=4, size=24, batch_size=2)
    data.setup("fit")
    model = FlattenNet(labels=2, size=24)
    channels = ChannelNames.fit(model, data.train_dataloader(), data.table, window=(-1000, 800), least=0.0)
    told = describe(model, next(iter(data.val_dataloader())), data.table, channels=channels)
    assert told
    for text in map(str, told):
        assert re.match(
            r"val-0000\d: (nodule|effusion) 0\.\d\d \(logit [+-]\d\.\d\d\): [+-][\d.e-]+ cells in \w+", text
        )
        assert re.search(
            r", \d+ % bias \([+-][\d.e-]+\)\. An account of cells at 'relu': a cell may have seen more", text
        )
        assert re.search(r"\n(for|against): ch \d+ \(.+, IoU 0\.\d\d\) [+-]", text)
    describe(model, data.train_dataloader(), data.table)
    assert capfd.readouterr().out == ""


class Planted(nn.Module):
    """Channel 0 is lit in the heart, channel 2 in the lung, channel 1 nowhere in particular."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Identity(), nn.Linear(3, 1)
        self.head.weight.data.copy_(torch.tensor([[2.0, 0.5, -1.0]]))

    def forward(self, image):
        maps = torch.cat([image == 3, image > 3, image == 1], dim=1).float()
        return self.head(self.layer(maps).mean(dim=(2, 3)))


def planted_batch():
    organs = torch.zeros(2, 1, 6, 8, dtype=torch.long)
    organs[:, :, :2, :2], organs[:, :, 3:5, 3:] = 3, 1
    return {"image": organs.float(), "organs": organs}


def test_planted_channels_get_their_names_and_their_say():
    model, batch = Planted(), planted_batch()
    names = ChannelNames.fit(model, [batch, batch], TABLE, "layer", progress=False)
    assert names.names == ("heart", None, "lung")
    assert repr(names) == "ChannelNames(layer 'layer', 2 of 3 channels named)"
    found = describe(model, batch, TABLE, "layer", channels=names, labels=[0])[0]
    best, worst = found.channels
    assert (best.index, best.name, best.iou, worst.index, worst.name) == (0, "heart", 1.0, 2, "lung")
    assert best.contribution == pytest.approx(2 * 4 / 48)
    assert worst.contribution == pytest.approx(-10 / 48)
    assert best.importance == pytest.approx(2 / 48)
    assert torch.equal(best.activation, (batch["image"][0, 0] == 3).float())
    assert str(found).splitlines()[1:] == [
        "for: ch 0 (heart, IoU 1.00) +0.17",
        "against: ch 2 (lung, IoU 1.00) -0.21",
    ]
    assert found.by_organ["heart"] == pytest.approx(best.contribution)
    mean = describe(model, [batch | {"label": torch.ones(2, 1)}], TABLE, "layer", channels=names, progress=False)[0]
    assert mean.channels[0].activation is None
    assert mean.channels[0].contribution == pytest.approx(best.contribution)
    assert len(describe(model, batch, TABLE, "layer", channels=names, labels=[0], top=0)[0].channels) == 0


def test_only_segmented_cases_name_channels():
    model, batch = Planted(), planted_batch()
    batch["organs"] = torch.cat([batch["organs"][:1], torch.zeros_like(batch["organs"][:1])])
    assert ChannelNames.fit(model, batch, TABLE, "layer").iou(0) == 1.0
    with pytest.raises(ct.InputError, match="no case to name channels with"):
        ChannelNames.fit(model, batch | {"has_organs": torch.zeros(2, dtype=torch.bool)}, TABLE, "layer")
    with pytest.raises(ct.InputError, match="no case to name channels with"):
        ChannelNames.fit(model, [], TABLE, "layer")


def test_own_keys_and_tuple_batches():
    model, batch = by_hand()
    expected = [str(d) for d in describe(model, batch, TABLE, "1")]
    renamed = {"img": batch["image"], "seg": batch["organs"], "id": batch["id"]}
    assert [str(d) for d in describe(model, renamed, TABLE, "1", keys={"image": "img", "organs": "seg"})] == expected
    pair = (batch["image"], batch["organs"])

    def adapter(pair):
        return {"image": pair[0], "organs": pair[1], "id": batch["id"], "label": torch.ones(2, 2)}

    assert len(describe(model, pair, TABLE, "1", adapter=adapter)) == 4
    assert [d.n for d in describe(model, [pair, pair], TABLE, "1", adapter=adapter, progress=False)] == [4, 4]


def test_bad_input_is_told():
    model, batch = by_hand()
    names = ChannelNames.fit(model, batch, TABLE, "1")
    with pytest.raises(ct.InputError, match=r"pass table= .* or window="):
        describe(model, batch)
    with pytest.raises(ct.InputError, match=r"needs organs .* in the batch"):
        describe(model, {"image": batch["image"]}, TABLE, "1")
    with pytest.raises(ct.InputError, match="'stend', which is none of the labels; nearest: stent"):
        describe(model, batch, TABLE, "1", labels=["stend"])
    with pytest.raises(ct.InputError, match=r"labels= must lie in 0\.\.1, got 2"):
        describe(model, batch, TABLE, "1", labels=[2])
    with pytest.raises(ct.InputError, match="names= has 3 labels but the network gives 2"):
        describe(model, batch, TABLE, "1", names=["a", "b", "c"])
    with pytest.raises(ct.InputError, match="2 outputs but the batch has 3 label columns"):
        describe(model, batch | {"label": torch.ones(2, 3)}, TABLE, "1")
    with pytest.raises(ct.InputError, match="fitted on layer '1' with 1 channels, but the account is of layer '0'"):
        describe(model, batch, TABLE, "0", channels=names)
    with pytest.raises(ct.InputError, match="batches have no label"):
        describe(model, [batch], TABLE, "1", progress=False)
    with pytest.raises(ct.InputError, match="at least one batch"):
        describe(model, [], TABLE, "1", progress=False)
    for wrong in (batch["image"], 3):
        with pytest.raises(ct.InputError, match=r"a batch .* or an iterable of batches"):
            describe(model, wrong, TABLE, "1")
    for several in (["0", "1"], ["1"]):
        with pytest.raises(ct.InputError, match="layer= expects one layer, got a list"):
            describe(model, batch, TABLE, several)
    for top in (-1, 2.5):
        with pytest.raises(ct.InputError, match="top= expects how many channels to tell, 0 or more"):
            describe(model, batch, TABLE, "1", channels=names, top=top)
    nobody = {"image": batch["image"][:0], "organs": batch["organs"][:0]}
    with pytest.raises(ct.InputError, match="batch is empty"):
        describe(model, nobody, TABLE, "1")
    with pytest.raises(ct.InputError, match="batch is empty"):
        describe(model, [nobody | {"label": torch.ones(0, 2)}], TABLE, "1", progress=False)
    with pytest.raises(ct.InputError, match="no image"):
        describe(model, {"organs": batch["organs"]}, TABLE, "1")
    with pytest.raises(ct.InputError, match="those of the batch that was accounted"):
        organ_account(account(model, batch["image"], "1"), batch["organs"][:1], TABLE)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"window": (800, -1000)}, "low < high"),
    ({"window": 3}, "expects .low, high. in HU or a callable"),
    ({"window": (0, math.inf)}, "expects .low, high. in HU or a callable"),
    ({"table": TABLE, "bands": {"a": (0, 1)}}, "bands= are in HU: pass window="),
    ({"window": (0, 1), "bands": {"a": (0, 10), "b": (5, 20)}}, "'a' ends at 10 HU, 'b' begins before"),
    ({"window": (0, 1), "bands": {"a": (10, 10)}}, "low < high"),
])  # fmt: skip
def test_concepts_that_are_none(arguments, message):
    with pytest.raises(ct.InputError, match=message):
        Concepts(**arguments)


def test_image_values_must_fit_the_window():
    with pytest.raises(ct.InputError, match=r"expects an image in 0\.\.1, got values in -3"):
        Concepts(window=(-1000, 800)).shares(torch.full((1, 1, 4), -3.0), None, (2,))
    with pytest.raises(ct.InputError, match="must give HU of shape"):
        Concepts(window=(-1000, 800)).shares(torch.rand(1, 2, 4), None, (2,))


def test_describing_leaves_the_model_and_torch_as_they_were():
    model, batch = by_hand()
    model.train()
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert isinstance(describe(model, batch, OrganTable.load(TABLE), "1")[0], Description)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_the_reasons_of_a_loader_do_not_grow_with_it():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.act, self.fc, self.around = nn.Conv3d(1, 3, 3), nn.ReLU(), nn.Linear(3, 2), nn.Linear(1, 2)

        def forward(self, image):
            features = self.act(self.conv(image)).mean(dim=(2, 3, 4))
            return self.fc(features) + self.around(image.mean(dim=(2, 3, 4)))

    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "image": torch.rand(1, 1, 5, 6, 7, generator=generator),
            "label": torch.ones(1, 2),
            "organs": torch.ones(1, 1, 5, 6, 7, dtype=torch.long),
        }
        for _ in range(6)
    ]
    table = {"organs": {"lung": 1}, "labels": {"a": ["lung"], "b": ["lung"]}}
    for told in ct.describe(Skip().eval(), batches, ct.OrganTable.load(table), layer="act", progress=False):
        assert not told.valid
        assert len(told.why) == 1
