"""evaluate: numbers per case equal the metrics' own, interruptions lose nothing, bad input is named or counted."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import camtrain as ct
from camtrain import InputError, OrganTable
from camtrain.evaluation import MEASURES, evaluate, scoring, set_against
from camtrain.metrics import (
    ClassSensitivity,
    EmptyMapRate,
    EnergyInside,
    LabelAUROC,
    MaskIoU,
    OrganIoU,
    PointingGame,
    RelevanceRank,
    SumToScore,
)

LABELS = ["nodule", "stent", "effusion"]
TABLE = OrganTable(
    organs={"lung": 1, "heart": 2}, labels={"nodule": ["lung"], "stent": ["heart"], "effusion": ["lung", "heart"]}
)
SIZE = (8, 6, 10)


class Net(nn.Module):
    labels = LABELS

    def __init__(self, labels=3, axes=3):
        super().__init__()
        conv, pool = (nn.Conv3d, nn.AvgPool3d) if axes == 3 else (nn.Conv2d, nn.AvgPool2d)
        self.features = nn.Sequential(conv(1, 4, 3, padding=1), nn.ReLU(), pool(2), conv(4, 5, 3, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.LazyLinear(labels))

    def forward(self, image):
        return self.head(self.features(image))


def make_net(labels=3, size=SIZE):
    torch.manual_seed(0)
    net = Net(labels, len(size))
    net(torch.zeros(1, 1, *size))
    if labels != 3:
        net.labels = [f"finding {i}" for i in range(labels)]
    return net.eval()


def make_batches(cases=12, batch=5, size=SIZE, labels=3, seed=1, **more):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(cases, 1, *size, generator=generator)
    label = (torch.rand(cases, labels, generator=generator) < 0.6).float()
    organs = torch.randint(0, 3, (cases, 1, *size), generator=generator)
    ids = [f"c{i}" for i in range(cases)]
    return [
        {
            "image": image[i : i + batch],
            "label": label[i : i + batch],
            "organs": organs[i : i + batch],
            "id": ids[i : i + batch],
            **{key: value[i : i + batch] for key, value in more.items()},
        }
        for i in range(0, cases, batch)
    ]


def ask(model, data, table=TABLE, **options):
    return evaluate(model, data, table, **{"progress": False, "repeats": 100, **options})


def value(found, measure, label="macro", **where):
    mean = found.row(measure, label, **where).mean
    return math.nan if mean is None else mean


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["features.1", "features.4"])
def test_means_equal_the_metrics_on_the_whole_batch(layer):
    model, batches = make_net(), make_batches()
    methods = ["hirescam", "gradcam"]
    val = make_batches(seed=2)
    found = ask(model, {"val": val, "test": batches}, methods=methods, layers=[layer], contrast_labels=None)
    for method in methods:
        frozen = OrganIoU(3)
        for batch in val:
            maps = ct.explain(model, batch["image"], method, layer)
            frozen.update(maps, TABLE.allowed(batch["organs"], maps.shape[2:]), batch["label"])
        metrics = {
            "organ_iou": OrganIoU(3, thresholds=frozen.best_thresholds()),
            "energy_inside": EnergyInside(3),
            "pointing_game": PointingGame(3),
            "mask_iou": MaskIoU(3),
            "relevance_rank": RelevanceRank(3),
            "empty_map_rate": EmptyMapRate(3),
            "class_sensitivity": ClassSensitivity(3),
        }
        agreement = SumToScore(3)
        for batch in batches:
            maps = ct.explain(model, batch["image"], method, layer)
            allowed = TABLE.allowed(batch["organs"], maps.shape[2:])
            for name, metric in metrics.items():
                metric.update(maps, *([allowed] if name != "class_sensitivity" else []), batch["label"])
            some = (batch["label"] == 1).any(dim=1)  # cases without a wanted label have no maps
            agreement.update(maps[some], model(batch["image"]).detach()[some])
        where = {"split": "test", "method": method, "layer": layer}
        for name, metric in metrics.items():
            each = metric.averaged("none")
            for label, expected in zip(LABELS, each.tolist(), strict=True):
                got = value(found, name, label, **where)
                assert got == pytest.approx(expected, abs=1e-6, nan_ok=True), name
            for average in ("macro", "micro"):
                expected = float(metric.averaged(average))
                assert value(found, name, average, **where) == pytest.approx(expected, abs=1e-6, nan_ok=True), name
            assert found.row(name, "micro", **where).n == int(metric.pairs.sum())
        chance = metrics["energy_inside"].chance("none").tolist()
        assert value(found, "energy_inside_chance", "stent", **where) == pytest.approx(chance[1], abs=1e-6)
        tau = agreement.compute()["kendall_tau"]
        assert value(found, "kendall_tau", **where) == pytest.approx(float(tau), abs=1e-6)
        named = dict(zip(LABELS, frozen.best_thresholds().tolist(), strict=True))
        assert found.thresholds[f"{method}@{layer}"] == pytest.approx(named)
    area = LabelAUROC(3)
    for batch in batches:
        area.update(model(batch["image"]).detach(), batch["label"])
    assert value(found, "auroc", split="test") == pytest.approx(float(area.compute()), abs=1e-6)


def test_every_measure_and_every_average_has_rows():
    batches = make_batches(cases=6)
    found = ask(
        make_net(), batches, measures="all", methods=["gradcam"], steps=4, groups={"chest": ["nodule", "stent"]}
    )
    measured = {row.measure.split("/")[0] for row in found.rows}
    # No patient has two scans here, so that rows per patient would be those per case.
    assert measured == set(MEASURES) - {"auroc_per_patient", "auprc_per_patient"}
    assert {row.measure.split("/")[1] for row in found.rows if "/" in row.measure} == {"case", "air", "blur"}
    labels = {row.label for row in found.rows if row.measure == "energy_inside"}
    assert labels == {"macro", "micro", "group:chest", *LABELS}
    pairs = [found.row("energy_inside", label).n for label in ("nodule", "stent")]
    assert found.row("energy_inside", "group:chest").n == sum(pairs)
    for row in found.rows:
        assert row.n > 0
        assert 0 <= row.undefined <= 1
        if row.low is not None:
            assert row.low <= row.high


def test_the_model_is_left_as_it_was():
    model = make_net().train()
    model.features[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    ask(model, make_batches(cases=4), measures="all", steps=3, methods=["hirescam", "relevancecam"])
    drawn = torch.rand(3)
    torch.manual_seed(5)
    torch.testing.assert_close(drawn, torch.rand(3))
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name])


class Counted(Net):
    """Stops the process in the middle, as a user's Ctrl+C does."""

    forwards = 0
    stop_at = math.inf

    def forward(self, image):
        self.forwards += 1
        if self.forwards == self.stop_at:
            raise KeyboardInterrupt
        return super().forward(image)


