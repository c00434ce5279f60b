"""Pulls: who reads the organ, who reads beside it, who reads its border; which questions are asked of whom."""

from __future__ import annotations

import pytest
import torch

import camtrain as ct
from camtrain import InputError
from camtrain.callbacks._fixed_cases import FixedCases
from camtrain.callbacks._pulls import Pulls, Sums, chunks, pull_values, questions

SIZE = (12, 10, 14)
ORGAN = (slice(4, 8), slice(3, 7), slice(5, 9))
BORDER = (slice(3, 4), slice(3, 7), slice(5, 9))  # one voxel beside it
FAR = (slice(0, 2), slice(0, 2), slice(0, 3))


def cases_of(rows, seed=0, organs=None):
    """Noise in which organ, border and a far corner are all bright where the first label is present."""
    rng = torch.Generator().manual_seed(seed)
    label = torch.tensor(rows, dtype=torch.float32)
    image = 0.2 * torch.rand(len(label), 1, *SIZE, generator=rng)
    for place in (ORGAN, BORDER, FAR):
        image[(slice(None), slice(None), *place)] += label[:, :1, None, None, None].nan_to_num(0)
    if organs is None:
        organs = torch.zeros(len(label), 1, *SIZE, dtype=torch.int16)
        organs[(slice(None), slice(None), *ORGAN)] = 1
    cases = FixedCases(len(label), 2**30)
    cases.offer(
        [f"case {i}" for i in range(len(label))], image, organs, label, torch.ones(len(label), dtype=torch.bool)
    )
    return cases, image, label


def asked_of(net, cases, image, label, table, replacement="case", margin=1 / 32):
    pulls = Pulls(label.shape[1])
    before = net(image)
    pulls.update(before, label)
    for chunk in chunks(questions(cases, table, replacement), table, replacement, margin, torch.device("cpu"), 3):
        rows = net(torch.cat([one for _, *both in chunk for one in both]))
        for number, (one, *_) in enumerate(chunk):
            row = int(one.case.id.split()[1])
            pulls.answer(one, before[row], rows[2 * number], rows[2 * number + 1])
    return pull_values([pulls.joined()], table.labels)


def reads(*places):
    """A network whose logit is the mean of some places."""
    return lambda image: sum(image[(slice(None), slice(None), *place)].mean(dim=(1, 2, 3, 4)) for place in places)[
        :, None
    ]


ONE = ct.OrganTable(organs={"heart": 1}, labels={"stent": ["heart"]})
MANY = [[1.0], [0.0], [1.0], [0.0], [0.0], [1.0]]


@pytest.mark.parametrize(
    ("places", "margin", "outside", "inside"),
    [
        ((ORGAN,), 1 / 32, 0.0, 1.0),
        ((FAR,), 1 / 32, 1.0, 0.0),
        ((ORGAN, FAR), 1 / 32, 0.5, 0.5),
        ((BORDER,), 1 / 32, 0.0, 0.5),  # the seam is half replaced
        ((BORDER,), 0, 0.5, 0.0),  # without a margin who reads the border reads outside
    ],
)
def test_who_reads_what(places, margin, outside, inside):
    found = asked_of(reads(*places), *cases_of(MANY), ONE, margin=margin)
    assert found["outside_pull"]["stent"] == pytest.approx(outside, abs=0.08)
    assert found["inside_pull"]["stent"] == pytest.approx(inside, abs=0.35 if places == (ORGAN,) else 0.12)
    low, high = (max(found[f"{side}_pull"]["stent"], 0) for side in ("outside", "inside"))
    assert found["outside_share"]["stent"] == pytest.approx(low / (low + high))


def test_what_moves_to_and_fro_is_no_pull_but_a_move():
    """Noise far from the organ: no truth comes in with it, so on the whole it pulls nowhere."""
    cases, image, label = cases_of([[float(i % 2)] for i in range(24)])
    corner = (slice(9, 12), slice(7, 10), slice(10, 14))

    def net(images):
        return reads(ORGAN)(images) + 5 * reads(corner)(images)

    signed = asked_of(net, cases, image, label, ONE)["outside_pull"]["stent"]
    unsigned = asked_of(net, cases, image, label, ONE, "mean")["outside_pull"]["stent"]
    assert abs(signed) < 0.05
    assert unsigned >= 0


