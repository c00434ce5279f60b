"""evaluate, by hand: every measure that changes the image, and every option, on a network whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import camtrain as ct
from camtrain import InputError, OrganTable
from camtrain.evaluation import evaluate, set_against
from camtrain.metrics import OrganIoU, PointingGame

SIZE = (4, 6)
TABLE = {"organs": {"left": 1, "right": 2}, "labels": {"a": ["left"], "b": ["right"]}}


class Weighted(nn.Module):
    """Logit l = sum of relu(image) times weight l: every effect of a change can be written down."""

    labels = ("a", "b")

    def __init__(self, weight):
        super().__init__()
        self.relu = nn.ReLU()
        self.register_buffer("weight", weight)

    def forward(self, image):
        return torch.einsum("bcxy,lxy->bl", self.relu(image), self.weight)


def make_cases(count=6, seed=0, value=1.0):
    generator = torch.Generator().manual_seed(seed)
    organs = torch.zeros(1, *SIZE, dtype=torch.long)
    organs[..., :2] = 1
    organs[..., 4:] = 2
    return [
        {
            "image": value * torch.rand(1, *SIZE, generator=generator),
            "label": torch.tensor([float(i % 2), float(i % 3 == 0)]),
            "organs": organs,
            "id": f"c{i}",
        }
        for i in range(count)
    ]


def make_model(seed=1):
    return Weighted(torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(seed)))


def ask(model, cases, **options):
    data = options.pop("data", DataLoader(cases, batch_size=2))
    return evaluate(model, data, TABLE, **{"progress": False, "repeats": 50, **options})


def p_of(model, image):
    return model(image[None]).sigmoid()[0].tolist()


def soft(region):
    """What is kept is kept wholly; the other side fades in over one voxel beyond it."""
    kept = region.astype(float)
    grown = np.zeros_like(kept)
    for i, j in np.ndindex(*region.shape):
        near = region[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
        grown[i, j] = 1.0 if region[i, j] else 0.5 * near.any()
    return torch.from_numpy(grown).float()


@pytest.mark.parametrize("air", [None, -0.5])
def test_reliance_with_air_by_hand(air):
    model, cases = make_model(), make_cases()
    found = ask(model, cases, measures="reliance", replacements=["air"], air=air)
    changed, after = ({"outside": [[], []], "inside": [[], []]} for _ in range(2))
    for case in cases:
        before = p_of(model, case["image"])
        for column, organ in enumerate((1, 2)):
            region = (case["organs"][0] == organ).numpy()
            for side, kept in (("outside", soft(region)), ("inside", soft(~region))):
                image = case["image"] * kept + (air or 0.0) * (1 - kept)
                changed[side][column].append(abs(p_of(model, image)[column] - before[column]))
                after[side][column].append(p_of(model, image)[column])
    for column, label in enumerate("ab"):
        truth = np.array([case["label"][column] for case in cases])
        effect = {
            side: np.mean([np.array(each[column])[truth == t].mean() for t in (0, 1)]) for side, each in changed.items()
        }
        assert found.row("outside_effect/air", label).mean == pytest.approx(effect["outside"], abs=1e-6)
        assert found.row("inside_effect/air", label).mean == pytest.approx(effect["inside"], abs=1e-6)
        share = effect["outside"] / (effect["outside"] + effect["inside"])
        assert found.row("shortcut_reliance/air", label).mean == pytest.approx(share, abs=1e-6)
        rest = np.array(after["outside"][column])
        wins = [(a > b) + 0.5 * (a == b) for a in rest[truth == 1] for b in rest[truth == 0]]
        assert found.row("auroc_outside_replaced/air", label).mean == pytest.approx(np.mean(wins), abs=1e-6)
        risk = (share + 1 - np.mean(wins)) / 2
        assert found.row("shortcut_risk/air", label).mean == pytest.approx(risk, abs=1e-6)


def test_three_networks_are_told_apart():
    weight = torch.zeros(2, *SIZE)
    marker, honest, constant = weight.clone(), weight.clone(), weight.clone()
    marker[:, 0, 3] = 8.0  # between the organs, two voxels from either
    honest[0, 1, 0], honest[1, 1, 5] = 8.0, 8.0  # deep inside
    cases = make_cases(8)
    for case in cases:
        case["image"][0, 0, 3] = case["image"][0, 1, 0] = float(case["label"][0])
        case["image"][0, 1, 5] = float(case["label"][1])
    share = "shortcut_reliance/air"
    flagged = ask(Weighted(marker), cases, measures="reliance").row(share, "a")
    assert flagged.mean > 0.9
    for label in "ab":
        assert ask(Weighted(honest), cases, measures="reliance").row(share, label).mean < 0.1
        nothing = ask(Weighted(constant), cases, measures="reliance").row(share, label)
        assert nothing.mean is None
        assert nothing.undefined == 1
    assert ask(Weighted(constant), cases, measures="reliance").row(share, "macro").undefined == 1


def test_donors_have_the_opposite_truth():
    cases = make_cases(4)
    for i, case in enumerate(cases):
        case["image"][:] = 0.2 if i % 2 else 0.8  # of label a
    inside = torch.zeros(2, *SIZE)
    inside[0, 1, 0] = 4.0
    found = ask(Weighted(inside), cases, measures="reliance", replacements=["case"])
    change = abs(1 / (1 + math.exp(-4 * 0.8)) - 1 / (1 + math.exp(-4 * 0.2)))
    assert found.row("inside_effect/case", "a").mean == pytest.approx(change, abs=2e-3)


def test_cases_of_one_patient_lend_each_other_nothing():
    cases = make_cases(4)
    for case in cases:
        case["patient"] = "p"
    found = ask(make_model(), cases, measures="reliance")
    row = found.row("shortcut_reliance/case", "a")
    assert (row.mean, row.undefined, row.n) == (None, 1.0, 4)
    assert found.row("outside_effect/case", "a").undefined == 1
    assert any("4 cases found no other case" in note for note in found.notes)
    assert found.row("shortcut_reliance/air", "a").undefined == 0


def test_average_drop_and_curves_by_hand():
    model, cases = make_model(), make_cases()
    measures = ["average_drop", "average_increase", "insertion_auc", "deletion_auc"]
    found = ask(model, cases, measures=measures, cut=0.0, steps=4, baseline=0.25, layers=["relu"])
    for column, label in enumerate("ab"):
        drops, rises, insertions, deletions = [], [], [], []
        for case in cases:
            if case["label"][column] != 1:
                continue
            image = case["image"]
            cells = (image[0] * model.weight[column]).numpy()  # HiResCAM, on the grid of the image
            p = p_of(model, image)[column]
            mask = np.maximum(cells, 0)
            mask = torch.from_numpy((mask - mask.min()) / (mask.max() - mask.min()))
            o = p_of(model, 0.25 + mask * (image - 0.25))[column]
            drops.append(max(0.0, p - o) / p)
            rises.append(float(p < o))
            order = np.argsort(-cells, axis=None)
            curve = {"in": [], "out": []}
            for step in range(5):
                shown = np.zeros(cells.size, dtype=bool)
                shown[order[: round(cells.size * step / 4)]] = True
                there = torch.from_numpy(shown.reshape(SIZE))
                curve["in"].append(p_of(model, torch.where(there, image, 0.25))[column])
                curve["out"].append(p_of(model, torch.where(there, 0.25, image))[column])
            insertions.append(np.trapezoid(curve["in"], dx=0.25))
            deletions.append(np.trapezoid(curve["out"], dx=0.25))
        for name, values in zip(measures, (drops, rises, insertions, deletions), strict=True):
            assert found.row(name, label).mean == pytest.approx(np.mean(values), abs=1e-5), name


def test_predicted_means_what_cut_says():
    model, cases = make_model(), make_cases()
    strict = ask(model, cases, measures=["average_drop"], cut=0.99).row("average_drop", "macro")
    assert strict.undefined == 1
    assert ask(model, cases, measures=["average_drop"], cut=0.0).row("average_drop", "macro").undefined == 0


def test_options_reach_the_scores():
    model, cases = make_model(), make_cases(12)
    for case in cases:
        case["affine"] = torch.diag(torch.tensor([2.0, 3.0, 1.0]))
    images = torch.stack([c["image"] for c in cases])
    truth = torch.stack([c["label"] for c in cases])
    allowed = OrganTable.load(TABLE).allowed(torch.stack([c["organs"] for c in cases]), SIZE)
    maps = ct.explain(model, images, layer="relu")
    near = PointingGame(2, tolerance_mm=3.2)
    near.update(maps, allowed, truth, spacing=(2.0, 3.0))
    exact = PointingGame(2)
    exact.update(maps, allowed, truth)
    assert float(near.compute()) != float(exact.compute())
    found = ask(model, cases, measures=["pointing_game"], tolerance_mm=3.2, layers=["relu"])
    assert found.row("pointing_game").mean == pytest.approx(float(near.compute()))
    for authors in (True, False):
        frozen = {"hirescam@relu": {"a": 0.9, "b": 0.9}}
        metric = OrganIoU(2, thresholds=0.9, authors_edge_case=authors)
        metric.update(maps, allowed, truth)
        asked = ask(model, cases, measures=["organ_iou"], authors_edge_case=authors, thresholds=frozen, layers=["relu"])
        assert asked.row("organ_iou").mean == pytest.approx(float(metric.compute()))


def test_rules_in_mm_use_the_affine():
    cases = make_cases()
    for case in cases:
        case["affine"] = torch.diag(torch.tensor([10.0, 1.0, 1.0]))
    table = {**TABLE, "labels": {"a": {"organs": ["left"], "dilate_mm": 1.5}, "b": ["right"]}}
    found = evaluate(make_model(), [_batch(cases)], table, measures=["energy_inside_chance"], progress=False)
    assert found.row("energy_inside_chance", "a").mean == pytest.approx(3 / 6)  # one column more, and no row
    found = evaluate(make_model(), [_batch(cases)], table, measures="reliance", progress=False, repeats=20)
    assert found.row("outside_effect/air", "a").n == 6


def _batch(cases):
    return torch.utils.data.default_collate(cases)


def test_thresholds_come_from_val_alone():
    model = make_model()
    val, test = make_cases(6, seed=3), make_cases(6, seed=4)
    found = ask(model, None, data={"val": [_batch(val)], "test": [_batch(test)]}, layers=["relu"])
    metric = OrganIoU(2)
    for cases in (val,):
        batch = _batch(cases)
        allowed = OrganTable.load(TABLE).allowed(batch["organs"], SIZE)
        metric.update(ct.explain(model, batch["image"], layer="relu"), allowed, batch["label"])
    assert list(found.thresholds["hirescam@relu"].values()) == pytest.approx(metric.best_thresholds().tolist())


def test_labels_without_a_scored_pair_on_val_are_named():
    val = make_cases(4, seed=3)
    for case in val:
        case["label"][1] = 0
    found = ask(make_model(), None, data={"val": [_batch(val)], "test": [_batch(make_cases())]})
    assert any("for b are the default 0.5" in note for note in found.notes)


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_with_persistent_workers_give_all_their_cases(workers):
    cases = make_cases(7)
    loader = DataLoader(cases, batch_size=2, num_workers=workers, persistent_workers=workers > 0)
    found = ask(make_model(), None, data=loader, measures=["auroc", "outside_effect"])
    assert [r.id for r in found.records["test"]] == [c["id"] for c in cases]
    again = ask(make_model(), None, data=DataLoader(cases, batch_size=2), measures=["auroc", "outside_effect"])
    assert found.rows == again.rows


def test_data_that_can_be_read_once():
    batches = (_batch(make_cases()) for _ in range(1))
    with pytest.raises(InputError, match="can be read once only"):
        ask(make_model(), None, data=batches, measures="reliance")
    batches = (_batch(make_cases()) for _ in range(1))
    found = ask(make_model(), None, data=batches, measures="reliance", replacements=["air"])
    assert found.row("outside_effect/air", "a").n == 6


def test_a_loader_that_drops_cases_is_noticed():
    found = ask(make_model(), None, data=DataLoader(make_cases(5), batch_size=2, drop_last=True), measures=["auroc"])
    assert any("gave 4 of the 5 cases" in note for note in found.notes)


def test_cases_that_are_gone_do_not_count(tmp_path):
    ask(make_model(), make_cases(6), measures=["auroc"], out=tmp_path)
    less = ask(make_model(), make_cases(4), measures=["auroc"], out=tmp_path)
    assert less.rows == ask(make_model(), make_cases(4), measures=["auroc"]).rows
    assert any("2 finished cases are not in the data any more" in note for note in less.notes)


@pytest.mark.parametrize(
    "change",
    [{"logits": lambda y: -y}, {"keys": {"image": "image"}}, {"adapter": dict}, {"reshape": lambda a: a.flip(2)}],
)
def test_callables_are_part_of_the_settings(tmp_path, change):
    ask(make_model(), make_cases(), measures=["auroc"], out=tmp_path)
    (name,) = change
    with pytest.raises(InputError, match=f"an evaluation with {name} = "):
        ask(make_model(), make_cases(), measures=["auroc"], out=tmp_path, **change)


def test_another_network_with_the_same_weights_is_refused(tmp_path):
    class Squared(Weighted):
        def forward(self, image):
            return super().forward(image**2)

    class Doubled(Weighted):
        def forward(self, image):
            return 2 * super().forward(image)

    Doubled.__name__ = Squared.__name__
    ask(Squared(make_model().weight), make_cases(), measures=["auroc"], out=tmp_path)
    with pytest.raises(InputError, match="gives other logits for case 'c0'"):
        ask(Doubled(make_model().weight), make_cases(), measures=["auroc"], out=tmp_path)


def test_unknown_patients_are_no_patient():
    cases = make_cases()
    for case, name in zip(cases, [math.nan, "", "p", "p", math.nan, "q"], strict=True):
        case["who"] = name
    batches = [{**{k: v for k, v in _batch([c]).items() if k != "who"}, "who": [c["who"]]} for c in cases]
    found = ask(make_model(), None, data=batches, measures=["auroc"], keys={"patient": "who"})
    assert [r.patient for r in found.records["test"]] == [None, None, "p", "p", None, "q"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_in_other_precisions(dtype):
    found = ask(make_model().to(dtype), make_cases(), measures="all", steps=3, methods=["hirescam", "gradcam"])
    single = ask(make_model(), make_cases(), measures="all", steps=3, methods=["hirescam", "gradcam"])
    assert found.row("energy_inside", method="hirescam").mean == pytest.approx(
        single.row("energy_inside", method="hirescam").mean, abs=2e-2
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"repeats": 0}, "repeats= expects a whole number from 20"),
        ({"limit": 0}, "limit="),
        ({"contrast_labels": -1}, "contrast_labels="),
        ({"cut": 7}, "cut= expects a probability"),
        ({"at": "img"}, "nearest: image"),
        ({"methods": ["hirescam", "hirescam"]}, "lists 'hirescam' twice"),
        ({"measures": ["kendall_tau"], "at": "image"}, "compare sums of maps"),
        ({"measures": "reliance", "trained_with": ["csae"]}, "nearest: case"),
    ],
)
def test_nonsense_is_refused_before_anything_is_computed(options, says):
    model = make_model()
    model.forward = None  # would fail if it were called
    with pytest.raises(InputError, match=says):
        ask(model, make_cases(), **options)


def test_groups_of_areas_are_compared_too():
    first, second = (
        ask(make_model(seed), make_cases(), measures=["auroc"], groups={"both": ["a", "b"]}) for seed in (1, 2)
    )
    rows = {(r.label, r.measure): r for r in set_against(first, second).rows}
    row = rows["group:both", "auroc"]
    assert row.mean_a == pytest.approx(first.row("auroc", "group:both").mean)
    assert row.mean_b == pytest.approx(second.row("auroc", "macro").mean)