def _counted():
    model = make_net()
    model.__class__ = Counted
    return model


def test_an_interruption_loses_nothing(tmp_path):
    data = {"val": make_batches(seed=3), "test": make_batches()}
    options = {"measures": ["auroc", "organ_iou", "outside_effect"], "replacements": ["air"], "repeats": 50}
    whole = ask(_counted(), data, **options)
    model = _counted()
    model.stop_at = 40
    with pytest.raises(KeyboardInterrupt):
        ask(model, data, out=tmp_path / "e", **options)
    kept = len((tmp_path / "e" / "cases.jsonl").read_text().splitlines())
    assert 0 < kept < 24
    with (tmp_path / "e" / "cases.jsonl").open("a") as file:
        file.write('{"id": "c7", "split": "val", "pat')  # the process was killed while it wrote
    again = _counted()
    resumed = ask(again, data, out=tmp_path / "e", **options)
    assert resumed.rows == whole.rows
    assert resumed.thresholds == whole.thresholds
    assert any(f"{kept} cases were finished" in note for note in resumed.notes)
    forwards = again.forwards
    third = _counted()
    assert ask(third, data, out=tmp_path / "e", **options).rows == whole.rows
    assert third.forwards < forwards
    assert third.forwards <= 2  # the number of outputs is asked of one image


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"measures": ["auroc"]}, "measures"),
        ({"cases": "fn"}, "cases"),
        ({"layers": ["features.1"]}, "layers"),
        ({"methods": [{"name": "relevancecam", "contrast": "paper"}]}, "methods"),
        ({"model": make_net(labels=3)}, None),
    ],
)
def test_other_settings_are_not_mixed_with_finished_cases(tmp_path, change, says):
    base = {"measures": ["energy_inside"], "methods": ["relevancecam"], "out": tmp_path / "e"}
    ask(make_net(), make_batches(cases=3), **base)
    model = change.pop("model", make_net())
    if says is None:
        with torch.no_grad():
            model.head[1].bias += 1
        says = "model"
    with pytest.raises(InputError, match=f"holds an evaluation with {says} = .*choose another folder"):
        ask(model, make_batches(cases=3), **{**base, **change})


