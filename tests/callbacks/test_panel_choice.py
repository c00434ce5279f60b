"""Which pairs a panel shows: positives per label, the hardest, a negative; the same whatever comes later."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camtrain.callbacks._case_scores import scored
from camtrain.callbacks._choice import Choice
from camtrain.callbacks._panel import Panel, PanelEntry, asked_too

NAN = float("nan")


def kinds(choice):
    return {(case, index): kind for case, found in choice.pairs.items() for index, kind in found.items()}


def hardest_by_hand(cases, number, taken):
    """All pairs, sorted; the first pair of each case."""
    pairs = sorted(
        (-abs(t - p), name, index)
        for name, truth, probability in cases
        for index, (t, p) in enumerate(zip(truth, probability, strict=True))
        if t == t and p == p and (name, index) not in taken
    )
    first = {}
    for _, name, index in pairs:
        first.setdefault(name, index)
    return list(itertools.islice(first.items(), number))


@pytest.mark.parametrize("seed", range(4))
def test_hard_cases_are_those_of_a_sorted_list(seed):
    rng = random.Random(seed)
    cases = [
        (f"case{i:02d}", [rng.choice([0.0, 1.0, NAN]) for _ in range(4)], [rng.random() for _ in range(4)])
        for i in range(40)
    ]
    choice = Choice(cases=16, labels_per_case=2)
    for name, truth, probability in cases:
        choice.see(name, truth, probability)
    found = kinds(choice)
    taken = {pair for pair, kind in found.items() if kind == "positive"}
    hard = [pair for pair, kind in found.items() if kind == "hard"]
    by_hand = hardest_by_hand(cases, 4, taken)
    assert sorted(hard) == sorted(by_hand)
    # Behind the positive cases, the hardest first.
    positive = {case for case, _ in taken}
    assert [pair for pair in hard if pair[0] not in positive] == [pair for pair in by_hand if pair[0] not in positive]
    assert sum(kind == "negative" for kind in found.values()) <= 1


def test_ties_go_to_the_first_name_in_any_order():
    wrong = [("d", [0.0], [1.0]), ("b", [0.0], [1.0]), ("a", [0.0], [0.2]), ("c", [0.0], [1.0])]
    for order in itertools.permutations(wrong):
        choice = Choice(cases=8, labels_per_case=1)
        for name, truth, probability in order:
            choice.see(name, truth, probability)
        assert [pair for pair, kind in kinds(choice).items() if kind == "hard"] == [("b", 0), ("c", 0)]


def test_the_negative_is_the_case_with_the_fewest_findings():
    choice = Choice(cases=4, labels_per_case=3)
    for name, truth in (("a", [1.0, 1.0, 0.0]), ("b", [1.0, 0.0, NAN]), ("c", [0.0, 0.0, NAN]), ("d", [0.0, 0.0, 0.0])):
        choice.see(name, truth, [0.5, 0.6, 0.9])
    assert kinds(choice)["c", 1] == "negative"  # its likeliest absent label, not the unknown one


def test_cases_without_organs_unknown_truths_and_broken_probabilities_are_not_chosen():
    choice = Choice(cases=8, labels_per_case=1)
    choice.see("bare", [1.0, 0.0], [0.0, 1.0], segmented=False)
    choice.see("unknown", [NAN, NAN], [0.0, 1.0])
    choice.see("broken", [0.0, 0.0], [NAN, NAN])
    assert set(choice.pairs) == {"broken"}  # as the negative
    assert kinds(choice) == {("broken", 0): "negative"}
    empty = Choice(cases=4, labels_per_case=1)
    empty.fix()
    assert not empty.fixed


@st.composite
def splits(draw):
    """Labels, what is asked for, and a split of cases that are common or rare."""
    labels, rng = draw(st.integers(1, 9)), random.Random(draw(st.integers(0, 2**32)))
    values = [0.0] * draw(st.integers(0, 8)) + [1.0] * draw(st.integers(0, 8)) + [NAN]
    listed = [
        (rng.choices(values, k=labels), rng.choices([0.1, 0.5, 0.5, 0.8], k=labels), rng.random() < 0.8)
        for _ in range(draw(st.integers(0, 40)))
    ]
    return draw(st.integers(1, 17)), draw(st.integers(1, 9)), labels, listed


@settings(max_examples=100, deadline=None)
@given(splits())
def test_a_panel_shows_as_many_cases_and_labels_as_are_asked_for(given_split):
    wanted, per_case, labels, listed = given_split
    choice, kept = Choice(wanted, per_case), set()
    for number, (truth, probability, segmented) in enumerate(listed):
        name = f"case{number:02d}"
        choice.see(name, truth, probability, segmented)
        now = {(case, index) for case, found in choice.candidates.items() for index in found}
        # A pass keeps what are candidates when they come by, and lets go of those that are none any more.
        kept = {pair for pair in now if pair in kept or pair[0] == name}
        assert set(kinds(choice)) <= kept
    seen = {f"case{n:02d}": truth for n, (truth, _, segmented) in enumerate(listed) if segmented}
    present = {name: [i for i, value in enumerate(truth) if value == 1] for name, truth in seen.items()}
    positives = {name for name, found in present.items() if found}
    pairs = choice.pairs
    assert len(pairs) <= wanted
    if len(positives) >= wanted:
        assert len(pairs) == wanted
    shown = {name: [i for i in found if i in present[name]] for name, found in pairs.items()}
    positive = [name for name, found in pairs.items() if "positive" in found.values()]
    assert len(positive) >= min(choice.positives, len(positives)) - choice.hard_cases
    for name in positive:
        asked = min(per_case, len(present[name]))
        own = sum(kind == "positive" for kind in pairs[name].values())
        assert own <= asked <= len(shown[name]) <= asked + 1  # one more where a label beside them is the hard one
    # As many cases may lose a label to others as there are others to be shown first.
    often = Counter(index for found in present.values() for index in found)
    for index, count in often.items():
        if choice.positives >= labels and count > (labels - 1) // per_case:
            assert any(index in found for found in shown.values())


def test_of_labels_that_were_shown_equally_often_the_rarest_comes_first():
    choice = Choice(cases=7, labels_per_case=1)
    for name, truth in (("a", [1.0, 0.0]), ("b", [1.0, 1.0]), ("c", [1.0, 1.0])):
        choice.see(name, truth, [0.5, 0.5])
    # Label 0 was met three times, label 1 twice; each is shown once before the last case comes.
    assert {case: index for (case, index), kind in kinds(choice).items() if kind != "negative"} == {
        "a": 0,
        "b": 1,
        "c": 1,
    }


def test_a_panel_of_cases_that_have_all_labels_shows_all_pairs():
    """`panel_cases=12, labels_per_case=8` once gave 4 cases and 11 pairs."""
    choice = Choice(cases=12, labels_per_case=8)
    for number in range(12):
        choice.see(f"case{number:02d}", [1.0] * 8, [0.5] * 8)
    assert [len(found) for found in choice.pairs.values()] == [8] * 12


def test_a_case_with_new_labels_takes_the_place_of_one_that_shows_none_alone():
    choice = Choice(cases=3, labels_per_case=2)
    for name, present in (("a", {0, 1}), ("b", {1, 2}), ("c", {2, 0, 3}), ("d", {4, 5}), ("e", {4, 5})):
        choice.see(name, [float(index in present) for index in range(6)], [0.5] * 6)
    assert {case: set(found) for case, found in choice.pairs.items()} == {"d": {4, 5}, "b": {1, 2}, "c": {0, 3}}


def test_named_cases_are_always_there():
    choice = Choice(cases=1, labels_per_case=2, always=["x", "y"])
    choice.see("a", [1.0, 1.0, 1.0], [0.5] * 3)
    choice.see("x", [1.0, 0.0, 1.0], [0.5] * 3)
    choice.see("y", [0.0, 0.0, NAN], [0.5, 0.7, 0.9])
    assert choice.pairs == {
        "x": {0: "positive", 2: "positive"},
        "y": {1: "negative"},
        "a": {0: "positive", 1: "positive"},
    }


def test_a_choice_survives_a_checkpoint_and_one_without_kinds_is_read():
    choice = Choice(cases=4, labels_per_case=1)
    for name, truth in (("a", [1.0, 0.0]), ("b", [0.0, 0.0])):
        choice.see(name, truth, [0.4, 0.6])
    choice.fix()
    other = Choice(cases=9, labels_per_case=9)
    other.load(choice.state())
    assert other.pairs == choice.pairs
    other.see("z", [1.0, 1.0], [0.0, 0.0])
    assert other.pairs == choice.pairs
    other.load([["case", [2, 0]]])
    assert other.pairs == {"case": {2: "positive", 0: "positive"}}


def test_the_first_pass_chooses_the_panel():
    panel, segmented = Panel(cases=3, labels_per_case=1), torch.ones(3, dtype=torch.bool)
    label = torch.tensor([[1.0, 0.0, torch.nan], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    probability = torch.full((3, 3), 0.5)
    panel.begin()
    # Patches of one scan share its id: the first one stands for it.
    assert panel.wanted(["a", "a", "b"], label, segmented, probability) == {0: [0], 2: [1]}
    assert panel.wanted(["c", "d", "e"], label.roll(1, 1), ~segmented, probability) == {}
    panel.end()
    # A label that the first pass did not show joins no more; the chosen cases are found wherever they come.
    assert panel.wanted(["e", "b", "a"], torch.ones(3, 3), segmented, probability) == {1: [1], 2: [0]}


def test_maps_are_asked_for_absent_labels_of_the_panel_only():
    present = torch.tensor([[True, False, False], [False, True, False]])
    asked = asked_too({1: [0, 1]}, present)
    assert asked.tolist() == [[True, False, False], [True, True, False]]
    assert present.sum() == 2


@pytest.mark.parametrize(
    ("order", "says"), [(["gradcam", "hirescam"], "inside 0.00"), (["hirescam", "gradcam"], "inside 1.00")]
)
def test_an_overview_tells_of_the_map_that_it_shows(order, says):
    """Scores come by method; in which order they were made must not matter."""
    maps = {"hirescam": np.eye(4, dtype=np.float32)[:1], "gradcam": np.eye(4, dtype=np.float32)[1:2]}
    cells = np.array([[True, False, False, False]])
    entry = PanelEntry(
        case="a", label="nodule", present=True, probability=0.9, shape=(4,), scenes={}, affine=None,
        maps={m: maps[m][0] for m in order}, cells=dict.fromkeys(reversed(order), cells[0]),
    )  # fmt: skip
    (found,) = scored([entry], {}, ["nodule"])
    assert list(found.energy_inside) == order
    assert says in found.brief
    undefined = replace(found, energy_inside={order[1]: 0.5})
    assert "inside" not in undefined.brief
