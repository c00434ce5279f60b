"""Labels and sides of RAD-ChestCT against a slow reference, and its vocabulary."""

from __future__ import annotations

import math

import numpy as np
import pytest

from camtrain import InputError, OrganTable
from camtrain.data.rad_chestct_labels import (
    FINDINGS,
    LUNG_FINDINGS,
    PLACES,
    PLACES_OF,
    columns_of,
    make_truths,
    organs_told,
    side_of,
    split_label,
)

TABLE = OrganTable.load("rad_chestct")
HEADER = [f"{finding}*{place}" for finding in FINDINGS for place in PLACES]


def random_columns(cases=40, seed=0, unknown=0.0):
    rng = np.random.default_rng(seed)
    values = (rng.random((len(HEADER), cases)) < 0.03).astype(np.float32)
    values[rng.random(values.shape) < unknown] = math.nan
    return dict(zip(HEADER, values, strict=True))


def slow(columns, case, label):
    """(truth, left, right), from the description of the study alone; no unknown values."""
    words = {"h_great_vessel": 3, "h_mediastinum": 2, "heart": 1, "lung": 1}
    place = next(p for p in words if label.startswith(p))
    finding = "_".join(label.split("_")[words[place] :])
    cell = {where: columns[f"{finding}*{where}"][case] for where in PLACES}
    if place != "lung":
        return max(cell[where] for where in PLACES_OF[place]), True, True
    left = max(cell[f"left_{part}"] for part in ("upper", "mid", "lower", "lung"))
    right = max(cell[f"right_{part}"] for part in ("upper", "mid", "lower", "lung"))
    there = max(cell.values()) if finding in LUNG_FINDINGS else max(left, right)
    if not there or not (left or right):
        return there, True, True
    return there, bool(left), bool(right)


def test_vocabulary():
    assert (len(FINDINGS), len(set(FINDINGS)), len(PLACES), len(set(PLACES))) == (84, 84, 52, 52)
    assert len(HEADER) == 4368
    assert set().union(*PLACES_OF.values()) <= set(PLACES)
    kinds = [split_label(label)[0] for label in TABLE.labels]
    assert kinds == ["h_great_vessel"] * 7 + ["h_mediastinum"] * 6 + ["heart"] * 16 + ["lung"] * 51
    plain = OrganTable.load("rad_chestct_plain")
    assert plain.labels == list(FINDINGS)
    assert plain.organs == TABLE.organs
    assert plain.anywhere.count(False) == 36


def test_all_eighty_labels_equal_those_of_a_slow_reference():
    columns = random_columns()
    truths = make_truths(columns, TABLE.labels)
    seen = set()
    for case in range(40):
        for index, label in enumerate(TABLE.labels):
            found = truths.label[case, index], truths.left[case, index], truths.right[case, index]
            assert found == slow(columns, case, label), label
            seen.add((label.split("_")[0], *map(bool, found)))
    # Every kind of answer occurred: no label without a place, left only, right only, both.
    assert {("lung", True, True, False), ("lung", True, False, True), ("lung", True, True, True)} <= seen


def test_the_authors_program_widens_what_only_lungs_have():
    columns = {"pneumonia*left_lower": np.array([1.0]), "nodule*left_lower": np.array([1.0])}
    labels = ["lung_pneumonia", "lung_nodule"]
    reported = make_truths(columns, labels)
    assert (reported.left.tolist(), reported.right.tolist()) == ([[True, True]], [[False, False]])
    authors = make_truths(columns, labels, sides="authors")
    assert (authors.left.tolist(), authors.right.tolist()) == ([[True, True]], [[True, False]])
    assert authors.label.tolist() == reported.label.tolist() == [[1, 1]]


def test_a_finding_ends_at_the_star():
    """`nodule` must not swallow `nodulegr1cm`, nor `calcification` anything of `scattered_calc`."""
    columns = {"nodule*left_upper": np.zeros(2), "nodulegr1cm*left_upper": np.array([1.0, 0])}
    assert make_truths(columns, ["lung_nodule", "lung_nodulegr1cm"]).label.tolist() == [[0, 1], [0, 0]]
    assert make_truths(columns, ["nodule"], "plain").label.tolist() == [[0], [0]]


def test_a_generic_finding_needs_a_lung_and_a_lung_finding_needs_none():
    columns = {f"{f}*{p}": np.array([float(p == "lung")]) for f in ("mass", "pneumonia") for p in ("lung", "right_mid")}
    truths = make_truths(columns, ["lung_mass", "lung_pneumonia"])
    assert truths.label.tolist() == [[0, 1]]
    assert truths.left.all()
    assert truths.right.all()


def test_unknown_values():
    columns = random_columns(unknown=0.3)
    labels = ["lung_nodule", "heart_stent"]
    truths = make_truths(columns, labels)
    for index, label in enumerate(labels):
        cells = np.stack([columns[name] for name in columns_of(label, "located", HEADER)])
        for case in range(40):
            known = cells[:, case][~np.isnan(cells[:, case])]
            wanted = 1.0 if 1 in known else math.nan if len(known) < len(cells) else 0.0
            assert truths.label[case, index] == pytest.approx(wanted, nan_ok=True)


def test_plain_labels_are_the_largest_of_their_row():
    columns = random_columns(seed=3)
    label = make_truths(columns, list(FINDINGS), "plain").label
    table = np.stack([np.max([columns[f"{f}*{p}"] for p in PLACES], axis=0) for f in FINDINGS], axis=1)
    assert np.array_equal(label, table)
    old = make_truths({"fracture": np.array([1.0, 0])}, ["fracture"], "plain")
    assert old.label.tolist() == [[1], [0]]


def test_sides_of_organs():
    told = organs_told(np.array([True, False]), np.array([False, True]), list(TABLE.organs))
    assert list(TABLE.organs) == ["lung_right", "heart", "lung_left", "rough_right", "rough_left"]
    assert told.tolist() == [[False, True, True, False, True], [True, True, False, True, False]]
    assert [side_of(n) for n in ("rib_left_4", "iliac_artery_right", "brightness", "left_right")] == [
        "left",
        "right",
        "",
        "",
    ]


@pytest.mark.parametrize(
    ("label", "label_set", "says"),
    [
        ("lung_nodul", "located", "nearest: nodule"),
        ("liver_mass", "located", "made of a place"),
        ("lung_debris", "located", "none; nearest|none; known"),
        ("nodul", "plain", "nearest: nodule"),
    ],
)
def test_labels_without_columns(label, label_set, says):
    with pytest.raises(InputError, match=says):
        columns_of(label, label_set, ["nodule*left_lung", "nodulegr1cm*lung"])