def test_other_data_under_the_same_names_is_refused(tmp_path):
    ask(make_net(), make_batches(cases=3), measures=["auroc"], out=tmp_path)
    for key in ("image", "label", "organs"):
        other = make_batches(cases=3)
        other[0][key][1] = 1 - other[0][key][1]
        with pytest.raises(InputError, match="case 'c1' of test has another image, other organs or labels"):
            ask(make_net(), other, measures=["auroc"], out=tmp_path)


def test_a_split_can_be_added(tmp_path):
    data = {"a": make_batches(cases=3), "b": make_batches(cases=4, seed=9)}
    first = ask(make_net(), data, splits=["a"], out=tmp_path)
    both = ask(make_net(), data, out=tmp_path)
    assert [r for r in both.rows if r.split == "a"] == list(first.rows)
    with pytest.raises(InputError, match="chosen_on"):
        ask(make_net(), {**data, "val": make_batches(cases=3, seed=5)}, out=tmp_path)


def test_a_damaged_line_is_named(tmp_path):
    ask(make_net(), make_batches(cases=3), measures=["auroc"], out=tmp_path)
    lines = (tmp_path / "cases.jsonl").read_text().splitlines()
    (tmp_path / "cases.jsonl").write_text("\n".join([lines[0], "not json", lines[2]]) + "\n")
    with pytest.raises(InputError, match=r"cases.jsonl, line 2, is damaged"):
        ask(make_net(), make_batches(cases=3), measures=["auroc"], out=tmp_path)


def test_frozen_thresholds():
    data = {"test": make_batches()}
    frozen = {"hirescam@features.4": {"nodule": 0.1, "stent": 0.3, "effusion": 0.02}}
    found = ask(make_net(), data, measures=["organ_iou"], layers=["features.4"], thresholds=frozen)
    assert found.thresholds == frozen
    metric = OrganIoU(3, thresholds=[0.1, 0.3, 0.02])
    for batch in data["test"]:
        maps = ct.explain(make_net(), batch["image"])
        metric.update(maps, TABLE.allowed(batch["organs"], maps.shape[2:]), batch["label"])
    assert value(found, "organ_iou") == pytest.approx(float(metric.compute()), abs=1e-6)
    unfrozen = ask(make_net(), data, measures=["organ_iou"])
    assert any("threshold 0.5" in note for note in unfrozen.notes)


