"""`allowed_organs`: what a report says of single cases narrows the table down, organ by organ."""

from __future__ import annotations

import pytest
import torch

from camtrain import InputError, OrganTable
from camtrain._batch import read_batch
from camtrain.anatomy import Rule

TABLE = {
    "organs": {"right": [1, 4], "heart": 2, "left": 3},
    "groups": {"lungs": ["left", "right"]},
    "labels": {
        "nodule": ["lungs"],
        "stent": ["heart"],
        "fracture": "anywhere",
        "effusion": {"organs": ["lungs"], "hull": True, "minus": ["heart"]},
        "mass": ["lungs"],
    },
}
SIZE = (7, 6, 9)


def volume(batch=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 5, (batch, 1, *SIZE), generator=rng) * (torch.rand(batch, 1, *SIZE, generator=rng) < 0.2)


def told(seed=1, batch=3):
    return torch.rand(batch, 5, 3, generator=torch.Generator().manual_seed(seed)) < 0.5


def slow(organs, may, size, mode):
    """Case by case and label by label, with a table of that one label whose organs are those that are left."""
    result = torch.zeros(len(organs), 5, *size, dtype=torch.bool)
    names = list(TABLE["organs"])
    for case in range(len(organs)):
        for index, (label, rule) in enumerate(TABLE["labels"].items()):
            if rule == "anywhere":
                result[case, index] = True
                continue
            listed = rule["organs"] if isinstance(rule, dict) else rule
            members = [m for n in listed for m in TABLE["groups"].get(n, [n])]
            left = [m for m in members if may[case, index, names.index(m)]]
            if not left:
                continue
            options = {**rule, "organs": left} if isinstance(rule, dict) else left
            one = OrganTable(TABLE["organs"], {label: options})
            result[case, index] = one.allowed(organs[case : case + 1], size, mode=mode)[0, 0]
    return result


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", ["fill", "nearest", "any"])
def test_equals_a_table_of_its_own_for_every_case_and_label(seed, mode):
    organs, may = volume(seed=seed), told(seed)
    allowed = OrganTable(**TABLE).allowed(organs, (3, 2, 4), mode=mode, allowed_organs=may)
    assert torch.equal(allowed, slow(organs, may, (3, 2, 4), mode))
    assert not torch.equal(allowed, OrganTable(**TABLE).allowed(organs, (3, 2, 4), mode=mode))


def test_all_true_is_the_table_and_all_false_is_nothing():
    table, organs = OrganTable(**TABLE), volume()
    everything = table.allowed(organs, allowed_organs=torch.ones(3, 5, 3))
    assert torch.equal(everything, table.allowed(organs))
    nothing = table.allowed(organs, allowed_organs=torch.zeros(3, 5, 3, dtype=torch.bool))
    assert nothing.flatten(2).any(2).tolist() == [[False, False, True, False, False]] * 3


def test_a_selected_table_takes_the_same_columns():
    table, organs, may = OrganTable(**TABLE), volume(), told()
    some = table.select(["mass", "stent"])
    allowed = table.allowed(organs, allowed_organs=may)[:, [4, 1]]
    assert torch.equal(some.allowed(organs, allowed_organs=may[:, [4, 1]]), allowed)


@pytest.mark.parametrize("shape", [(3, 4, 3), (2, 5, 3), (3, 5, 4), (3, 5)])
def test_another_shape_is_refused(shape):
    with pytest.raises(
        InputError, match=r"expected allowed_organs of shape \(3, 5, 3\).*table.labels and table.organs"
    ):
        OrganTable(**TABLE).allowed(volume(), allowed_organs=torch.ones(shape))


def test_rules_without_organs_are_none_and_anywhere_stays():
    assert Rule(units=(("a",), ("b", "c")), hull=True).only({"c"}) == Rule(units=(("c",),), hull=True)
    assert Rule(units=(("a",),)).only({"b"}) is None
    assert Rule().only(()) == Rule()


def test_in_a_batch():
    words = {"image": torch.rand(3, 1, *SIZE), "label": torch.ones(3, 5), "organs": volume()}
    assert read_batch(words).allowed_organs is None
    read = read_batch({**words, "allowed_organs": told().float()}, outputs=5).allowed_organs
    assert torch.equal(read, told())
    assert read_batch({"side": told(), **words}, keys={"allowed_organs": "side"}).allowed_organs is not None
    for wrong in (told()[:2], told()[:, :4], told()[0]):
        with pytest.raises(InputError, match=r"allowed_organs of shape \(B, L, O\)"):
            read_batch({**words, "allowed_organs": wrong}, outputs=5)