def test_a_label_that_the_network_does_not_know_is_not_judged():
    cases, image, label = cases_of(MANY)
    assert asked_of(lambda images: 0 * reads(ORGAN)(images), cases, image, label, ONE)["outside_pull"] == {}
    assert asked_of(lambda images: -reads(ORGAN)(images), cases, image, label, ONE)["outside_pull"] == {}
    with pytest.raises(InputError, match="not finite"):
        asked_of(lambda images: reads(ORGAN)(images) / 0, cases, image, label, ONE)
    pulls = Pulls(1)
    assert pull_values([pulls.joined()], ["stent"])["outside_share"] == {}
    assert pull_values([], ["stent"]) == {}


TWO = {"organs": {"heart": 1, "lung": 2}, "labels": {"a": ["heart"], "b": ["heart"], "c": ["lung"], "d": "anywhere"}}


def test_one_question_per_case_of_another_rule_in_every_turn():
    rng = torch.Generator().manual_seed(1)
    rows = (torch.rand(12, 4, generator=rng) < 0.5).float().tolist()
    rows[3][2] = float("nan")
    cases, _, label = cases_of(rows)
    table = ct.OrganTable.load(TWO)
    first, second, third = (questions(cases, table, "case", turn) for turn in range(3))
    assert [one.case.id for one in first] == [case.id for case in cases]
    assert [one.columns for one in third] == [one.columns for one in first]
    leads = [{"heart" if column < 2 else "lung" for column in one.columns} for one in first]
    assert all(len(lead) == 1 for lead in leads)
    assert 4 <= sum(lead == {"heart"} for lead in leads) <= 8
    for one, other in zip(first, second, strict=True):
        row = int(one.case.id.split()[1])
        if row != 3:
            assert {one.columns[0] < 2, other.columns[0] < 2} == {True, False}
        for each in (one, other):
            assert each.donor is not None
            assert each.donor.id != each.case.id
            assert all(each.donor.label[c] == 1 - label[row, c] for c in each.columns)
    every = questions(cases, table, "blur")
    assert all(one.donor is None and one.columns in ([0, 1], [2]) for one in every)


def test_without_an_opposite_there_is_no_question():
    cases, *_ = cases_of([[1.0], [1.0], [1.0]])
    assert questions(cases, ONE, "case") == []
    assert len(questions(cases, ONE, "mean")) == 3


def test_no_region_or_nothing_else_is_not_asked():
    organs = torch.zeros(3, 1, *SIZE, dtype=torch.int16)
    organs[1] = 1
    organs[(2, slice(None), *ORGAN)] = 1
    cases, *_ = cases_of([[1.0], [0.0], [1.0]], organs=organs)
    made = list(chunks(questions(cases, ONE, "case"), ONE, "case", 1 / 32, torch.device("cpu"), 8))
    assert [[one.case.id for one, *_ in chunk] for chunk in made] == [["case 2"]]


def test_checks_are_pooled_by_their_cases_and_come_back_from_a_checkpoint():
    one = Sums(torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]], dtype=torch.float64), torch.tensor([[2.0, 3.0]]).double())
    other = Sums(torch.tensor([[[0.0, 1.0]], [[2.0, 0.0]]], dtype=torch.float64), torch.tensor([[2.0, 1.0]]).double())
    again = [Sums.of(sums.plain()) for sums in (one, other)]
    found = pull_values(again, ["a"])
    assert found["outside_pull"]["a"] == pytest.approx((1 / 4 + 4 / 4) / 2)
    assert found["inside_pull"]["a"] == pytest.approx((2 / 4 + 0) / 2)
    assert pull_values([one], ["a"])["outside_share"]["a"] == 1.0


def test_joined_in_two_halves_is_the_whole():
    _, image, label = cases_of(MANY)
    whole, halves = Pulls(1), [Pulls(1), Pulls(1)]
    net = reads(ORGAN, FAR)
    whole.update(net(image), label)
    for half, part in zip(halves, (slice(0, 2), slice(2, 6)), strict=True):
        half.update(net(image[part]), label[part])
    for name in ("known", "total", "square"):
        torch.testing.assert_close(getattr(whole, name), sum(getattr(half, name) for half in halves))