@pytest.mark.parametrize(
    ("frozen", "says"),
    [
        ({"a@b": {"nodule": 0.1, "stent": 0.2, "fracture": 0.1}}, "none for effusion and some for fracture"),
        ({"a@b": {"nodule": 0.1, "stent": 0.2}}, "other labels: there are none for effusion"),
        ({"a@b": {"nodule": 1.5, "stent": 0.2, "effusion": 0.1}}, r"in \[0, 1\)"),
        ("nowhere.json", "cannot be read"),
    ],
)
def test_thresholds_of_other_labels_are_refused(frozen, says):
    with pytest.raises(InputError, match=says):
        ask(make_net(), make_batches(), measures=["organ_iou"], thresholds=frozen)


def test_thresholds_without_this_layer_are_refused():
    frozen = {"hirescam@other": dict.fromkeys(LABELS, 0.1)}
    with pytest.raises(InputError, match=r"no thresholds for 'hirescam@features.4'.*hirescam@other"):
        ask(make_net(), make_batches(), measures=["organ_iou"], layers=["features.4"], thresholds=frozen)


@pytest.mark.parametrize("cases", ["all", "positives", "correct", "fn", "fp"])
def test_case_filters_choose_the_pairs(cases):
    model, batches = make_net(), make_batches()
    logits = torch.cat([model(b["image"]).detach() for b in batches])
    truth = torch.cat([b["label"] for b in batches])
    cut = float(logits.sigmoid().median())
    predicted = logits.sigmoid() >= cut
    expected = {
        "all": torch.ones_like(predicted),
        "positives": truth == 1,
        "correct": (truth == 1) & predicted,
        "fn": (truth == 1) & ~predicted,
        "fp": (truth == 0) & predicted,
    }[cases]
    assert 0 < int(expected.sum()) <= 36
    found = ask(model, batches, measures=["energy_inside", "auroc"], cases=cases, cut=cut)
    for column, label in enumerate(LABELS):
        count = int(expected[:, column].sum())
        rows = [r for r in found.rows if r.label == label and r.measure == "energy_inside"]
        assert [r.n for r in rows] == ([count] if count else [])
    assert found.row("auroc", "macro").n == 36


def test_unknown_labels_and_labels_without_positives():
    batches = make_batches()
    for batch in batches:
        batch["label"][:, 1] = 0
        batch["label"][0, 0] = torch.nan
    found = ask(make_net(), batches, measures=["auroc", "energy_inside"])
    assert any("no case has stent" in note for note in found.notes)
    assert found.row("auroc", "stent").mean is None
    assert found.row("auroc", "stent").undefined == 1
    assert not [r for r in found.rows if r.label == "stent" and r.measure == "energy_inside"]
    assert found.row("auroc", "nodule").n == 12 - len(batches)


def test_organs_that_are_missing_or_everywhere_are_counted():
    batches = make_batches(cases=4, batch=4)
    batches[0]["label"][:] = 1
    batches[0]["organs"][0] = 0  # not segmented
    batches[0]["organs"][1] = 1  # no heart, and lung everywhere
    found = ask(make_net(), batches, measures=["energy_inside", "pointing_game"])
    assert found.row("energy_inside", "stent").n == 2
    assert found.row("energy_inside", "nodule").n == 3
    text = " ".join(found.notes)
    assert "1 of 4 cases have no organs" in text
    assert "the organs of stent are missing in 1 cases" in text
    assert "the organs of nodule cover the whole image in 1 cases" in text


class Root(nn.Module):
    """Finite logits, but 0 x Inf in the map of an image without any light."""

    labels = ("glow",)

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, image):
        return self.relu(image).flatten(1).mean(dim=1, keepdim=True).sqrt()


def test_maps_with_nan_are_counted():
    batches = [{"image": torch.rand(3, 1, 4, 5), "label": torch.ones(3, 1), "organs": torch.ones(3, 1, 4, 5).long()}]
    batches[0]["image"][1] = 0
    batches[0]["organs"][..., 0] = 0
    table = {"organs": {"lung": 1}, "labels": {"glow": ["lung"]}}
    found = ask(Root(), batches, table, measures=["energy_inside"], layers=["relu"])
    row = found.row("energy_inside", "glow")
    assert (row.n, row.undefined) == (3, pytest.approx(1 / 3))
    assert any("1 maps of hirescam@relu hold NaN or Inf" in note for note in found.notes)


