"""OrganTable: allowed cells against a reference that treats every label on its own, rules, shipped tables, messages."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import ndimage

import camtrain.anatomy.organ_table as module
from camtrain import InputError, OrganTable
from camtrain._grid import to_grid
from camtrain.anatomy import spacing_of
from camtrain.anatomy.table_file import shipped_names

ABDOMEN = Path(__file__).parents[2].parent / "shared" / "data" / "ct_abdomen" / "organs.nii.gz"
needs_abdomen = pytest.mark.skipif(not ABDOMEN.exists(), reason="the abdominal CT is not on this machine")

SMALL = {
    "organs": {"lung_left": 1, "lung_right": 2, "heart": 3, "aorta": [4, 5]},
    "groups": {"lungs": ["lung_left", "lung_right"], "chest": ["lungs", "heart"]},
    "labels": {
        "nodule": ["lungs"],
        "fracture": "anywhere",
        "stent": ["heart", "aorta"],
        "mass": ["lung_right", "lung_left"],
        "everything": ["chest", "aorta"],
    },
}
MEMBERS = {"nodule": [[1], [2]], "stent": [[3], [4, 5]], "mass": [[1], [2]], "everything": [[1], [2], [3], [4, 5]]}


def volume(shape, ids=6, batch=3, seed=0):
    return torch.randint(0, ids, (batch, 1, *shape), generator=torch.Generator().manual_seed(seed))


def small(**changes):
    return OrganTable.load({**copy.deepcopy(SMALL), **changes})


@pytest.mark.parametrize("mode", ["fill", "nearest", "trilinear", "any"])
@pytest.mark.parametrize(
    ("shape", "size"), [((12,), (5,)), ((9, 6), (3, 4)), ((8, 7, 9), (2, 7, 4)), ((4, 5, 6), None)]
)
def test_allowed_is_the_union_of_each_organs_cells(shape, size, mode):
    organs = volume(shape)
    allowed = small().allowed(organs, size=size, mode=mode)
    assert allowed.shape == (3, 5, *(size or shape))
    assert allowed.dtype == torch.bool
    for column, label in enumerate(SMALL["labels"]):
        if label == "fracture":
            assert allowed[:, column].all()
            continue
        cells = [to_grid(torch.isin(organs, torch.tensor(ids)), size or shape, mode) for ids in MEMBERS[label]]
        assert torch.equal(allowed[:, column], torch.cat(cells, 1).any(1))


def test_small_organs_keep_their_cells_beside_large_ones():
    organs = torch.zeros(1, 1, 16, dtype=torch.int32)
    organs[..., :8] = 1
    organs[..., 12] = 2  # one voxel of a cell of eight: as part of one region with the other it would vanish
    allowed = small().allowed(organs, size=(2,))
    assert not to_grid(organs > 0, (2,))[0, 0, 1]
    assert allowed[0, 0].tolist() == [True, True]


def test_missing_organs_leave_labels_without_cells():
    allowed = small().allowed(torch.full((2, 1, 4, 4), 3), size=(2, 2))
    assert allowed.flatten(2).any(2).tolist() == [[False, True, True, False, True]] * 2


def test_flips_commute_with_a_rule():
    table = small(labels={"effusion": {"organs": ["lungs"], "hull": True, "minus": ["heart"], "dilate_mm": 3}})
    organs = (volume((9, 8, 7)) * (volume((9, 8, 7), ids=4, seed=1) == 0)).int()
    for axis in (2, 3, 4):
        flipped = table.allowed(organs.flip(axis), size=(3, 3, 2), spacing=(2, 1, 3))
        assert torch.equal(flipped, table.allowed(organs, size=(3, 3, 2), spacing=(2, 1, 3)).flip(axis))


def test_eighty_labels_cost_what_their_organs_cost(monkeypatch):
    seen = []

    def counting(region, size, mode="fill"):
        seen.append(tuple(region.shape))
        return to_grid(region, size, mode)

    monkeypatch.setattr(module, "to_grid", counting)
    organs = volume((16, 16, 16), ids=4, batch=2)
    allowed = OrganTable.load("rad_chestct").allowed(organs, size=(4, 4, 4))
    assert allowed.shape == (2, 80, 4, 4, 4)
    assert sum(shape[1] for shape in seen) == 5  # five organs are brought down, nothing else
    monkeypatch.setattr(module, "AT_ONCE", 1)
    assert torch.equal(OrganTable.load("rad_chestct").allowed(organs, size=(4, 4, 4)), allowed)
    assert seen[1:] == [(2, 1, 16, 16, 16)] * 5  # and one at a time where memory is short


def test_equal_rules_are_shaped_once(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "shape_region", lambda *a, real=module.shape_region: calls.append(a) or real(*a))
    rule = {"organs": ["lungs"], "hull": True}
    same = {"organs": ["lung_left", "lung_right"], "hull": True}
    small(labels={"a": rule, "b": same, "c": ["heart"], "d": rule}).allowed(volume((6, 6)), size=(2, 2))
    assert len(calls) == 3  # one per case


def test_options_act_in_their_order():
    """hull, close_mm, fill, minus, dilate_mm on a hand-made slice with voxels of 1 x 2 mm."""
    organs = np.zeros((40, 30), dtype=np.int64)
    organs[5:25, 5:20] = 1
    organs[8:22, 8:20] = 0  # a bracket: the hull closes it
    organs[10:20, 10:16] = 3
    table = small(labels={"x": {"organs": ["lung_left"], "hull": True, "minus": ["heart"], "dilate_mm": 2}})
    got = table.allowed(torch.from_numpy(organs)[None, None], spacing=(1, 2))[0, 0].numpy()
    expected = np.zeros_like(organs, dtype=bool)
    expected[5:25, 5:20] = True
    expected[10:20, 10:16] = False
    distance = ndimage.distance_transform_edt(~expected, sampling=(1, 2))
    assert np.array_equal(got, distance <= 2)
    assert not got[15, 13]  # minus came after the hull ...
    assert got[11, 13]  # ... and before the dilation


def test_fill_and_close_act_on_the_union():
    organs = np.zeros((12, 12), dtype=np.int64)
    organs[2:9, 2:9] = 1
    organs[2:9, 5] = 2
    organs[4:6, 3:5] = 0
    organs[:, 10] = 3
    table = small(
        labels={
            "filled": {"organs": ["lungs"], "fill": True},
            "closed": {"organs": ["lungs", "heart"], "close_mm": 1.0},
        }
    )
    filled, closed = table.allowed(torch.from_numpy(organs)[None, None], spacing=(1, 1))[0].numpy()
    assert filled[2:9, 2:9].all()
    assert filled.sum() == 49
    assert closed[4:7, 9].all()  # the gap of one voxel between lung and heart
    assert not closed[0, 9]


def test_each_member_of_a_group_has_its_own_hull():
    organs = torch.zeros(1, 1, 3, 12, dtype=torch.int64)
    organs[..., 0:3], organs[..., 9:12] = 1, 2
    organs[..., 1, 1] = organs[..., 1, 10] = 0
    groups = {"pair": ["lung_left", "lung_right"], "nested": ["pair", "heart"]}
    labels = {"own": {"organs": ["pair"], "hull": True}, "joint": {"organs": ["nested"], "hull": True}}
    own, joint = small(groups=groups, labels=labels).allowed(organs)[0]
    assert own.sum() == 18
    assert joint.all()


def test_spacing_may_differ_between_cases():
    table = small(labels={"x": {"organs": ["heart"], "dilate_mm": 2}})
    organs = torch.zeros(2, 1, 9, 9, dtype=torch.uint8)
    organs[:, :, 4, 4] = 3
    both = table.allowed(organs, spacing=torch.tensor([[1.0, 2.0], [2.0, 0.5]]))
    assert both[0].sum(dim=(1, 2)).tolist() == [(np.hypot(*np.ogrid[-4:5, -8:9:2]) <= 2).sum()]
    assert torch.equal(both[1:], table.allowed(organs[1:], spacing=(2.0, 0.5)))
    affine = torch.diag(torch.tensor([-2.0, 0.5, 3.0, 1.0]))[[1, 0, 2, 3]][None]
    assert spacing_of(affine).tolist() == [[2.0, 0.5, 3.0]]


def test_a_small_organ_in_a_shaped_rule_does_not_vanish():
    organs = torch.zeros(1, 1, 32, 8, dtype=torch.int64)
    organs[..., :16, :] = 1
    organs[..., 30, 6] = 3
    table = small(labels={"x": {"organs": ["lung_left", "heart"], "fill": True}})
    assert table.allowed(organs, size=(2, 1))[0, 0].flatten().tolist() == [True, True]


def test_no_gradient_no_grad_mode_left_behind_and_autocast_is_harmless():
    organs = volume((8, 8, 8))
    expected = small().allowed(organs, size=(3, 2, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(small().allowed(organs, size=(3, 2, 4)), expected)
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        assert torch.equal(small().allowed(organs, size=(3, 2, 4)), expected)
    assert torch.equal(small().allowed(organs.float(), size=(3, 2, 4)), expected)
    assert torch.equal(small().allowed(organs.to(torch.uint8), size=(3, 2, 4)), expected)


def test_select_keeps_the_order_asked_for():
    organs = volume((6, 6))
    table = small()
    some = table.select(["stent", "fracture", "nodule"])
    assert some.labels == ["stent", "fracture", "nodule"]
    assert some.anywhere == (False, True, False)
    assert torch.equal(some.allowed(organs, (2, 3)), table.allowed(organs, (2, 3))[:, [2, 1, 0]])


@pytest.mark.parametrize("name", sorted(shipped_names()))
def test_tables_survive_yaml_pickle_and_copy(name, tmp_path):
    table = OrganTable.load(name)
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(table.to_dict(), sort_keys=False), encoding="utf-8")
    for other in (
        OrganTable.load(path),
        OrganTable.load(str(path)),
        pickle.loads(pickle.dumps(table)),  # noqa: S301
        copy.deepcopy(table),
    ):
        assert other == table
        assert other.labels == table.labels
        assert other.rules == table.rules
    assert OrganTable.load(table) is table
    assert OrganTable(**table.to_dict()) == table
    assert name in shipped_names()


def test_callers_cannot_change_a_table_through_its_views():
    table = small()
    table.labels.clear(), table.organs.clear(), table.groups.clear(), table.to_dict()["labels"].clear()
    assert table == small()


def test_phantom_table():
    table = OrganTable.load("phantom")
    assert table.organs == dict(zip(table.organs, [(i,) for i in range(1, 7)], strict=True))
    assert list(table.organs) == ["lung_left", "lung_right", "heart", "great_vessels", "mediastinum", "spine"]
    assert table.labels[:5] == ["nodule", "ground_glass", "consolidation", "effusion", "cardiomegaly"]
    assert table.labels[5:] == ["coronary_calcification", "aneurysm", "pericardial_effusion"]
    assert table.rules["effusion"].organs == ("lung_left", "lung_right")
    assert [table.rules[n].organs for n in table.labels[4:]] == [("heart",), ("heart",), ("great_vessels",), ("heart",)]


def test_rad_chestct_has_the_authors_eighty_outputs():
    table = OrganTable.load("rad_chestct")
    kinds = ["_".join(name.split("_")[:1]) for name in table.labels]
    assert (kinds.count("h"), kinds.count("heart"), kinds.count("lung")) == (13, 16, 51)
    assert table.labels == sorted(table.labels)
    assert (table.labels[28], table.labels[29]) == ("heart_transplant", "lung_air_trapping")
    assert table.organs == {
        "lung_right": (1,),
        "heart": (2,),
        "lung_left": (3,),
        "rough_right": (4,),
        "rough_left": (5,),
    }
    organs = [set(rule.organs) for rule in table.rules.values()]
    rough = {"rough_left", "rough_right"}
    assert organs == [{"heart", *rough}] * 29 + [{"lung_left", "lung_right", *rough}] * 51
    assert all(name.replace("_", "").isalnum() for name in table.labels)


def test_totalsegmentator_tables_know_all_117_ids():
    chest, abdomen = OrganTable.load("totalsegmentator_chest"), OrganTable.load("totalsegmentator_abdomen")
    assert chest.organs == abdomen.organs
    assert sorted(chest.organs.values()) == [(i,) for i in range(1, 118)]
    known = {"spleen": 1, "liver": 5, "lung_lower_lobe_right": 14, "heart": 51, "aorta": 52, "rib_right_12": 115}
    assert {name: chest.organs[name][0] for name in known} == known
    chest.check_ids(torch.arange(118))
    assert chest.rules["mass"].units == (
        ("lung_lower_lobe_left", "lung_upper_lobe_left"),
        ("lung_lower_lobe_right", "lung_middle_lobe_right", "lung_upper_lobe_right"),
    )
    assert len(chest.rules["rib_fracture"].organs) == 24
    assert len(abdomen.rules["vertebral_fracture"].organs) == 25


@pytest.mark.slow
@needs_abdomen
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_every_organ_of_a_real_abdomen_keeps_a_cell(stride):
    import nibabel as nib

    file = nib.load(ABDOMEN)
    organs = torch.from_numpy(np.asarray(file.dataobj).astype(np.int64))[None, None]
    shipped = OrganTable.load("totalsegmentator_abdomen")
    shipped.check_ids(organs)
    present = [name for name, (i,) in shipped.organs.items() if (organs == i).any()]
    assert len(present) == 41
    table = OrganTable(organs=shipped.organs, labels={name: [name] for name in shipped.organs})
    size = [math.ceil(n / stride) for n in organs.shape[2:]]
    cells = table.allowed(organs, size=size)[0].flatten(1).any(1)
    assert [name for name, kept in zip(shipped.organs, cells.tolist(), strict=True) if kept] == present
    findings = shipped.select(["kidney_stone", "ascites", "adrenal_nodule"])
    assert findings.allowed(organs, size, spacing=file.header.get_zooms()).flatten(2).any(2).all()


def test_compose_ids_writes_the_first_id_of_an_organ():
    assert small().compose_ids(["aorta", "heart"]) == {"aorta": 4, "heart": 3}
    assert small(ignore_unknown=True).compose_ids(["face", "heart"]) == {"heart": 3}
    with pytest.raises(InputError, match="no organ has the name of the file 'hart'; nearest: heart"):
        small().compose_ids(["hart"])


def test_unknown_ids_are_named():
    with pytest.raises(
        InputError, match=r"belong to no organ of the table: -1, 6, 9 \(known: 1-5\); .* ignore_unknown"
    ):
        small().check_ids(torch.tensor([[0, 1, 9, 6, -1]]))
    small(ignore_unknown=True).check_ids(torch.tensor([9]))
    small().check_ids(torch.tensor([0.0, 5.0]))
    with pytest.raises(InputError, match="no whole ids, as a linear resampling leaves them"):
        small().check_ids(torch.tensor([0.5]))


MM = {"x": {"organs": ["heart"], "dilate_mm": 5}}


def test_allowed_refuses_what_it_cannot_use():
    with pytest.raises(InputError, match=r"organs of shape \(B, 1, \*S\)"):
        small().allowed(torch.zeros(2, 2, 4, 4, dtype=torch.int64))
    with pytest.raises(InputError, match="as a linear resampling leaves them: resample organs with mode='nearest'"):
        small().allowed(torch.full((1, 1, 4), 1.5))
    with pytest.raises(InputError, match="expected 2 positive cell numbers"):
        small().allowed(volume((4, 4)), size=(2,))
    with pytest.raises(InputError, match="mode= expects"):
        small().allowed(volume((4, 4)), size=(2, 2), mode="area")
    with pytest.raises(InputError, match="mm options need an affine/spacing, and label 'x' has one"):
        small(labels=MM).allowed(volume((4, 4)))
    for wrong in ((1.0,), (1.0, 0.0), (1.0, float("nan")), torch.ones(4, 2)):
        with pytest.raises(InputError, match=r"spacing= expects 2 lengths in mm, or \(3, 2\) of them"):
            small(labels=MM).allowed(volume((4, 4)), spacing=wrong)


def test_select_names_the_missing_label():
    with pytest.raises(InputError, match="label 'nodul' has no rule; nearest: nodule: add it under labels"):
        small().select(["nodul"])
    with pytest.raises(InputError, match="each label once, got 'mass' 2 times"):
        small().select(["mass", "mass"])
    with pytest.raises(InputError, match="at least one label"):
        small().select([])


WRONG = [
    ({"labels": {"a": ["hart"]}}, "label 'a': 'hart' is no organ or group of the table; nearest: heart"),
    ({"labels": {"a": ["lung"]}}, "label 'a': 'lung' is no organ or group of the table; nearest: lungs"),
    ({"labels": {"a": "anywere"}}, "'anywere' is no organ or group of the table; nearest: anywhere"),
    ({"labels": {"a": []}}, "label 'a': expected a list with at least one organ or group, or anywhere, got []"),
    ({"labels": {"a": None}}, "label 'a': expected a list with at least one organ or group"),
    ({"labels": {"a": {"hull": True}}}, "label 'a': expected a list with at least one organ or group"),
    ({"labels": {"a": {"organs": ["heart"], "dilate": 3}}}, "got 'dilate'; nearest: dilate_mm"),
    ({"labels": {"a": {"organs": ["heart"], "dilate_mm": -1}}}, "dilate_mm expects a length in mm, 0 or more, got -1"),
    ({"labels": {"a": {"organs": ["heart"], "close_mm": "5"}}}, "close_mm expects a length in mm, 0 or more, got '5'"),
    ({"labels": {"a": {"organs": ["heart"], "hull": 1}}}, "hull expects true or false, got 1"),
    ({"labels": {"a": {"organs": ["lungs"], "minus": ["liver"]}}}, "label 'a': minus: 'liver' is no organ or group"),
    ({"labels": {False: ["heart"]}}, "label names are text, got False: put it in quotes"),
    ({"labels": {}}, "expected a mapping with entries under 'labels', got {}"),
    ({"organs": ["heart"]}, "expected a mapping with entries under 'organs', got ['heart']"),
    ({"organs": {"heart": 0}}, "organ 'heart' has the id 0, but 0 is the background"),
    ({"organs": {"heart": 1.5}}, "organ 'heart' has the id 1.5, but ids are whole numbers above 0"),
    ({"organs": {"heart": True}}, "organ 'heart' has the id True, but ids are whole numbers above 0"),
    ({"organs": {"heart": []}}, "organ 'heart' has no id"),
    ({"organs": {"heart": 1, "aorta": [2, 1]}}, "id 1 is used twice, by 'heart' and 'aorta'"),
    ({"organs": {1: 1}}, "organ names are text, got 1"),
    ({"organs": {"anywhere": 1}}, "'anywhere' means no constraint and names nothing else: rename the organ"),
    ({"groups": {"heart": ["aorta"]}}, "'heart' is an organ and a group"),
    (
        {"groups": {"lungs": ["lung_lft"]}},
        "group 'lungs': 'lung_lft' is no organ or group of the table; nearest: lung_left",
    ),
    ({"groups": {"lungs": []}}, "group 'lungs': expected a list with at least one organ"),
    ({"groups": {"lungs": ["b"], "b": ["lungs"]}}, "the group contains itself (lungs > b > lungs)"),
    ({"groups": ["lungs"]}, "expected a mapping under 'groups'"),
    ({"label": {}}, "expected the keys organs, groups, labels, ignore_unknown, got 'label'; nearest: labels"),
    ({"ignore_unknown": "yes"}, "ignore_unknown expects true or false, got 'yes'"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_tables_name_the_entry(changes, message):
    with pytest.raises(InputError) as error:
        small(**changes)
    assert message in str(error.value)


def test_wrong_files_name_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    with pytest.raises(
        InputError, match=r"path of an organ table .*mine.yaml', which is neither; known: ct_rate, phantom"
    ):
        OrganTable.load(path)
    with pytest.raises(InputError, match="which is neither; nearest: phantom"):
        OrganTable.load("phantm")
    with pytest.raises(InputError, match="cannot be read"):
        OrganTable.load(tmp_path)
    path.write_bytes(b"\xff\xfe\x00organs")
    with pytest.raises(InputError, match=r"mine.yaml cannot be read"):
        OrganTable.load(path)
    for text, message in {
        "organs: {a: 1": "mine.yaml cannot be parsed",
        "": "mine.yaml: expected the keys organs and labels, got NoneType",
        "organs: {a: 1, b: 2, a: 3}\nlabels: {x: [a]}": "'a' is written twice",
        "organs: {a: 1}\nlabels: {x: [b]}": "mine.yaml: label 'x': 'b' is no organ",
    }.items():
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError) as error:
            OrganTable.load(path)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
