"""The fixed cases: balanced, bounded, kept as they came, and found again after a resume."""

from __future__ import annotations

import torch

from camtrain.callbacks._fixed_cases import FixedCases, least_missed, rule_to_ask


def offer(cases, names, truths, size=(4, 5), dtype=torch.float32, segmented=None):
    label = torch.tensor(truths)
    rng = torch.Generator().manual_seed(len(names))
    image = torch.rand(len(names), 1, *size, generator=rng).to(dtype)
    organs = torch.ones(len(names), 1, *size, dtype=torch.int32)
    segmented = torch.ones(len(names), dtype=torch.bool) if segmented is None else segmented
    cases.offer(names, image, organs, label, segmented)
    return image


def test_a_rare_positive_stays_and_labels_are_balanced():
    cases = FixedCases(6, 2**20)
    for number in range(40):
        offer(cases, [f"case{number}"], [[float(number in (7, 29)), float(number % 2)]])
    cases.end()
    assert {"case7", "case29"} <= set(cases.state())
    positives = sum(case.label[1].item() for case in cases)
    assert len(cases) == 6
    assert positives == 3
    before = cases.state()
    offer(cases, ["late"], [[1.0, 1.0]])
    assert cases.state() == before


def test_memory_is_bounded_but_two_remain():
    cases = FixedCases(8, 500)
    for number in range(10):
        offer(cases, [f"case{number}"], [[float(number % 2)]], size=(10, 10))
    assert len(cases) == 2
    assert {case.label.item() for case in cases} == {0.0, 1.0}
    roomy = FixedCases(8, 10_000)
    offer(roomy, ["a", "b"], [[1.0], [0.0]], size=(10, 10))
    assert [case.image.dtype for case in roomy] == [torch.float16] * 2
    assert [case.organs.dtype for case in roomy] == [torch.uint8] * 2
    assert sum(case.nbytes for case in roomy) == 2 * 100 * 3


def test_what_is_not_taken():
    cases = FixedCases(8, 2**20)
    offer(cases, ["unknown", "bare", "good", "good"], [[float("nan")], [1.0], [1.0], [0.0]],
          segmented=torch.tensor([True, False, True, True]))  # fmt: skip
    assert cases.state() == ["good"]
    assert next(iter(cases)).label.tolist() == [1.0]


def test_images_come_back_within_a_thousandth_and_lend_to_each_other():
    cases = FixedCases(8, 2**20)
    image = offer(cases, ["a", "b", "c"], [[1.0], [0.0], [1.0]])
    for kept, row in zip(cases, image, strict=True):
        assert (kept.image.float() - row).abs().max() < 1e-3
    assert cases.donor("a", 0, 1.0, (1, 4, 5)).id == "b"
    assert cases.donor("b", 0, 0.0, (1, 4, 5)).id in ("a", "c")
    assert cases.donor("a", 0, 1.0, (1, 9, 9)) is None


def test_a_resumed_run_takes_the_same_cases_or_chooses_anew():
    cases = FixedCases(8, 2**20)
    cases.load(["b", "d"])
    assert cases.state() == ["b", "d"]
    offer(cases, ["a", "b", "c"], [[1.0], [0.0], [1.0]])
    offer(cases, ["d"], [[1.0]])
    cases.end()
    assert cases.state() == ["b", "d"]
    other = FixedCases(8, 2**20)
    other.load(["gone"])
    offer(other, ["a"], [[1.0]])
    other.end()
    assert other.state() == []
    assert not other.complete
    offer(other, ["a"], [[1.0]])
    assert other.state() == ["a"]


def test_who_is_missed_least_and_who_is_asked_what():
    labels = [torch.tensor(row) for row in ([1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0])]
    assert least_missed(labels) == 2
    assert rule_to_ask(labels, [[0], [1]]).count(0) == 2
    assert rule_to_ask([torch.tensor([torch.nan, 1.0]), torch.tensor([torch.nan] * 2)], [[0], [1]]) == [1, -1]
    assert rule_to_ask([torch.ones(3)] * 4, [[0, 1], [2]]) == [0, 1, 0, 1]
    assert rule_to_ask([torch.ones(2)], []) == [-1]