def test_logits_that_are_nan_are_refused():
    model = make_net()
    with torch.no_grad():
        model.head[1].bias[0] = torch.nan
    with pytest.raises(InputError, match="NaN or Inf logits"):
        ask(model, make_batches())


@pytest.mark.parametrize("size", [(9, 7), (8, 6, 10)])
def test_one_label_two_axes_batches_of_one(size):
    table = {"organs": {"lung": 1, "heart": 2}, "labels": {"finding 0": ["lung"]}}
    batches = make_batches(cases=4, batch=1, size=size, labels=1)
    for batch, truth in zip(batches, (1.0, 0.0, 1.0, 0.0), strict=True):
        batch["label"][:] = truth
    found = ask(make_net(1, size), batches, table, measures="all", steps=3)
    assert found.row("energy_inside", "finding 0").n == 2
    assert found.row("class_sensitivity", "finding 0").undefined == 1  # there is no other label
    assert found.row("shortcut_reliance/air", "finding 0").n == 4


def test_labels_in_chunks_give_the_same_numbers(monkeypatch):
    model, batches = make_net(), make_batches(cases=5)
    measures = ["organ_iou", "energy_inside", "sum_to_score_l1", "bias_share", "kendall_tau", "class_sensitivity"]
    whole = ask(model, batches, measures=measures, cases="all", layers=["features.1", "features.4"])
    monkeypatch.setattr(scoring, "MAP_BYTES", 1)
    parts = ask(model, batches, measures=measures, cases="all", layers=["features.1", "features.4"])
    for one, other in zip(parts.rows, whole.rows, strict=True):
        assert (one.measure, one.label, one.n, one.undefined) == (other.measure, other.label, other.n, other.undefined)
        assert one.mean == pytest.approx(other.mean, abs=1e-9)


def test_scores_at_the_resolution_of_the_image():
    model, batches = make_net(), make_batches(cases=6)
    found = ask(model, batches, at="image", measures=["energy_inside", "sum_to_score_l1"])
    metric = EnergyInside(3)
    for batch in batches:
        maps = ct.explain(model, batch["image"], size="image")
        metric.update(maps, TABLE.allowed(batch["organs"]), batch["label"])
    assert value(found, "energy_inside") == pytest.approx(float(metric.compute()), abs=1e-6)
    assert found.measures == ["energy_inside"]
    assert any("lose their sums" in note for note in found.notes)


def test_patients_are_what_is_drawn():
    patients = ["p", "p", "p", "q", "q", "q", "r", "r", "r", "", "", ""]
    batches = make_batches(patient=patients)
    found = ask(make_net(), batches, measures=["energy_inside"], repeats=400)
    apart = ask(make_net(), make_batches(), measures=["energy_inside"], repeats=400)
    assert [r.patient for r in found.records["test"]][:4] == ["p", "p", "p", "q"]
    assert found.records["test"][-1].patient is None
    assert value(found, "energy_inside") == value(apart, "energy_inside")
    assert found.row("energy_inside").low != apart.row("energy_inside").low


def test_repeated_cases_count_once():
    batches = make_batches()
    found = ask(make_net(), [*batches, batches[0]], measures=["auroc", "energy_inside"])
    once = ask(make_net(), batches, measures=["auroc", "energy_inside"])
    assert found.rows == once.rows
    assert any("5 cases came twice" in note for note in found.notes)


def test_the_replacement_of_the_training_cannot_judge():
    found = ask(make_net(), make_batches(cases=4), measures="reliance", trained_with=["case"])
    assert {r.measure.split("/")[1] for r in found.rows} == {"air", "blur"}
    assert any("case" in note for note in found.notes)


def test_no_table_measures_what_needs_none():
    found = ask(make_net(), make_batches(cases=4), None)
    measured = {r.measure for r in found.rows}
    assert {"auroc", "sum_to_score_l1", "class_sensitivity"} <= measured
    assert "energy_inside" not in measured
    assert any("no organ table" in note for note in found.notes)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"measures": ["energy_insid"]}, "nearest: energy_inside"),
        ({"measures": []}, "at least one measure"),
        ({"cases": "positive"}, "nearest: positives"),
        ({"methods": ["hirecam"]}, "nearest: hirescam"),
        ({"layers": ["features.9"]}, "features.9"),
        ({"splits": ["tset"]}, "nearest: test"),
        ({"names": ["a", "b"]}, "2 label names, but the network gives 3"),
        ({"names": ["a", "b", "c"]}, "names the labels a, b, c; the model names"),
        ({"groups": {"x": ["nodul"]}}, "nearest: nodule"),
        ({"replacements": ["water"], "measures": "reliance"}, "water"),
        ({"level": 95}, "between 0 and 1"),
        ({"table": {"organs": {"lung": 1}, "labels": {"nodule": ["lung"]}}}, "'stent' has no rule"),
        ({"data": torch.zeros(1)}, "got Tensor"),
        ({"data": []}, "has no case"),
        ({"data": [{"image": torch.rand(1, 1, *SIZE)}]}, "no key 'label'"),
    ],
)
def test_wrong_arguments_are_named(options, says):
    options = dict(options)
    data, table = options.pop("data", make_batches(cases=2)), options.pop("table", TABLE)
    with pytest.raises(InputError, match=says):
        ask(make_net(), data, table, **options)


def test_a_model_against_itself_and_against_another():
    data = {"test": make_batches()}
    first, again = (ask(make_net(), data, measures=["auroc", "energy_inside"], repeats=200) for _ in range(2))
    same = set_against(first, again)
    assert {row.measure for row in same.rows} == {"auroc", "energy_inside"}
    assert all(row.difference == 0 and row.p == 1 for row in same.rows)
    better = make_net()
    truth = torch.cat([b["label"] for b in data["test"]])
    images = torch.cat([b["image"] for b in data["test"]])
    with torch.no_grad():  # learns the truth of these very cases
        features = better.features(images).flatten(1).double()
        better.head[1].weight.copy_((torch.linalg.pinv(features) @ (truth - 0.5).double()).T)
        better.head[1].bias.zero_()
    second = ask(better, data, measures=["auroc", "energy_inside"], repeats=200)
    rows = {(r.measure, r.label): r for r in set_against(first, second).rows}
    row = rows["auroc", "macro"]
    assert row.mean_b == 1
    assert row.difference == pytest.approx(1 - value(first, "auroc"))
    assert row.p < 0.05
    assert row.low > 0


def test_models_of_other_labels_cannot_be_compared():
    table = {"organs": {"lung": 1}, "labels": {f"finding {i}": ["lung"] for i in range(2)}}
    first = ask(make_net(), make_batches(cases=3), measures=["auroc"])
    second = ask(make_net(2), make_batches(cases=3, labels=2), table, measures=["auroc"])
    with pytest.raises(InputError, match="only the first has nodule, stent, effusion; only the second has finding 0"):
        set_against(first, second)


def test_cases_of_one_evaluation_only_are_counted():
    first = ask(make_net(), {"test": make_batches(cases=9)}, measures=["energy_inside"], layers=["features.4"])
    second = ask(make_net(), {"test": make_batches(cases=12)}, measures=["energy_inside"], layers=["features.1"])
    found = set_against(first, second)
    assert any("0 cases that only the first evaluation has, and 3" in note for note in found.notes)
    assert {row.layer for row in found.rows} == {"features.4 | features.1"}


def test_records_are_plain_json(tmp_path):
    found = ask(make_net(), make_batches(cases=3), measures="all", steps=3, out=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [r.id for r in found.records["test"]]
    assert json.loads((tmp_path / "settings.json").read_text())["labels"] == LABELS
